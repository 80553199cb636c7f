"""A model over memory: its tensors are views of one allocation, which may be filled later.

Binding looks at no byte of a tensor where the model keeps every tensor as it lies, so it can be
done while the drive still reads. What is bound like that computes nothing before its bundle is
whole: ``registry.load`` alone hands it out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.decoder import DecoderWeights
from kernels.ops import Ops
from kernels.resident import GROUP_BYTES, ResidentMatrix, Weight, group_count, tile_count
from pop_node.models.llama import DTYPES, Llama, LlamaConfig
from pop_node.models.packing import NOTHING_PACKED, as_it_is
from pop_node.store.cuda_resident_arena import UnitMemory
from pop_node.store.load_plan import LoadPlan
from pop_node.store.reading import PlacedBundle, ReadBundle
from pop_node.store.resident_arena import PackedMatrix, ResidentMemory
from pop_node.store.unit_plan import Unit
from wire.errors import ConfigError

Model = Llama

CONFIG_FILE = "config.json"

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types of a bundle (``pop_node.store.dtypes``) as torch knows them."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A model over the memory of a bundle that is still being read: nothing may be computed with it
    yet. ``began`` and ``ended`` are moments of the monotonic clock."""

    model: Model
    placed: PlacedBundle
    began: float
    ended: float


def build_model(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    dtype: str,
    ops: Ops,
    pack: Callable[[torch.Tensor], Weight] = as_it_is,
    packed: Mapping[tuple[str, ...], ResidentMatrix] = NOTHING_PACKED,
) -> Model:
    """A model from the object of its ``config.json`` and its tensors; ``pack`` and ``packed`` as
    ``Llama`` takes them.

    Raises:
        ConfigError: unsupported family or feature, or weights that do not fit.
    """
    return Llama(LlamaConfig.from_hf(config), weights, ops, dtype, pack, packed)


def build_read(
    read: ReadBundle, dtype: str, ops: Ops, pack: Callable[[torch.Tensor], Weight]
) -> Model:
    """The model of a bundle that was read; raises as ``build_model`` does."""
    config = parse_object(read.texts[CONFIG_FILE], read.directory / CONFIG_FILE)
    weights: dict[str, torch.Tensor] = {}
    if isinstance(read.memory, UnitMemory):
        for unit, held in read.memory.plain:
            weights |= views(unit, held)
        return build_model(config, weights, dtype, ops, pack, read.memory.packed)
    if not isinstance(read.memory, ResidentMemory):
        return build_model(config, views(read.plan, tensor_of(read.memory)), dtype, ops, pack)
    for plan, placed in read.memory.placed:
        weights |= views(plan, tensor_of(placed))
    packed = {matrix.names: _resident(matrix) for matrix in read.memory.matrices}
    return build_model(config, weights, dtype, ops, pack, packed)


def _resident(matrix: PackedMatrix) -> ResidentMatrix:
    rows, columns = matrix.shape
    planes = (tile_count(rows), group_count(columns), GROUP_BYTES)
    return ResidentMatrix(
        shape=matrix.shape,
        palette=torch.from_numpy(matrix.palette),
        tiles=torch.from_numpy(matrix.tiles).view(planes),
        starts=torch.from_numpy(matrix.starts),
        escapes=torch.from_numpy(matrix.escapes),
    )


def bind_ahead(placed: PlacedBundle, dtype: str, ops: Ops) -> Bound | None:
    """Bind what is still being read; None where that would look at its tensors (another dtype,
    matrices that are multiplied as one and do not lie back to back) or fails: then it is to be
    bound when it was read, which says what is wrong."""
    began = time.monotonic()
    plan, arena = placed.plan, tensor_of(placed.memory)
    if any(TORCH_DTYPES[tensor.dtype] is not DTYPES.get(dtype) for tensor in plan.tensors):
        return None
    try:
        config = parse_object(placed.texts[CONFIG_FILE], placed.directory / CONFIG_FILE)
        model = build_model(config, views(plan, arena), dtype, ops)
    except ConfigError:
        return None
    if not all(_is_view(weight, arena) for weight in _weights(model.weights)):
        return None
    return Bound(model, placed, began, time.monotonic())


def _is_view(weight: Weight, arena: torch.Tensor) -> bool:
    """Whether what is written to the arena later will be in the weight: it is no copy."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()
    )


def _weights(weights: DecoderWeights) -> Iterator[Weight]:
    yield from (weights.embedding, weights.final_norm, weights.head)
    for layer in weights.layers:
        yield from (layer.attention_norm, layer.qkv, layer.output)
        yield from (layer.mlp_norm, layer.gate_up, layer.down)


def tensor_of(memory: Any) -> torch.Tensor:
    """[bytes] uint8 of an arena as a tensor, without a copy."""
    return memory if isinstance(memory, torch.Tensor) else torch.from_numpy(memory)


def views(plan: LoadPlan | Unit, arena: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of ``plan`` by their names, in ``arena`` [bytes] uint8."""
    found = {}
    for tensor in plan.tensors:
        dtype = TORCH_DTYPES[tensor.dtype]
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        flat = arena[tensor.offset : tensor.offset + nbytes]
        found[tensor.name] = flat.view(dtype).view(tensor.shape)
    return found


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of the file at ``path``. Raises ``ConfigError``."""
    try:
        content = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
    if not isinstance(content, dict):
        raise ConfigError("is not a JSON object", where=str(path))
    return content
