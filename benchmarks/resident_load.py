"""What packing weights into the resident form costs a load that does it on its way.

    python benchmarks/resident_load.py --store .cache/store-2 --work DIR \\
        --out benchmarks/results/resident_load.json [--gib 1] [--rounds 7]

Each load is the engine's own pipeline in a process that has imported everything: direct reads,
digests, decoding where the bundle is packed, packing, memory included. Forms take turns within a
round, beside a bare read of the same file by as many threads into touched buffers (``drive``).
Models: SmolLM2 of the store, and with ``--gib`` one of an 8B Llama's shapes with fewer layers, of
well-shaped random values. ``image GB/s`` is bytes of the model in 16 bits per second of wall time,
``peak`` the most memory of its own that the process has had more than before. Ratios are medians
over rounds of resident / plain in the same round; the first round warms up and is kept apart. The
store is only read. Direct reads pass the page cache by; ``direct`` says whether the file system
allowed them.
"""

from __future__ import annotations

import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.others import others_cpu_s
from common.report import command_line, facts, save
from common.synthetic_model import prepare

from pop_node.store.direct_file import DirectFile
from pop_node.store.facts import Bundle
from pop_node.store.host_memory import aligned_memory
from pop_node.store.load_plan import plan_load
from pop_node.store.loader import crew_for
from pop_node.store.reading import ReadBundle, read_bundle
from pop_node.store.resident_reading import packer_for, read_resident
from pop_node.store.source import unwatched
from pop_node.store.store import Store

Sample = dict[str, Any]


def peak_mb(reset: bool = False) -> float:
    """Most resident memory of this process since the last ``reset``, MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1e3


def drive(bundle: Bundle) -> Sample:
    """Read the data file and do nothing with it."""
    data = bundle.manifest.data
    count = crew_for(plan_load(bundle.manifest)).readers
    buffers = [aligned_memory(data.chunk_bytes) for _ in range(count)]
    for buffer in buffers:
        buffer[:] = 1
    todo = iter(list(data.spans()))
    began, cpu = time.perf_counter(), time.process_time()

    def work(worker: int) -> None:
        for offset, nbytes in todo:  # under the interpreter's lock, so each span goes to one
            file.read(memoryview(buffers[worker].data)[:nbytes], offset)

    with DirectFile(bundle.path / data.name) as file, ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
        return timed(bundle, began, cpu) | {"direct": file.direct}


def timed(bundle: Bundle, began: float, cpu: float) -> Sample:
    """Since ``began``, and ``cpu`` seconds of this process."""
    wall_s = time.perf_counter() - began
    return {
        "wall_s": wall_s,
        "cpu_s": time.process_time() - cpu,
        "image_gb_per_s": bundle.manifest.data.decoded_bytes / wall_s / 1e9,
        "file_gb_per_s": bundle.manifest.data.nbytes / wall_s / 1e9,
    }


def load(bundle: Bundle, read: Callable[[Path], ReadBundle]) -> Sample:
    """One load by ``read``."""
    gc.collect()
    before = peak_mb(reset=True)
    began, cpu = time.perf_counter(), time.process_time()
    found = read(bundle.path)
    sample = timed(bundle, began, cpu)
    found.hold.close()
    return sample | {
        "direct": found.report.direct,
        "peak_mb": round(peak_mb() - before, 1),
        "phases_s": {name: phase.wall_s for name, phase in found.report.phases.items()},
    }


def measure(bundles: dict[str, Bundle], rounds: int) -> list[dict[str, Sample]]:
    """Samples by kind, a round each; every other one the other way round."""
    packer = packer_for("resident", "bfloat16")
    if packer is None:
        raise RuntimeError("needs native kernels")
    turns: dict[str, Callable[[], Sample]] = {}
    for name, bundle in bundles.items():
        turns |= {
            f"{name} drive": lambda bundle=bundle: drive(bundle),
            f"{name} plain": lambda bundle=bundle: load(bundle, read_bundle),
            f"{name} resident": lambda bundle=bundle: load(
                bundle, lambda path: read_resident(path, packer)
            ),
        }
    samples = []
    for number in range(rounds + 1):
        order = list(turns) if number % 2 else list(turns)[::-1]
        samples.append({kind: turns[kind]() for kind in order})
    return samples


def summary(samples: list[dict[str, Sample]]) -> dict[str, Any]:
    """Medians, and ratios of the two forms."""

    def median(kind: str, key: str) -> float:
        return statistics.median(one[kind][key] for one in samples)

    keys = ("wall_s", "cpu_s", "image_gb_per_s", "file_gb_per_s")
    found: dict[str, Any] = {
        kind: {key: round(median(kind, key), 4) for key in keys} for kind in samples[0]
    }
    for name in {kind.split()[0] for kind in samples[0]}:
        found[f"{name} resident / plain"] = {
            key: round(
                statistics.median(
                    one[f"{name} resident"][key] / one[f"{name} plain"][key] for one in samples
                ),
                3,
            )
            for key in ("wall_s", "cpu_s", "peak_mb")
        }
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps the model of 8B shapes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gib", type=float, help="also a model of 8B shapes of so much")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sources = {"smollm2-135m": Store(arguments.store)}
    if arguments.gib:
        prepare(arguments.work, arguments.gib)
        sources[f"cut-{arguments.gib:g}"] = Store(arguments.work / "store")
    report = facts(__doc__, ["numpy"]) | {"models": {}}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        store = Store(Path(folder))
        for model, source in sources.items():
            store.add(source.get(model).path.resolve().as_uri(), model, None, unwatched)
            store.pack(model, target=f"{model}-packed", progress=unwatched)
            bundles = {"raw": store.get(model), "packed": store.get(f"{model}-packed")}
            others, began = others_cpu_s(), time.perf_counter()
            warm_up, *samples = measure(bundles, arguments.rounds)
            share = (others_cpu_s() - others) / (time.perf_counter() - began)
            report["models"][model] = {
                "image_bytes": bundles["raw"].manifest.data.decoded_bytes,
                "summary": summary(samples),
                "others_cpu_share": round(share, 2),
                "warm_up": warm_up,
                "samples": samples,
            }
            print(model, f"others' CPU share {share:.2f}")
            for kind, row in report["models"][model]["summary"].items():
                print(f"  {kind:26}", *(f"{key} {value:.3f}" for key, value in row.items()))
    save(report, arguments.out)


if __name__ == "__main__":
    main()
