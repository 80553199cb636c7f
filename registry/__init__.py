"""The mesh's directory: a Consul client, an embedded server of the same subset, and their keepers.

May import ``wire`` and ``topology``; must not import kernels, router, pop_node or torch.
"""
