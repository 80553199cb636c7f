"""``python -m popmesh``: the same as the ``popmesh`` command."""

from popmesh.cli import main

if __name__ == "__main__":
    main()
