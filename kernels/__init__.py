"""Math of the engine: readable references, native CPU operations, Triton kernels.

Imports only torch, triton and numpy. ``__version__`` exists because another package on PyPI has
this name and transformers probes its version.
"""

__version__ = "0.0.0"
