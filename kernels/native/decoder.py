"""A decoder on the native kernels: one call into C per step.

Knows the C structures of ``forward/decoder.h`` and the lifetime of what they point to.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, addressof, byref, c_float, c_long, c_void_p
from operator import is_not

import torch

from kernels.decoder import DecoderLayer, DecoderWeights
from kernels.meta import AttentionMeta
from kernels.native.binding import NativeContext
from kernels.native.checks import are_indices, dtype_code, require
from kernels.native.resident import Matrix, Resident, matrix_of
from kernels.resident import Weight

ROOM_TOKENS = 64
"""The workspace grows by so many rows at a time: decode batches of changing size share one."""
ROOM_ROWS = 16
"""And the logits, which are 200 kB a row of a vocabulary of 50,000."""

_OUT_OF_RANGE = -2


class _Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class _Decoder(Structure):
    _fields_ = (
        ("embedding", Matrix),
        ("layers", c_void_p),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("cos_sin", c_void_p),
        *((name, c_long) for name in ("num_layers", "num_positions", "H", "I", "V")),
        *((name, c_long) for name in ("Hq", "Hk", "D")),
        ("eps", c_float),
        ("scale", c_float),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ids", "positions", "slots", "logit_rows")),
        *((name, c_void_p) for name in ("query_starts", "context_lens", "block_tables")),
        *((name, c_void_p) for name in ("k_cache", "v_cache", "workspace", "logits")),
        *((name, c_long) for name in ("T", "S", "R")),
        *((name, c_long) for name in ("table_stride", "block_tokens", "layer_bytes")),
    )


def _layer(layer: DecoderLayer, kept: list[Resident]) -> _Layer:
    weights = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return _Layer(
        *(layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()),
        *(matrix_of(weight, kept) for weight in weights),
    )


def _check(weights: DecoderWeights) -> int:
    """The C code of the weights' dtype. Raises ValueError where shapes or dtypes disagree."""
    w = weights
    vocab, hidden = w.embedding.shape
    shapes: list[tuple[Weight, tuple[int, ...]]]
    shapes = [(w.embedding, (vocab, hidden)), (w.head, (vocab, hidden)), (w.final_norm, (hidden,))]
    query, kv = w.heads * w.head_dim, w.kv_heads * w.head_dim
    for layer in w.layers:
        inner = layer.down.shape[1]
        shapes += [
            (layer.attention_norm, (hidden,)),
            (layer.qkv, (query + 2 * kv, hidden)),
            (layer.output, (hidden, query)),
            (layer.mlp_norm, (hidden,)),
            (layer.gate_up, (2 * inner, hidden)),
            (layer.down, (hidden, inner)),
        ]
        require(inner == w.layers[0].down.shape[1], "decoder")
    for weight, shape in shapes:
        if isinstance(weight, torch.Tensor):
            require(weight.shape == shape and weight.is_contiguous(), "decoder", weight)
        else:
            require(weight.shape == shape, "decoder", weight.tiles)
    require(
        w.cos_sin.shape[1] == w.head_dim
        and w.head_dim % 2 == 0
        and w.cos_sin.dtype is torch.float32
        and w.cos_sin.is_contiguous()
        and w.heads % w.kv_heads == 0,
        *("decoder", w.cos_sin),
    )
    return dtype_code(*(weight for weight, _ in shapes))


class NativeDecoder:
    """One model's weights as C sees them, with memory for a step. Not for two threads at once."""

    def __init__(self, context: NativeContext, weights: DecoderWeights) -> None:
        """Check ``weights`` once, so that steps need not. Raises ValueError where they disagree."""
        self._dtype = _check(weights)
        self._context = context  # as ``_weights`` and ``_layers``: keeps what addresses point to
        self._weights = weights
        self._kept: list[Resident] = []  # as the above
        self._layers = (_Layer * len(weights.layers))(
            *(_layer(layer, self._kept) for layer in weights.layers)
        )
        vocab, hidden = weights.embedding.shape
        self._decoder = _Decoder(
            embedding=matrix_of(weights.embedding, self._kept),
            layers=addressof(self._layers),
            final_norm=weights.final_norm.data_ptr(),
            head=matrix_of(weights.head, self._kept),
            cos_sin=weights.cos_sin.data_ptr(),
            num_layers=len(weights.layers),
            num_positions=len(weights.cos_sin),
            H=hidden,
            I=weights.layers[0].down.shape[1],
            V=vocab,
            Hq=weights.heads,
            Hk=weights.kv_heads,
            D=weights.head_dim,
            eps=weights.norm_eps,
            scale=weights.scale,
        )
        self._step = _Step()
        self._given: tuple[torch.Tensor, ...] = ()  # what the step points to; kept alive by it
        self._rows = torch.empty(0, vocab)
        self._room = 0  # tokens that the workspace has room for
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, vocab)

    def __call__(
        self,
        ids: torch.Tensor,
        meta: AttentionMeta,
        cache: tuple[torch.Tensor, ...],
        logit_rows: torch.Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """See ``kernels.reference.decoder.decoder``; the result is overwritten by the next call.

        Raises:
            ValueError: the batch does not fit the model or its cache.
            MemoryError: no memory for a batch of this size.
        """
        given = (
            *(ids, meta.positions, meta.slots, meta.query_starts, meta.context_lens),
            *(meta.block_tables, logit_rows, *cache),
        )
        # Engines write the steps of a run of decoding into the same tensors.
        if len(given) != len(self._given) or any(map(is_not, given, self._given)):
            self._given = ()
            rows = self._prepare(ids, meta, cache, logit_rows)
            self._rows = self._logits[:rows]
            self._given = given
        last = self._decoder.num_layers
        if on_layer is None:
            self._run(0, last + 1)
        else:
            for layer in range(last):
                self._run(layer, layer + 1)
                on_layer(layer)
            self._run(last, last + 1)
        return self._rows

    def _prepare(
        self,
        ids: torch.Tensor,
        meta: AttentionMeta,
        cache: tuple[torch.Tensor, ...],
        logit_rows: torch.Tensor,
    ) -> int:
        """Fill in the step; returns the number of rows of logits."""
        keys, values = cache
        tokens, rows, tables = len(ids), len(logit_rows), meta.block_tables
        d, w = self._decoder, self._weights
        require(
            keys.shape == values.shape
            and keys.shape[0] == d.num_layers
            and keys.shape[2:] == (meta.block_tokens, w.kv_heads, w.head_dim)
            and keys.dtype is values.dtype is w.embedding.dtype
            and keys.is_contiguous()
            and values.is_contiguous(),
            *("decoder", keys, values),
        )
        require(
            len(meta.positions) == len(meta.slots) == tokens
            and len(meta.query_starts) == len(tables) + 1
            and len(meta.context_lens) == len(tables)
            and tables.stride(1) == 1
            and tables.dtype is torch.int32
            and are_indices(torch.int64, ids, meta.positions, meta.slots, logit_rows)
            and are_indices(torch.int32, meta.query_starts, meta.context_lens),
            *("decoder", ids, meta.positions, meta.slots, meta.query_starts, tables),
        )
        step = self._step
        if tokens > self._room:
            room = -(-tokens // ROOM_TOKENS) * ROOM_TOKENS
            nbytes = self._context.lib.pm_workspace_bytes(self._dtype, byref(d), room)
            self._workspace = torch.empty(nbytes, dtype=torch.uint8)
            step.workspace = self._workspace.data_ptr()
            self._room = room  # only now that there is memory for as much
        if rows > len(self._logits):
            self._logits = torch.empty(-(-rows // ROOM_ROWS) * ROOM_ROWS, d.V)
            step.logits = self._logits.data_ptr()
        step.ids, step.positions = ids.data_ptr(), meta.positions.data_ptr()
        step.slots, step.logit_rows = meta.slots.data_ptr(), logit_rows.data_ptr()
        step.query_starts = meta.query_starts.data_ptr()
        step.context_lens = meta.context_lens.data_ptr()
        step.block_tables, step.table_stride = tables.data_ptr(), tables.stride(0)
        step.k_cache, step.v_cache = keys.data_ptr(), values.data_ptr()
        step.layer_bytes = keys.stride(0) * keys.element_size()
        step.T, step.S, step.R, step.block_tokens = tokens, len(tables), rows, meta.block_tokens
        return rows

    def _run(self, begin: int, end: int) -> None:
        code = self._context.lib.pm_forward(
            *(self._context.handle, self._dtype, byref(self._decoder), byref(self._step)),
            *(begin, end),
        )
        if code == _OUT_OF_RANGE:
            raise ValueError("an id, a position or a row of logits is out of range")
        if code != 0:
            raise MemoryError("no scratch memory for a decoder")
