"""Launches that overlap: the next kernel's programs start while the last of this one's still run.

A decode step is some ten short kernels per layer, and between two of them a device is empty for a
microsecond or more: the last programs end, then the next are started. Programmatic dependent launch
(Hopper) lets them start before and wait. A kernel that can be launched so

    await_turn(OVERLAP)

before it loads or stores anything: it waits until the kernel before has ended and all that it wrote
is to be seen, and only then lets the next kernel's programs start. So each kernel begins its work
after the end of all before it, as without; a kernel that is launched as usual waits for all anyway.
``kernels.triton.compiled`` checks in the machine code that nothing is loaded or stored before the
wait. What is there for good may be asked for meanwhile: between two products of a decode step are
short kernels, in whose time the memory could bring the next weights.

Source: CUDA C++ Programming Guide, programmatic dependent launch and synchronization; PTX ISA,
griddepcontrol and prefetch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ask_ahead(places):
    """Have the cache lines at ``places``, pointers to weights, brought to the L2 cache. Nothing is
    seen of it but the time that the loads take."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;",
        "=r,l",
        [places.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def await_turn(OVERLAP: tl.constexpr):
    """Has to come before all loads and stores."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
