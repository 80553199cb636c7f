"""From files to a model: the table of families, reading weights, choosing kernels.

Weights come from bundles of the store or from safetensors: neither can carry code, so pickled files
are refused.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernels.ops import Backend, NativeUnavailableError, Ops, TritonUnavailableError, load_ops
from pop_node.engine.config import WeightForm
from pop_node.models.binding import (
    CONFIG_FILE,
    Bound,
    Model,
    build_model,
    build_read,
    parse_object,
    tensor_of,
    views,
)
from pop_node.models.llama import LlamaConfig
from pop_node.models.packing import Packer, as_it_is
from pop_node.models.rope import cos_sin_table
from pop_node.store.cuda_arena import CudaArena
from pop_node.store.cuda_resident_arena import CudaResidentArena
from pop_node.store.holding import Hold, mark_used
from pop_node.store.host_arena import HostArena
from pop_node.store.load_clock import Phase
from pop_node.store.loader import LoadReport
from pop_node.store.manifest import Manifest
from pop_node.store.reading import MakeArena, ReadBundle, is_bundle, read_bundle, read_share
from pop_node.store.resident_reading import packer_for, read_resident
from pop_node.store.unit_plan import plan_units
from pop_node.store.weight_choice import Shape
from wire.errors import ConfigError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A real index of the largest open models has about 100k entries in 10 MB; config.json is 1 kB.
MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with what is known about its load.

    ``phases``: ``read``, ``verify``, ``decode`` (striped columns put in order), ``pack`` (into the
    resident form), ``to_device`` and ``bind``, as far as they took place; empty for a plain
    directory. ``hold`` keeps the bundle from being collected; whoever serves the model keeps it.
    """

    model: Model
    phases: dict[str, Phase] = field(default_factory=dict)
    hold: Hold | None = None


def load_backend(backend: Backend, threads: int, *, batch_invariant: bool = False) -> Ops:
    """``kernels.ops.load_ops`` with this project's errors.

    Raises:
        ConfigError: the backend cannot be had on this machine, or an argument is impossible.
    """
    try:
        return load_ops(backend, threads, batch_invariant=batch_invariant)
    except NativeUnavailableError as exc:
        raise ConfigError(
            f"backend {backend!r} cannot be used: {exc}",
            suggestion="install a C compiler (cc, gcc or clang), or use backend 'auto'",
        ) from exc
    except TritonUnavailableError as exc:
        raise ConfigError(
            f"backend {backend!r} cannot be used: {exc}",
            suggestion="install popmesh[gpu] on a machine with a CUDA device, or use 'auto'",
        ) from exc
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc


def prepare(directory: Path) -> None:
    """Compute what ``load`` will need and what follows from the configuration alone, while the
    weights are still being read. What is wrong with it, ``load`` will say: it trusts nothing here.
    """
    with suppress(ConfigError):
        config = LlamaConfig.from_hf(_read_json(directory / CONFIG_FILE))
        cos_sin_table(
            config.context_tokens, config.head_dim, config.rope_theta, config.rope_scaling
        )


def load(
    directory: Path,
    dtype: str,
    ops: Ops,
    read: ReadBundle | None = None,
    form: WeightForm = "plain",
    bound: Bound | None = None,
    plain: Collection[Shape] = (),
) -> Loaded:
    """Load the bundle in ``directory``, or a plain Hugging Face directory: ``config.json`` and
    safetensors, sharded or not. ``read``: the bundle, if it was read already.
    ``form``: of its matrices in memory. ``bound``: what was bound while it was read, used if it
    was read to there. ``plain``: shapes of matrices that stay as they are in any form.

    Of a bundle every byte is verified before it is used. Its tensors are views of one allocation,
    and it stays held. One that is still arriving is loaded meanwhile, wherever it goes.

    Raises:
        ConfigError: a file is missing, damaged, not safetensors or not supported, or ``ops`` cannot
            compute with ``form``.
    """
    whole = read is not None or is_bundle(directory)
    pack = Packer(ops, release=whole, plain=plain) if form == "resident" else as_it_is
    if not whole:
        config = _read_json(directory / CONFIG_FILE)
        return Loaded(build_model(config, read_weights(directory), dtype, ops, pack))
    if read is None:
        read = _read(directory, dtype, ops, form, plain)
    try:
        if bound is None or bound.placed.memory is not read.memory:
            began = time.monotonic()
            model = build_read(read, dtype, ops, pack)
            ended = time.monotonic()
        else:
            model, began, ended = bound.model, bound.began, bound.ended
        mark_used(read.directory)
    except BaseException:
        read.hold.close()
        raise
    nbytes = sum(entry.nbytes for entry in read.manifest.tensors)
    bind = Phase(ended - began, nbytes, began, ended)
    return Loaded(model, {**read.report.phases, "bind": bind}, read.hold)


def load_model(
    directory: Path,
    dtype: str,
    ops: Ops,
    form: WeightForm = "plain",
    plain: Collection[Shape] = (),
) -> Model:
    """The model of ``load``, not held: for one who knows that its files stay. Raises as it does."""
    loaded = load(directory, dtype, ops, form=form, plain=plain)
    if loaded.hold is not None:
        loaded.hold.close()
    return loaded.model


def load_weights(
    directory: Path, manifest: Manifest, device: torch.device, rank: int = 0, ranks: int = 1
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Tensors of the bundle in ``directory`` on ``device``, all verified: views of one allocation.

    With ``ranks`` > 1, which must divide the bundle's stripes, the share of ``rank`` of each.

    Raises:
        ConfigError: a chunk is missing or damaged, or there is no memory.
    """
    plan, memory, report = read_share(directory, manifest, rank, ranks, _arena(device))
    return views(plan, tensor_of(memory)), report


def _read(
    directory: Path, dtype: str, ops: Ops, form: WeightForm, plain: Collection[Shape]
) -> ReadBundle:
    """The bundle, where a model in ``form`` is made of it; nothing was measured on a device, so
    there no shape is ``plain``."""
    if ops.device.type == "cpu":
        packer = packer_for(form, dtype)
        if packer is not None:
            return read_resident(directory, packer, plain=plain)
    elif form == "resident" and dtype == "bfloat16" and ops.pack is not None:
        arena = partial(CudaResidentArena, device=ops.device, pack=ops.pack)
        return read_bundle(directory, arena, plan=plan_units)
    return read_bundle(directory, _arena(ops.device))


def _arena(device: torch.device) -> MakeArena:
    """Where a model for ``device`` is read to: where it stays."""
    return HostArena if device.type == "cpu" else partial(CudaArena, device=device)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory, memory-mapped: pages are read when first touched.

    Raises:
        ConfigError: no safetensors, a shard is missing or damaged, or a path leaves the directory.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping: iterating it fails)
                    if name in weights:
                        raise ConfigError(f"tensor {name} is in two files", where=str(path))
                    weights[name] = tensors.get_tensor(name)
        except (OSError, SafetensorError) as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
    return weights


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.exists():
        raise ConfigError(
            f"no {WEIGHTS_FILE} and no {INDEX_FILE}",
            where=str(directory),
            suggestion="convert the model to safetensors; pickled weights are never read",
        )
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ConfigError("weight_map is not a table of file names", where=str(index))
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{name!r} is not the name of a safetensors file", where=str(index))
    return [directory / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"is larger than {MAX_JSON_BYTES} bytes", where=str(path))
        return parse_object(path.read_bytes(), path)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
