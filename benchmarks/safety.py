"""What safety costs in the KV stream: with and without checksums, with and without leases.

    python benchmarks/safety.py --out benchmarks/results/safety.json [--rounds 7] [--mbytes 512]

Two processes on loopback run the real endpoints with real staging memory; no engine copies
anything, so the stream itself is all there is. A prefill side offers transfers of ``mbytes``, the
decode side takes every piece and confirms it at once. Variants: ``full`` (as shipped);
``no-checksums`` (neither side looks at the payload: the digest is a constant); ``no-leases`` (no
deadlines are kept and no pings are sent); ``bare`` (neither). Only this benchmark can switch them
off, by replacing functions in its own processes. In each round every variant gets fresh processes,
in turning order. Figures: bytes/s of one transfer, and CPU seconds per GB of both processes
together, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from common.report import command_line, facts, save
from parts.kv_side import KvSide

from pop_node.kv_stream import intake, link
from pop_node.kv_stream.liveness import Keepalive
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.kv_stream.staging import StagingLayout
from wire.address import format_address

VARIANTS = ("full", "no-checksums", "no-leases", "bare")
LAYERS, HEADS, WIDTH = 30, 3, 64
SPEC = KvSpec(
    (
        KvGroup(
            "tokens",
            tuple(range(LAYERS)),
            (
                KvComponent("k", "bfloat16", (HEADS, WIDTH), 0),
                KvComponent("v", "bfloat16", (HEADS, WIDTH), 0),
            ),
        ),
    )
)
"""SmolLM2-135M: 46,080 bytes a token."""

LAYOUT = StagingLayout()
CHUNK = LAYOUT.slot_bytes // (HEADS * WIDTH * 2)
WARM_BYTES = 64 * 1024 * 1024
START_TIMEOUT_S = 30.0
DEADLINE_S = 300.0


def weaken(variant: str) -> None:
    """Take the safety out of this process that ``variant`` says it does not have."""
    if variant in ("no-checksums", "bare"):
        for module in (intake, link):
            module.data_checksum = lambda *_: b"unchecked"[:8]  # type: ignore[attr-defined]
    if variant in ("no-leases", "bare"):
        Sender.next_deadline = lambda _: None  # type: ignore[method-assign]
        Receiver.next_deadline = lambda _: None  # type: ignore[method-assign]
        Keepalive.next_deadline = lambda _: math.inf  # type: ignore[method-assign]


class Side(KvSide):
    """One endpoint whose engine does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name, SPEC, LAYOUT, CHUNK)

    async def hand_over(self, number: int, tokens: int, address: str) -> float:
        """Offer one transfer as the prefill side; the seconds it took."""
        transfer, digest = self.begin(number, tokens), prompt_digest(range(tokens))
        start = time.monotonic()
        self.endpoint.open(transfer, 1, "d", address, "m", "i", SPEC, tokens, digest, DEADLINE_S)
        self.endpoint.commit(transfer, [1])
        await self.ended
        return time.monotonic() - start

    async def take(self, number: int, tokens: int) -> None:
        """Expect one transfer as the decode side."""
        transfer, digest = self.begin(number, tokens), prompt_digest(range(tokens))
        self.endpoint.expect(transfer, 1, "p", "m", "i", SPEC, tokens, digest, DEADLINE_S)
        self.endpoint.allocated(transfer, 0)
        await self.ended


def plan(mbytes: int) -> list[int]:
    """Tokens of each transfer: a warm-up, then the one that is measured."""
    return [-(-size // SPEC.token_bytes) for size in (WARM_BYTES, mbytes * 1024 * 1024)]


async def decode_side(mbytes: int, address_file: Path) -> None:
    """Take all transfers, then say what CPU the measured one needed."""
    side = Side("d")
    address = format_address(*await side.endpoint.start("127.0.0.1", 0))
    address_file.with_suffix(".new").write_text(address)
    address_file.with_suffix(".new").replace(address_file)
    before = 0.0
    for number, tokens in enumerate(plan(mbytes)):
        before = time.process_time()
        await side.take(number, tokens)
    print(json.dumps({"cpu_s": time.process_time() - before}), flush=True)
    await side.endpoint.close()
    side.staging.close()


async def prefill_side(mbytes: int, address: str) -> None:
    """Offer all transfers, then say what the measured one needed."""
    side = Side("p")
    await side.endpoint.start("127.0.0.1", 0)
    before, wall = 0.0, 0.0
    for number, tokens in enumerate(plan(mbytes)):
        before = time.process_time()
        wall = await side.hand_over(number, tokens, address)
    nbytes = plan(mbytes)[-1] * SPEC.token_bytes
    found = {"cpu_s": time.process_time() - before, "wall_s": wall, "nbytes": nbytes}
    print(json.dumps(found), flush=True)
    await side.endpoint.close()
    side.staging.close()


def once(variant: str, mbytes: int, work: Path) -> dict[str, float]:
    """One pair of processes."""
    address_file = work / f"address-{time.monotonic_ns()}"
    base = [sys.executable, __file__, "--variant", variant, "--mbytes", str(mbytes), "--side"]
    with subprocess.Popen([*base, "decode", str(address_file)], stdout=subprocess.PIPE) as decode:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not address_file.exists():
            if decode.poll() is not None or time.monotonic() > deadline:
                decode.kill()
                raise RuntimeError("the decode side did not start")
            time.sleep(0.01)
        prefill = subprocess.run(
            [*base, "prefill", address_file.read_text()], stdout=subprocess.PIPE, check=True
        )
        sent, taken = json.loads(prefill.stdout), json.loads(decode.communicate()[0])
    cpu_s = sent["cpu_s"] + taken["cpu_s"]
    return {
        "gbytes_per_s": sent["nbytes"] / sent["wall_s"] / 1e9,
        "cpu_s_per_gbyte": cpu_s / sent["nbytes"] * 1e9,
        "prefill_cpu_s": sent["cpu_s"],
        "decode_cpu_s": taken["cpu_s"],
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mbytes", type=int, default=512)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        weaken(args.variant)
        kind, where = args.side
        if kind == "decode":
            uvloop.run(decode_side(args.mbytes, Path(where)))
        else:
            uvloop.run(prefill_side(args.mbytes, where))
        return
    if args.out is None:
        parser.error("--out is needed")
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="popmesh-bench-") as work:
        for number in range(args.rounds):
            turn = number % len(VARIANTS)
            for variant in VARIANTS[turn:] + VARIANTS[:turn]:
                found = once(variant, args.mbytes, Path(work))
                samples[variant].append(found)
                print(variant, {key: round(value, 3) for key, value in found.items()}, flush=True)
    medians = {
        variant: {
            key: statistics.median(s[key] for s in got)
            for key in ("gbytes_per_s", "cpu_s_per_gbyte")
        }
        for variant, got in samples.items()
    }
    full = medians["full"]["cpu_s_per_gbyte"]
    report = facts(__doc__, ("uvloop", "msgspec", "xxhash")) | {
        "mbytes": args.mbytes,
        "warm_up_bytes": WARM_BYTES,
        "summary": {
            "medians": medians,
            "cpu_full_over": {v: full / medians[v]["cpu_s_per_gbyte"] for v in VARIANTS[1:]},
        },
        "samples": samples,
    }
    save(report, args.out)
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
