"""A whole mesh on this machine: one process per role, supervised, with emulated links."""
