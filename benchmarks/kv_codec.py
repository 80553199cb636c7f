"""The KV cache packed: its size against what entropy allows, and hand-overs over emulated links.

    python benchmarks/kv_codec.py --store .cache/store-2 \\
        --out benchmarks/results/kv_codec.json [--rounds 7] [--tokens 1024]

KV of SmolLM2-135M in bfloat16, computed from this project's own documents. ``sizes``: pieces of one
layer and component for so many tokens, each coded by itself; shares are of the raw bytes, the limit
is the entropy of each piece's exponents plus its signs and mantissas, GB/s are of decoded bytes per
second of processor time on one thread. ``links``: two processes with real endpoints hand the whole
cache over through the link shaper, raw and packed in turn over the same connections; seconds run
from the offer until the prefill node knows that everything is there, and what arrived is compared.
``speedup`` is the median over rounds of raw seconds / packed seconds. ``beside_streams``: the same
hand-overs, one after the other, on a machine whose cores an engine uses to decode ``streams``
answers; ``lost_ms`` is the time by which one hand-over sets each of them back, from the steps of a
window against those of windows without one. Both nodes are on that machine, so it is what packing
and unpacking cost together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from common.ports import free_ports
from common.report import ROOT, command_line, facts, save

from kernels import codec
from kernels.codec.layout import FLOAT_TYPES
from popmesh.links.plan import EmulatedLink, LinkPlan, ShapedPort

PIECE_TOKENS = (16, 64, 512)
LINKS_MBPS = (100.0, 1000.0)
RTT_MS = 20.0
BLOCK_TOKENS = 16
STREAMS, STREAMS_MBPS, WINDOW_S = 4, 1000.0, 1.0
VARIANTS = {"raw": ["raw"], "packed": ["packed-1", "raw"]}


def compute_kv(store: Path, tokens: int) -> np.ndarray:
    """[component, layer, token, values] uint16: bfloat16 bits of K and V of a text."""
    import torch

    from pop_node.engine.messages import Add
    from pop_node.engine.running.runner import Runner
    from pop_node.engine.scheduling.block_pool import BlockPool
    from pop_node.engine.scheduling.scheduler import Scheduler
    from pop_node.engine.scheduling.validate import Limits
    from pop_node.models.registry import load_backend, load_model
    from pop_node.store.store import Store
    from pop_node.text.tokenizer import TextCodec

    directory = Store(store).get("smollm2-135m").path.resolve()
    text = "".join((ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md"))
    ids = TextCodec.load(directory).tokenizer.encode(text).ids[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens only")
    ops, blocks = load_backend("native", 1), tokens // BLOCK_TOKENS + 2
    model = load_model(directory, "bfloat16", ops)
    runner = Runner(model, ops, blocks, BLOCK_TOKENS)
    limits = Limits(model.config.vocab_size, blocks * BLOCK_TOKENS, BLOCK_TOKENS, blocks)
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_TOKENS), limits, token_budget=512, max_sequences=1, max_waiting=1
    )
    scheduler.handle(Add(1, "both", ids, [], 1, 0.0, 1.0, 0, [], b"", b""), 0.0)
    table: list[int] = []
    while scheduler.num_sequences:
        schedule, _ = scheduler.schedule(0.0)
        table = list(schedule.rows[0].sequence.blocks)
        scheduler.complete(schedule, runner.run(schedule, None), 0.0)
    parts = []
    for part in runner.cache:  # [layer, block, token of it, head, dim]
        found = part[:, table].flatten(1, 2)[:, :tokens].flatten(2)
        parts.append(found.contiguous().view(torch.int16).numpy().view(np.uint16))
    return np.stack(parts)


def limit(piece: np.ndarray) -> float:
    """Bits of a bfloat16 piece that its exponents' entropy leaves."""
    kind = FLOAT_TYPES["bfloat16"]
    counts = np.bincount(piece >> kind.mantissa_bits & (1 << kind.exponent_bits) - 1)
    odds = counts[counts > 0] / len(piece)
    return len(piece) * (kind.mantissa_bits + 1 - float((odds * np.log2(odds)).sum()))


def size(kv: np.ndarray, part: int, tokens: int) -> dict[str, Any]:
    """How K (0) or V (1) packs in pieces of so many tokens."""
    _, layers, total, _ = kv.shape
    pieces = [
        np.ascontiguousarray(kv[part, layer, lo : lo + tokens]).reshape(-1)
        for layer in range(layers)
        for lo in range(0, total - tokens + 1, tokens)
    ]
    nbytes = sum(piece.nbytes for piece in pieces)
    out = np.empty_like(pieces[0])
    codec.decode_into(codec.encode(pieces[0], "bfloat16"), out)  # loads the library
    began = time.process_time()
    blocks = [codec.encode(piece, "bfloat16") for piece in pieces]
    encoded = time.process_time()
    for block in blocks:
        codec.decode_into(block, out)
    decoded = time.process_time()
    for piece, block in zip(pieces, blocks, strict=True):
        codec.decode_into(block, out)
        if not np.array_equal(out, piece):
            raise SystemExit("a piece came back otherwise")
    return {
        "component": "kv"[part],
        "tokens": tokens,
        "piece_bytes": pieces[0].nbytes,
        "share": round(sum(map(len, blocks)) / nbytes, 4),
        "limit": round(sum(map(limit, pieces)) / (8 * nbytes), 4),
        "encode_gbytes_per_s": round(nbytes / (encoded - began) / 1e9, 2),
        "decode_gbytes_per_s": round(nbytes / (decoded - encoded) / 1e9, 2),
    }


class Process:
    """One of the two nodes, or the engine beside them: a script and its arguments."""

    def __init__(self, stack: ExitStack, script: str, *arguments: object) -> None:
        path = Path(__file__).parent / "parts" / script
        self._process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(path), *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        stack.callback(self._process.terminate)
        self.ready = self.answer()

    def ask(self, **question: Any) -> None:
        """Say what to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a node ended")
        return json.loads(line)


def shape(stack: ExitStack, target: str, work: Path) -> dict[float, str]:
    """The address of the decode node over each link."""
    listen = [f"127.0.0.1:{port}" for port in free_ports(len(LINKS_MBPS))]
    sites = [f"site-{number}" for number in range(len(LINKS_MBPS))]
    plan = LinkPlan(
        [EmulatedLink("here", s, RTT_MS, m) for s, m in zip(sites, LINKS_MBPS, strict=True)],
        [ShapedPort(a, target, "here", s) for s, a in zip(sites, listen, strict=True)],
    )
    file = work / "links.json"
    file.write_bytes(msgspec.json.encode(plan))
    command = [sys.executable, "-m", "popmesh", "links", "--plan", str(file)]
    shaper = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    stack.callback(shaper.terminate)
    assert shaper.stderr is not None
    while "listening" not in (line := shaper.stderr.readline()):
        if not line:
            raise SystemExit("the shaper did not start")
    return dict(zip(LINKS_MBPS, listen, strict=True))


class Nodes:
    """A prefill and a decode node, and the links between them."""

    def __init__(self, stack: ExitStack, kv: np.ndarray) -> None:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="popmesh-bench-")))
        np.save(work / "kv.npy", kv)
        self._prefill, self._decode = (
            Process(stack, "kv_codec_sides.py", kind, work / "kv.npy")
            for kind in ("prefill", "decode")
        )
        self._addresses = shape(stack, self._decode.ready["address"], work)
        self._number = 0

    def hand_over(self, mbps: float, codecs: list[str]) -> dict[str, Any]:
        """Once, over a link: what both sides tell."""
        self._number += 1
        self._decode.ask(number=self._number)
        self._prefill.ask(number=self._number, address=self._addresses[mbps], codecs=codecs)
        sample: dict[str, Any] = self._prefill.answer() | self._decode.answer()
        if sample.pop("checksum") != self._prefill.ready["checksum"]:
            raise SystemExit("the cache arrived otherwise")
        return sample


def over_links(kv: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """Raw samples of each link, and medians; the first hand-over of a link is not counted."""
    found = []
    with ExitStack() as stack:
        nodes = Nodes(stack, kv)
        for mbps in LINKS_MBPS:
            samples: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
            for turn in range(rounds + 1):
                for name, codecs in VARIANTS.items():
                    sample = nodes.hand_over(mbps, codecs)
                    if turn:
                        samples[name].append(sample)
            speedups = [
                raw["wall_s"] / packed["wall_s"]
                for raw, packed in zip(samples["raw"], samples["packed"], strict=True)
            ]
            found.append(
                {
                    "mbps": mbps,
                    "rtt_ms": RTT_MS,
                    "speedup": round(median(speedups), 3),
                    "wall_s": {
                        n: round(median(s["wall_s"] for s in v), 4) for n, v in samples.items()
                    },
                    "wire_share": round(
                        median(s["wire_bytes"] / s["kv_bytes"] for s in samples["packed"]), 4
                    ),
                    "samples": samples,
                }
            )
            print({key: value for key, value in found[-1].items() if key != "samples"}, flush=True)
    return found


def beside_streams(kv: np.ndarray, store: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Windows with raw hand-overs, with packed ones and with none, in turn."""
    windows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*VARIANTS, "none")}
    with ExitStack() as stack:
        nodes = Nodes(stack, kv)
        engine = Process(stack, "kv_codec_streams.py", store, threads, STREAMS)
        for turn in range(rounds + 1):
            for name, samples in windows.items():
                engine.ask()
                engine.answer()
                began, done = time.monotonic(), []
                while time.monotonic() - began < WINDOW_S:
                    if name in VARIANTS:
                        done.append(nodes.hand_over(STREAMS_MBPS, VARIANTS[name])["wall_s"])
                    else:
                        time.sleep(WINDOW_S)
                window_s = time.monotonic() - began
                engine.ask()
                steps = engine.answer()
                if turn:
                    samples.append(
                        {
                            "window_s": round(window_s, 3),
                            "hand_overs": len(done),
                            "wall_s": round(median(done), 4) if done else None,
                            "steps": len(steps),
                            "itl_ms": {
                                f"p{p}": round(float(np.percentile(steps, p)), 3)
                                for p in (50, 90, 99)
                            },
                        }
                    )
    alone = median(w["steps"] / w["window_s"] for w in windows["none"])
    found: dict[str, Any] = {"mbps": STREAMS_MBPS, "threads": threads, "streams": STREAMS}
    for name, samples in windows.items():
        found[name] = {
            "itl_ms": {p: median(w["itl_ms"][p] for w in samples) for p in samples[0]["itl_ms"]}
        }
        if name in VARIANTS:
            lost = [(w["window_s"] - w["steps"] / alone) / w["hand_overs"] for w in samples]
            found[name]["lost_ms"] = round(median(lost) * 1e3, 1)
            found[name]["wall_s"] = median(w["wall_s"] for w in samples)
    print(found, flush=True)
    return found | {"windows": windows}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    kv = compute_kv(args.store, args.tokens)
    report = facts(__doc__, ("torch", "numpy")) | {"tokens": args.tokens, "kv_bytes": kv.nbytes}
    report["sizes"] = [size(kv, part, n) for part in (0, 1) for n in PIECE_TOKENS]
    for each in report["sizes"]:
        print(each, flush=True)
    report["links"] = over_links(kv, args.rounds)
    report["beside_streams"] = [
        beside_streams(kv, args.store, threads, args.rounds) for threads in (1, 2)
    ]
    save(report, args.out)


if __name__ == "__main__":
    main()
