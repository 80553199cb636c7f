"""Drills: failures on purpose in a running mesh, and what its clients saw of them."""
