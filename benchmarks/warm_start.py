"""Loading weights from a cold disk: this project's loader, three others, and what the drive can do.

    python benchmarks/warm_start.py --out benchmarks/results/warm_start.json --work DIR
        [--gib 4] [--rounds 3] [--peers SITE]

The model is synthetic: Llama-3.1-8B's shapes in bfloat16 with as many layers as make ``--gib``,
once as one safetensors file and once as a bundle, both in ``--work`` (kept, so a second run starts
at once). Every figure comes from a fresh process that has imported everything it needs; before it
the page cache of all model files is dropped and mincore(2) confirms that no page is resident, so
"cold" means the model's files only, not Python and torch. In each round every contestant runs once,
in turning order.

Memory: a virtual machine may have to ask its host for memory that nobody used lately, which costs
more than the disk (1.3 to 2.1 s/GB of processor time where this was written, against 0.04 s/GB for
memory used before). So each process touches ``TOUCHED`` times the memory that the model needs and
frees it, until that costs no more than ``TOUCHED_S_PER_GBYTE`` (at most ``TOUCHES`` times; each
sample says what it came to), just before it measures, for all loaders alike; ``ours-untouched`` is
ours without that. ``into-memory`` is no ceiling but what the drive gives when 16 threads read into
fresh memory of the model's size, unverified: what is left of the ceiling when data lands in memory
that is in no cache and is touched for the first time.

What was imported is frozen for the collector of garbage, as in our engines: walking all of torch
takes 0.1 s, whoever happens to cause it.

*Load* ends when every page of every tensor was read once (one byte per 4 KiB, for all alike): some
loaders hand out lazily mapped files. *Ceiling*: the best of direct reads of the bundle's data file
by 1, 4 and 16 threads in that round, each into one 4 MiB buffer that was touched before: no memory
but the drive is measured. fio (libaio, direct) joins where it is installed. Ours verifies every
byte; the others verify none. Peak is VmHWM after a reset, less the resident size before the load.
fastsafetensors and runai-model-streamer come from ``--peers``, a directory filled by ``pip install
--no-deps --target``; without it they are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import mmap
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

LOADERS = ("ours", "ours-untouched", "safetensors", "fastsafetensors", "runai")
CEILINGS = {f"direct-{threads}": threads for threads in (1, 4, 16)}
BLOCK = 4 * 1024 * 1024
TOUCHED, TOUCHES, TOUCHED_S_PER_GBYTE = 1.2, 6, 0.065
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256
SEED = 8


# ---- the model ---------------------------------------------------------------------------------


def shapes(gib: float) -> dict[str, tuple[int, ...]]:
    """Tensors of the cut model; less than 3 GiB also cuts the vocabulary."""
    vocab = VOCAB if gib >= 3 else 16384
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "lm_head.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    outside = sum(math.prod(shape) * 2 for shape in found.values())
    per_layer = sum(math.prod(shape) * 2 for shape in layer.values())
    for number in range(max(1, round((gib * 2**30 - outside) / per_layer))):
        found |= {f"model.layers.{number}.{name}.weight": s for name, s in layer.items()}
    return found


def prepare(work: Path, gib: float) -> tuple[Path, Path]:
    """(safetensors file, bundle directory)."""
    from pop_node.store.store import Store

    name = f"cut-{gib:g}"
    source = work / name
    if not (source / "config.json").exists():
        write_source(source, shapes(gib))
    store = Store(work / "store")
    store.add(str(source), name, "bfloat16", lambda *_: None)
    return source / "model.safetensors", store.get(name).path


def write_source(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    import numpy as np

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    rng = np.random.default_rng(SEED)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = math.prod(shape)
            while left:
                part = rng.standard_normal(min(left, 1 << 23), dtype=np.float32)
                file.write((part.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= len(part)
        file.flush()
        os.fsync(file.fileno())
    (folder / "tokenizer.json").write_text("{}")
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in tensors),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": tensors["lm_head.weight"][0],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def drop_pages(paths: list[Path]) -> int:
    """Drop the page cache of files; returns how many of their pages are still resident."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_pages(paths)


def resident_pages(paths: list[Path]) -> int:
    """Pages of files that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = 0
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
                pages = -(-size // mmap.PAGESIZE)
                states = (ctypes.c_ubyte * pages)()
                at = ctypes.c_char.from_buffer(mapping)
                address = ctypes.c_void_p(ctypes.addressof(at))
                if libc.mincore(address, ctypes.c_size_t(size), states):
                    raise OSError(ctypes.get_errno(), "mincore")
                resident += sum(state & 1 for state in states)
                del at
    return resident


def resident_share(paths: list[Path]) -> float:
    """Of the pages of files, how many are in the page cache."""
    return resident_pages(paths) / sum(-(-path.stat().st_size // mmap.PAGESIZE) for path in paths)


# ---- what runs in a process of its own ---------------------------------------------------------


def load_ours(path: Path) -> Callable[[], Any]:
    from kernels.ops import load_ops
    from pop_node.models.registry import load

    ops = load_ops("reference", 1)

    def run() -> Any:
        loaded = load(path, "bfloat16", ops)
        model = loaded.model
        weights = model.weights
        tensors = [weights.embedding, weights.head, weights.final_norm]
        for layer in weights.layers:
            tensors += [layer.qkv, layer.output, layer.gate_up, layer.down]
        return tensors, loaded.phases, model

    return run


def load_safetensors(path: Path) -> Callable[[], Any]:
    from safetensors.torch import load_file

    return lambda: (list(load_file(path).values()), {}, None)


def load_fastsafetensors(path: Path) -> Callable[[], Any]:
    from fastsafetensors import SafeTensorsFileLoader

    def run() -> Any:
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [str(path)]})
        buffers = loader.copy_files_to_device()
        names = [name for names in buffers.key_to_rank_lidx for name in [names]]
        return [buffers.get_tensor(name) for name in names], {}, (loader, buffers)

    return run


def load_runai(path: Path) -> Callable[[], Any]:
    from runai_model_streamer import SafetensorsStreamer

    def run() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path))
            tensors = [tensor for _, tensor in streamer.get_tensors()]
        return tensors, {}, None

    return run


def read_direct(path: Path, threads: int, *, keep: bool = False) -> Callable[[], Any]:
    from pop_node.store.host_arena import aligned_memory

    buffers = [aligned_memory(BLOCK) for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = 1

    def run() -> Any:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        offsets = iter(range(0, os.fstat(fd).st_size, BLOCK))
        lock = threading.Lock()
        memory = aligned_memory(os.fstat(fd).st_size) if keep else None

        def work(buffer: Any) -> None:
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                here = buffer if memory is None else memory[offset : offset + BLOCK]
                os.preadv(fd, [here.data], offset)

        workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        os.close(fd)
        return [], {}, None

    return run


def child(kind: str, path: Path) -> None:
    """Import, then measure; prints one JSON object."""
    import torch

    torch.set_num_threads(1)
    makers = {
        "ours": load_ours,
        "ours-untouched": load_ours,
        "safetensors": load_safetensors,
        "fastsafetensors": load_fastsafetensors,
        "runai": load_runai,
    }
    if kind == "into-memory":
        run = read_direct(path, 16, keep=True)
    else:
        run = read_direct(path, CEILINGS[kind]) if kind in CEILINGS else makers[kind](path)
    files = [file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    resident = drop_pages(files)
    touched = None
    if kind != "ours-untouched" and kind not in CEILINGS:
        touched = touch(int(TOUCHED * sum(file.stat().st_size for file in files)))
    gc.collect()
    gc.freeze()
    before_bytes = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    usage = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    tensors, phases, kept = run()
    handed_over_s = time.monotonic() - began
    for tensor in tensors:  # one byte per page
        tensor.view(torch.uint8).flatten()[::4096].sum()
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    nbytes = sum(tensor.nbytes for tensor in tensors) or path.stat().st_size
    del kept
    found = {
        "resident_pages_before": resident,
        "touch_s_per_gbyte": touched,
        "seconds": seconds,
        "handed_over_s": handed_over_s,
        "nbytes": nbytes,
        "gbytes_per_s": nbytes / seconds / 1e9,
        "cpu_s_per_gbyte": (used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime)
        / (nbytes / 1e9),
        "peak_over_model_mib": (status_bytes("VmHWM") - before_bytes - nbytes) / 2**20,
        "phases": {
            name: {"wall_s": phase.wall_s, "nbytes": phase.nbytes} for name, phase in phases.items()
        },
    }
    print(json.dumps(found))


def touch(nbytes: int) -> float:
    """Use memory and free it until that is cheap, so that what comes next need not be asked for
    from the host; returns the seconds per gigabyte that the last time took."""
    from pop_node.store.host_arena import aligned_memory

    cost = math.inf
    for _ in range(TOUCHES):
        began = time.process_time()
        aligned_memory(nbytes)[::4096] = 1
        cost = (time.process_time() - began) / (nbytes / 1e9)
        if cost < TOUCHED_S_PER_GBYTE:
            break
    return cost


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


# ---- rounds ------------------------------------------------------------------------------------


def once(kind: str, path: Path, peers: Path | None) -> dict[str, Any]:
    paths = [str(Path(__file__).resolve().parents[1]), *([str(peers)] if peers else [])]
    command = [sys.executable, __file__, "--child", kind, "--path", str(path)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["resident_pages_before"]:
        raise RuntimeError(f"{kind}: {found['resident_pages_before']} pages were not dropped")
    return found


def once_fio(path: Path) -> dict[str, Any]:
    command = ["fio", "--name=r", f"--filename={path}", "--rw=read", "--bs=4M", "--direct=1"]
    command += ["--ioengine=libaio", "--iodepth=32", "--readonly", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    return {"gbytes_per_s": read["bw_bytes"] / 1e9, "seconds": read["runtime"] / 1e3}


def summary(samples: dict[str, list[dict[str, Any]]], model_bytes: int) -> dict[str, Any]:
    """Medians, and ratios formed within each round."""
    ceilings = [name for name in samples if name in CEILINGS or name == "fio"]
    rounds = range(len(samples["ours"]))
    best = [max(samples[name][n]["gbytes_per_s"] for name in ceilings) for n in rounds]

    def median(name: str, key: str) -> float:
        return statistics.median(sample[key] for sample in samples[name])

    ours = [sample["gbytes_per_s"] for sample in samples["ours"]]
    loaders = [name for name in LOADERS if name in samples]
    return {
        "model_bytes": model_bytes,
        "ceiling_gbytes_per_s": statistics.median(best),
        "ours_over_ceiling": statistics.median(a / b for a, b in zip(ours, best, strict=True)),
        "ours_over_ceiling_by_round": [a / b for a, b in zip(ours, best, strict=True)],
        "ours_over_into_memory": statistics.median(
            a / b["gbytes_per_s"] for a, b in zip(ours, samples["into-memory"], strict=True)
        ),
        "ours_over": {
            name: statistics.median(
                a / b["gbytes_per_s"] for a, b in zip(ours, samples[name], strict=True)
            )
            for name in loaders[1:]
        },
        "gbytes_per_s": {name: median(name, "gbytes_per_s") for name in samples},
        "cpu_s_per_gbyte": {name: median(name, "cpu_s_per_gbyte") for name in loaders},
        "peak_over_model_mib": {
            name: max(sample["peak_over_model_mib"] for sample in samples[name]) for name in loaders
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--path", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.path)
        return
    if args.out is None or args.work is None:
        parser.error("--out and --work are needed")
    args.work.mkdir(parents=True, exist_ok=True)
    weights, bundle = prepare(args.work, args.gib)
    model_bytes = sum(math.prod(shape) * 2 for shape in shapes(args.gib).values())
    where = {name: bundle if name.startswith("ours") else weights for name in LOADERS}
    where |= dict.fromkeys([*CEILINGS, "into-memory"], bundle / "weights.bin")
    if args.peers is None:
        del where["fastsafetensors"], where["runai"]
    names = [*where, *(["fio"] if shutil.which("fio") else [])]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name == "fio":
                found = once_fio(bundle / "weights.bin")
            else:
                found = once(name, where[name], args.peers)
            samples[name].append(found)
            print(f"{name:16} {found['gbytes_per_s']:.2f} GB/s", flush=True)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    installed = {d.name: d.version for d in distributions(path=[str(args.peers)])}
    report = {
        "what": (__doc__ or "").splitlines()[0],
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "safetensors", "blake3")}
        | (installed if args.peers else {}),
        "gib": args.gib,
        "seed": SEED,
        "load_average": os.getloadavg(),
        "niceness": os.nice(0),
        "summary": summary(samples, model_bytes),
        "samples": samples,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
