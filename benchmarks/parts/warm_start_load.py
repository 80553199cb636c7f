"""One load of ``warm_start.py``, in a process that has imported everything before: ours,
three others, and reads that load nothing."""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.cold_pages import CEILINGS, drop_pages, read_direct, touch

TOUCHED = 1.2


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


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
