"""``python -m tests.sim``: many seeds, or one with its trace."""

from tests.sim.runner import main

if __name__ == "__main__":
    main()
