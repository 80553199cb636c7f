"""What a measurement of the CPU kernels holds for: the processor, and who computed on it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kernels.resident_layout import PRODUCTS

CPUINFO = Path("/proc/cpuinfo")

INSTRUCTIONS = ("avx2", "avx512bw", "avx512_bf16")
"""What the native kernels choose by, in the words of /proc/cpuinfo."""


class Machine(msgspec.Struct, frozen=True):
    """``threads`` compute with version ``products`` of the kernels on a ``processor``."""

    processor: str
    instructions: tuple[str, ...]
    threads: int
    products: int


def this_machine(threads: int, cpuinfo: Path = CPUINFO) -> Machine:
    """This one; where the system does not name its processor, it has none of the instructions.
    Source: proc_cpuinfo(5)."""
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    rows = (line.partition(":") for line in first.splitlines())
    known = {name.strip(): value.strip() for name, _, value in rows}
    flags = known.get("flags", "").split()
    words = (known.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    instructions = tuple(name for name in INSTRUCTIONS if name in flags)
    return Machine(" ".join(words).strip(), instructions, threads, PRODUCTS)
