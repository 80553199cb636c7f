"""In which order a family wants its tensors stored, and along which axis each may be cut.

Facts about forward passes for the store, which knows no model: the order of first use, so that what
is needed first is read first; which tensors are multiplied as one and so lie back to back, so that
the fused matrix is a view; and the axis along which tensor parallelism cuts each. Needs no torch.
Source: Shoeybi et al., "Megatron-LM" (2019), section 3: columns first, then rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_STRIPES = 8
"""Ranks of the largest machine that a model is cut for: 8 accelerators share one fast link."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that lie back to back; ``axes[i]`` cuts ``names[i]``, None: every rank needs all."""

    names: tuple[str, ...]
    axes: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class StorageOrder:
    """``units`` in the order of use; ``stripes``: parts that each cut tensor consists of."""

    units: tuple[Unit, ...]
    stripes: int


def storage_order(config: Mapping[str, Any]) -> StorageOrder:
    """What the model of this ``config.json`` asks for; nothing for families not known here."""
    if config.get("model_type") != "llama":
        return StorageOrder((), 1)
    heads: Any = config.get("num_attention_heads")
    kv_heads: Any = config.get("num_key_value_heads") or heads
    inner: Any = config.get("intermediate_size")
    layers: Any = config.get("num_hidden_layers")
    if any(type(size) is not int or size < 1 for size in (heads, kv_heads, inner, layers)):
        return StorageOrder((), 1)  # the configuration's own checks say what is wrong
    stripes = math.gcd(MAX_STRIPES, heads, inner)
    return StorageOrder(_llama(layers, 0 if kv_heads % stripes == 0 else None), stripes)


def _llama(layers: int, kv_axis: int | None) -> tuple[Unit, ...]:
    """Heads and inner neurons are cut: rows of what makes them, columns of what takes them."""
    units = [Unit(("model.embed_tokens.weight",), (0,))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = [f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"]
        units += [
            Unit((prefix + "input_layernorm.weight",), (None,)),
            Unit(tuple(attention), (0, kv_axis, kv_axis)),
            Unit((prefix + "self_attn.o_proj.weight",), (1,)),
            Unit((prefix + "post_attention_layernorm.weight",), (None,)),
            Unit((prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"), (0, 0)),
            Unit((prefix + "mlp.down_proj.weight",), (1,)),
        ]
    units += [Unit(("model.norm.weight",), (None,)), Unit(("lm_head.weight",), (0,))]
    return tuple(units)
