"""Operations as Triton kernels for NVIDIA GPUs, Hopper first.

Each file documents one operation, its kernel and its launcher; shapes and meaning are those of the
same name in ``kernels.reference``. On tensors of the CPU the kernels run in Triton's interpreter
(``TRITON_INTERPRET=1`` before triton is imported), which is how they are tested without a GPU.
"""
