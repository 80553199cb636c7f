"""Planned launches compiled for sm_90 on a machine without a GPU, and what ptxas made of them.

Registers, spills, shared memory and tensor-core instructions are read from the finished machine
code, with the assembler and the disassembler that triton brings along. Run as a program, it prints
the table of ``kernels.triton.shapes`` and fails if a kernel spills, lacks the tensor-core
instructions that it should have, or wants more shared memory than an SM has:

    python -m kernels.triton.compiled [--json]
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.launch import Launch
from kernels.triton.shapes import shapes

TARGET = GPUTarget("cuda", 90, 32)

MAX_SHARED_BYTES = 227 * 1024
"""Of one block on compute capability 9.0. Source: CUDA C++ Programming Guide, technical
specifications per compute capability."""

REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_SM = 228 * 1024
BLOCK_RESERVED_BYTES = 1024
"""Likewise; the last is what the system keeps of each block's shared memory."""

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as sm_90 machine code.

    ``spilled``: instructions that store to or load from local memory. ``shared_bytes``: of a
    program. ``hmma`` and ``gmma``: tensor-core instructions. ``copies``: asynchronous ones from
    global to shared memory, the mark of a pipelined loop. ``early``: of a launch that may overlap
    the one before, instructions that touch memory before they wait for it; -1: nothing waits.
    ``ahead``: those that ask the L2 cache for something before.
    """

    name: str
    registers: int
    spilled: int
    shared_bytes: int
    warps: int
    hmma: int
    gmma: int
    copies: int
    early: int = 0
    ahead: int = 0

    @property
    def programs_per_sm(self) -> int:
        """How many fit on one multiprocessor, by registers and shared memory."""
        by_registers = REGISTERS_PER_SM // (32 * self.warps * -(-max(self.registers, 1) // 8) * 8)
        by_shared = SHARED_BYTES_PER_SM // (self.shared_bytes + BLOCK_RESERVED_BYTES)
        return min(by_registers, by_shared, 64 // self.warps)

    def faults(self, cores: str) -> list[str]:
        """What is wrong with it, if instructions of ``cores`` are expected: "", HMMA or GMMA."""
        found = []
        if self.spilled:
            found.append(f"{self.name}: {self.spilled} spill instructions")
        if self.shared_bytes > MAX_SHARED_BYTES:
            found.append(f"{self.name}: {self.shared_bytes} bytes of shared memory")
        if not {"": True, "HMMA": self.hmma, "GMMA": self.gmma}[cores]:
            found.append(f"{self.name}: no {cores} instructions")
        if self.early:
            found.append(f"{self.name}: begins before the launch before it has ended")
        return found


def compile_launch(name: str, launch: Launch) -> Compiled:
    """Compile what ``launch`` would run; its tensors may be on the meta device.

    Integers and pointers are specialised as in a real launch: 1 is a constant, multiples of 16 are
    known to be such; memory begins at multiples of 16 bytes.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], int | float | bool] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        argument = parameter.name
        if argument in launch.constants or argument not in launch.arguments:
            signature[argument] = "constexpr"
            constants[(index,)] = launch.constants.get(argument, parameter.default)
            continue
        value = launch.arguments[argument]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if special and value == 1:
            signature[argument] = "constexpr"
            constants[(index,)] = 1
            continue
        if isinstance(value, torch.Tensor):
            signature[argument] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32" if abs(value) < 1 << 31 else "i64"
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(source, target=TARGET, options=options)
    usage, code = _disassembled(kernel.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Compiled(
        name,
        registers=int(registers[1]),
        spilled=len(re.findall(r"\b(?:STL|LDL)[.\s]", code)),
        shared_bytes=kernel.metadata.shared,
        warps=launch.warps,
        hmma=len(re.findall(r"\bHMMA\b", code)),
        gmma=len(re.findall(r"\b[HQI]GMMA\b", code)),
        copies=len(re.findall(r"\bLDGSTS\b", code)),
        **(_before_its_turn(code) if launch.constants.get("OVERLAP") else {}),
    )


def _before_its_turn(code: str) -> dict[str, int]:
    """``early`` and ``ahead``: instructions before the wait (ACQBULK)."""
    before, wait, _ = code.partition("ACQBULK")
    touching = re.findall(r"\b(?:LD|ST|LDG|STG|LDGSTS|RED|REDG|ATOM|ATOMG|UBLKCP)\b", before)
    asking = re.findall(r"\bCCTL\.E\.PF2\b", before)
    return {"early": len(touching) if wait else -1, "ahead": len(asking)}


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the instructions of a finished kernel, as cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
            for what in ("--dump-resource-usage", "-sass")
        )
    return usage.stdout, code.stdout


def table(rows: list[Compiled]) -> str:
    """For people."""
    head = f"{'kernel':<44} {'regs':>4} {'spills':>6} {'shared':>7} {'warps':>5} {'per SM':>6}"
    lines = [f"{head} {'HMMA':>5} {'GMMA':>5} {'copies':>6}"]
    lines += [
        f"{row.name:<44} {row.registers:>4} {row.spilled:>6} {row.shared_bytes:>7} {row.warps:>5} "
        f"{row.programs_per_sm:>6} {row.hmma:>5} {row.gmma:>5} {row.copies:>6}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Compile every shape; 1 if one has a fault."""
    rows: list[Compiled] = []
    faults: list[str] = []
    for shape in shapes():
        rows.append(compile_launch(shape.name, shape.launch))
        faults += rows[-1].faults(shape.cores)
    if "--json" in sys.argv[1:]:
        content = {"rows": [dataclasses.asdict(row) for row in rows], "faults": faults}
        print(json.dumps(content, indent=1))
    else:
        print(table(rows))
        for fault in faults:
            print(f"fault: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
