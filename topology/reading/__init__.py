"""How a topology file is read; ``topology.load`` is the way in."""
