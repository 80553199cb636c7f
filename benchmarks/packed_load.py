"""What a packed bundle costs and saves when it is loaded, against the raw one of the same model.

    python benchmarks/packed_load.py --store .cache/store-2 \\
        --out benchmarks/results/packed_load.json [--model smollm2-135m] [--rounds 7]

The store is only read; both bundles are made in ``--scratch``, which should be on the drive that
counts. Each load is the engine's own pipeline (direct reads, digest, decode, to where it stays) in
a process that has imported everything, raw and packed in turns within a round, so that a slow
minute of a shared machine hits both. ``image GB/s`` is bytes of the model as it is used per second
of wall time, ``CPU`` processor seconds of all threads; ratios are medians over rounds of packed /
raw in the same round. The first round warms up and is kept apart. Direct reads pass the page cache
by; ``direct`` says whether the file system allowed them.

SmolLM2's weights in the store were quantised once: for sizes of natural bfloat16 see
``benchmarks/codec.py``. ``wire_s``: what a peer or an origin sends, as stored, in seconds at the
given rates.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common.report import command_line, facts, save

from pop_node.store.facts import Bundle
from pop_node.store.pack_table import class_rows
from pop_node.store.reading import read_share
from pop_node.store.source import unwatched
from pop_node.store.store import Store

LINKS_MBPS = (100, 500, 1000, 10_000)


def load(bundle: Bundle) -> tuple[dict[str, Any], Any]:
    """Sample of one load, and the memory it filled."""
    began, cpu = time.perf_counter(), time.process_time()
    _, memory, report = read_share(bundle.path, bundle.manifest)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "image_gb_per_s": bundle.manifest.data.decoded_bytes / wall_s / 1e9,
        "direct": report.direct,
        "phases_s": {name: phase.wall_s for name, phase in report.phases.items()},
    }, memory


def measure(raw: Bundle, packed: Bundle, rounds: int) -> list[dict[str, Any]]:
    """A round of samples each; raises ``RuntimeError`` if the two are not the same bytes."""
    samples = []
    for number in range(rounds + 1):
        pair = {"raw": raw, "packed": packed}
        order = ("raw", "packed") if number % 2 else ("packed", "raw")
        found, memories = {}, []
        for name in order:
            found[name], memory = load(pair[name])
            memories.append(memory)
        if not np.array_equal(*memories):
            raise RuntimeError("the packed bundle does not load to the bytes of the raw one")
        samples.append(found)
    return samples


def ratios(samples: list[dict[str, Any]], key: str) -> float:
    """Median of packed / raw."""
    return statistics.median(one["packed"][key] / one["raw"][key] for one in samples)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        store = Store(Path(folder))
        source = Store(arguments.store).get(arguments.model).path.resolve().as_uri()
        store.add(source, "raw", None, unwatched)
        began, cpu = time.perf_counter(), time.process_time()
        made = store.pack("raw", target="packed", progress=unwatched)
        pack = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
        raw, packed = store.get("raw"), store.get("packed")
        warm_up, *samples = measure(raw, packed, arguments.rounds)
    data = packed.manifest.data
    stored = {"raw": data.decoded_bytes, "packed": data.nbytes}
    report = facts(__doc__, ["numpy"]) | {
        "model": arguments.model,
        "identity": packed.manifest.identity,
        "bytes": stored | {"ratio": data.nbytes / data.decoded_bytes},
        "classes": {
            row.name: {
                "bits_per_weight": row.bits_per_weight,
                "limit_bits_per_weight": row.limit_bits_per_weight,
            }
            for row in class_rows(made.manifest, made.pieces)
        },
        "pack": pack,
        "wire_s": {
            f"{mbps} Mbit/s": {name: 8 * nbytes / mbps / 1e6 for name, nbytes in stored.items()}
            for mbps in LINKS_MBPS
        },
        "packed_by_raw": {key: ratios(samples, key) for key in ("wall_s", "cpu_s")},
        "medians": {
            name: {
                key: statistics.median(one[name][key] for one in samples)
                for key in ("wall_s", "cpu_s", "image_gb_per_s")
            }
            for name in ("raw", "packed")
        },
        "warm_up": warm_up,
        "samples": samples,
    }
    save(report, arguments.out)
    for name, medians in report["medians"].items():
        print(
            f"{name:6} {stored[name] / 1e6:.0f} MB  {medians['image_gb_per_s']:.2f} image GB/s  "
            f"{medians['wall_s']:.3f} s  {medians['cpu_s']:.3f} CPU s"
        )
    wall, cpu_ratio = report["packed_by_raw"]["wall_s"], report["packed_by_raw"]["cpu_s"]
    print(f"packed / raw: wall {wall:.2f}, CPU {cpu_ratio:.2f}")


if __name__ == "__main__":
    main()
