"""The Llama family: pre-norm transformer with grouped-query attention, rotary positions and SwiGLU.

Owns the names of weights and what a family has of its own; the order of operations is that of
``kernels.reference.decoder``, on the operations of an ``Ops`` table or as a whole
where a backend has that. Sequences, blocks and sampling belong to the engine.

Source: Touvron et al., "LLaMA" (2023), section 2.2; "The Llama 3 Herd of Models" (2024),
section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch

from kernels.decoder import Decoder, DecoderLayer, DecoderWeights
from kernels.meta import AttentionMeta
from kernels.ops import Ops
from kernels.reference.decoder import decoder
from kernels.reference.resident import dense
from kernels.resident import ResidentMatrix, Weight
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.models.llama_config import LlamaConfig
from pop_node.models.packing import NOTHING_PACKED, as_it_is
from pop_node.models.rope import cos_sin_table
from pop_node.store.host_memory import aligned_memory
from wire.errors import ConfigError

__all__ = ["Llama", "LlamaConfig"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A buffer that older files carry; it follows from the configuration.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"


def _fused(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of ``parts``, [n_i, H] each, as one matrix: a view where they lie back to back."""
    first = parts[0]
    at = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.untyped_storage().data_ptr() != storage:
            return torch.cat(parts)
        at += part.numel() * part.element_size()
    return first.as_strided((sum(len(part) for part in parts), first.shape[1]), first.stride())


class _WeightReader:
    """Takes named tensors out of a mapping, checking shapes, and knows what was never taken."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        pack: Callable[[torch.Tensor], Weight],
        packed: Mapping[tuple[str, ...], ResidentMatrix],
    ) -> None:
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._pack = pack
        self._packed = packed
        self._taken: set[str] = set()

    def matrix(self, columns: int, parts: Mapping[str, int]) -> Weight:
        """Rows of the tensors ``parts``, so many each, as one matrix in the form that it keeps.

        Raises ConfigError as ``take`` does.
        """
        names = tuple(parts)
        found = self._packed.get(names)
        if found is None:
            return self._pack(_fused([self.take(name, n, columns) for name, n in parts.items()]))
        rows = sum(parts.values())
        if found.shape != (rows, columns):
            self._refuse(" + ".join(names), found.shape, (rows, columns))
        self._taken.update(names)
        return found.to(self._device)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor ``name`` as the model has it. Raises ConfigError: missing or misshapen."""
        tensor = self._weights.get(name)
        if tensor is None and (name,) in self._packed:
            tensor = dense(self._packed[name,])
        if tensor is None:
            raise ConfigError(f"weight {name} is missing", where="model.safetensors")
        if tensor.shape != shape:
            self._refuse(name, tensor.shape, shape)
        self._taken.add(name)
        return tensor.to(self._device, self._dtype).contiguous()

    def leftover(self) -> list[str]:
        """Names that nobody took, sorted."""
        packed = (name for names in self._packed for name in names)
        return sorted(
            name
            for name in (*self._weights, *packed)
            if name not in self._taken and not name.endswith(DERIVED_SUFFIX)
        )

    @staticmethod
    def _refuse(name: str, found: Sequence[int], wanted: Sequence[int]) -> NoReturn:
        raise ConfigError(
            f"weight {name} has shape {tuple(found)}, the configuration says {tuple(wanted)}",
            where="model.safetensors",
        )


class Llama:
    """A loaded model. Stateless between calls: the KV cache is an argument."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, torch.Tensor],
        ops: Ops,
        dtype: str,
        pack: Callable[[torch.Tensor], Weight] = as_it_is,
        packed: Mapping[tuple[str, ...], ResidentMatrix] = NOTHING_PACKED,
    ) -> None:
        """Take ``weights`` (Hugging Face names) and fuse what is multiplied together.

        Args:
            dtype: ``"bfloat16"`` or ``"float32"``, of weights, activations and KV cache.
            pack: gives each matrix the form that it keeps, and may use up what it is given.
            packed: matrices that have it already, by the names of the weights that they are of.

        Raises:
            ConfigError: unknown dtype, or a weight is missing, misshapen or not understood.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not supported", suggestion=f"use {list(DTYPES)}")
        self.config = config
        self.dtype = dtype
        self._ops = ops
        reader = _WeightReader(weights, DTYPES[dtype], ops.device, pack, packed)
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding = reader.matrix(hidden, {"model.embed_tokens.weight": vocab})
        layers = tuple(self._read_layer(reader, i) for i in range(config.layers))
        final_norm = reader.take("model.norm.weight", hidden)
        tied = config.tied_embeddings
        head = embedding if tied else reader.matrix(hidden, {"lm_head.weight": vocab})
        tied_copy = {"lm_head.weight"} if tied else set()
        unknown = [name for name in reader.leftover() if name not in tied_copy]
        if unknown:
            raise ConfigError(
                f"{len(unknown)} weights are not part of a Llama, the first: {unknown[0]}",
                where="model.safetensors",
            )
        self.weights = DecoderWeights(
            embedding=embedding,
            layers=layers,
            final_norm=final_norm,
            head=head,
            cos_sin=cos_sin_table(
                config.context_tokens, config.head_dim, config.rope_theta, config.rope_scaling
            ).to(ops.device),
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            scale=1.0 / math.sqrt(config.head_dim),
        )
        self._decoder: Decoder = (
            partial(decoder, ops, self.weights)
            if ops.decoder is None
            else ops.decoder(self.weights)
        )

    def _read_layer(self, reader: _WeightReader, index: int) -> DecoderLayer:
        c = self.config
        prefix = f"model.layers.{index}"
        q_size, kv_size, inner = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.intermediate_size

        return DecoderLayer(
            attention_norm=reader.take(f"{prefix}.input_layernorm.weight", c.hidden_size),
            qkv=reader.matrix(
                c.hidden_size,
                {
                    f"{prefix}.self_attn.{name}_proj.weight": rows
                    for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size))
                },
            ),
            output=reader.matrix(q_size, {f"{prefix}.self_attn.o_proj.weight": c.hidden_size}),
            mlp_norm=reader.take(f"{prefix}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=reader.matrix(
                c.hidden_size,
                {f"{prefix}.mlp.{name}_proj.weight": inner for name in ("gate", "up")},
            ),
            down=reader.matrix(inner, {f"{prefix}.mlp.down_proj.weight": c.hidden_size}),
        )

    def kv_spec(self) -> KvSpec:
        """One group of all layers: K (after rotation) and V of every token."""
        shape = (self.config.kv_heads, self.config.head_dim)
        components = tuple(KvComponent(name, self.dtype, shape, 0) for name in ("k", "v"))
        return KvSpec((KvGroup("tokens", tuple(range(self.config.layers)), components),))

    def allocate_cache(self, num_blocks: int, block_tokens: int) -> tuple[torch.Tensor, ...]:
        """One tensor per component: [layers, num_blocks, block_tokens, kv_heads, head_dim].

        Zeros; on a CPU they take memory when first touched, little at a time: the first tokens need
        a little of every layer. Raises ``ConfigError`` without room.
        """
        c, dtype = self.config, DTYPES[self.dtype]
        shape = (c.layers, num_blocks, block_tokens, c.kv_heads, c.head_dim)
        device, nbytes = self._ops.device, math.prod(shape) * dtype.itemsize
        if device.type != "cpu":
            try:
                return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in ("k", "v"))
            except torch.OutOfMemoryError as exc:
                raise ConfigError(
                    f"no room on {device} for a KV cache of {2 * nbytes} bytes",
                    suggestion="lower kv_tokens of the node",
                ) from exc
        return tuple(
            torch.from_numpy(aligned_memory(nbytes, huge=False)).view(dtype).view(shape)
            for _ in ("k", "v")
        )

    def forward(
        self,
        ids: torch.Tensor,
        meta: AttentionMeta,
        cache: tuple[torch.Tensor, ...],
        logit_rows: torch.Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Compute one ragged batch, writing the KV of its tokens.

        Args:
            ids: [T] int64 token ids.
            cache: as from ``allocate_cache``.
            logit_rows: [S] int64, the rows of the batch whose next token is wanted.
            on_layer: called with i as soon as layer i's K and V of this batch are in the cache.

        Returns:
            [S, vocab] float32 logits.
        """
        return self._decoder(ids, meta, cache, logit_rows, on_layer)
