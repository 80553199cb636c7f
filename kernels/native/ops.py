"""The native operations as functions of tensors: same signatures as ``kernels.reference``.

Each call checks what would make the C code read out of bounds, allocates its result and hands over
addresses. Tensors are float32 or bfloat16 on the CPU; rows are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Array, byref, c_float, c_int64, c_uint32, c_uint64
from pathlib import Path
from typing import Any

import torch

from kernels.decoder import DecoderWeights
from kernels.meta import AttentionMeta
from kernels.native.binding import NativeContext
from kernels.native.checks import are_indices, dtype_code, require
from kernels.native.decoder import NativeDecoder
from kernels.native.resident import pack, resident_of
from kernels.reference.sampling import min_p_limit
from kernels.resident import Weight


def _done(code: int) -> None:
    if code != 0:
        raise MemoryError("no scratch memory for a native operation")


def _is_rows_of_heads(x: torch.Tensor) -> bool:
    """[T, heads, D] whose heads lie side by side; rows may be apart (a slice of fused QKV)."""
    return x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


class _Arrays:
    """C arrays of settings that come again and again. A tuple is known by what it is, as it cannot
    have changed; it is kept, so that no other takes its place in memory."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Sequence[Any], Array[Any]]] = {}

    def of(
        self,
        name: str,
        kind: type[Any],
        values: Sequence[Any],
        each: Callable[[Any], Any] | None = None,
    ) -> Array[Any]:
        """``values`` as a C array, each changed by ``each``; ``name`` tells settings apart."""
        made = self._made.get(name)
        if made is not None and made[0] is values:
            return made[1]
        array: Array[Any] = (kind * len(values))(*(values if each is None else map(each, values)))
        if isinstance(values, tuple):
            self._made[name] = values, array
        return array


class NativeOps:
    """Operations bound to one ``context``. Calls from several threads take turns on its pool."""

    def __init__(self, library: Path, threads: int, isa: str | None = None) -> None:
        """Open ``library``; see ``NativeContext`` for arguments and errors."""
        self.context = NativeContext(library, threads, isa)
        self.isa = self.context.isa
        self._handle = self.context.handle
        lib = self.context.lib
        self._linear = lib.pm_linear
        self._resident_linear = lib.pm_resident_linear
        self._norm = lib.pm_norm
        self._silu_mul = lib.pm_silu_mul
        self._rope_kv_write = lib.pm_rope_kv_write
        self._attention = lib.pm_attention
        self._sample = lib.pm_sample
        self._penalize = lib.pm_penalize
        self._arrays = _Arrays()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See ``kernels.reference.norm.rms_norm``."""
        code = dtype_code(x, weight)
        rows, hidden = x.shape
        require(weight.shape == (hidden,), "rms_norm", x, weight)
        x = x.contiguous()
        out = torch.empty_like(x)
        _done(
            self._norm(
                *(self._handle, code, x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None),
                *(rows, hidden, eps),
            )
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``kernels.reference.norm.add_rms_norm``."""
        code = dtype_code(x, residual, weight)
        rows, hidden = x.shape
        require(
            weight.shape == (hidden,) and residual.shape == x.shape, "add_rms_norm", x, residual
        )
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        _done(
            self._norm(
                *(self._handle, code, x.data_ptr(), residual.data_ptr(), weight.data_ptr()),
                *(out.data_ptr(), total.data_ptr(), rows, hidden, eps),
            )
        )
        return out, total

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """See ``kernels.reference.linear.linear``; ``weight`` may be in the resident form."""
        code = dtype_code(x, weight) if bias is None else dtype_code(x, weight, bias)
        return self._multiply(code, x, weight, bias, x.new_empty(x.shape[0], weight.shape[0]))

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``kernels.reference.linear.logits``; ``weight`` may be in the resident form."""
        out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
        return self._multiply(dtype_code(x, weight), x, weight, None, out)

    def _multiply(
        self,
        code: int,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        rows, depth = x.shape
        columns = weight.shape[0]
        require(weight.shape[1] == depth, "linear", x)
        if bias is not None:
            require(bias.shape == (columns,) and bias.is_contiguous(), "linear", bias)
        x = x.contiguous()
        more = (
            *(None if bias is None else bias.data_ptr(), out.data_ptr()),
            *(rows, columns, depth, out.dtype is torch.float32),
        )
        if isinstance(weight, torch.Tensor):
            require(weight.is_contiguous(), "linear", x, weight)
            _done(self._linear(self._handle, code, x.data_ptr(), weight.data_ptr(), *more))
        else:
            resident = resident_of(weight)
            _done(self._resident_linear(self._handle, x.data_ptr(), byref(resident), *more))
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See ``kernels.reference.activation.silu_mul``."""
        code = dtype_code(gate_up)
        rows, double = gate_up.shape
        require(double % 2 == 0, "silu_mul", gate_up)
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(rows, double // 2)
        _done(
            self._silu_mul(
                self._handle, code, gate_up.data_ptr(), out.data_ptr(), rows, double // 2
            )
        )
        return out

    def rope_kv_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: AttentionMeta,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        """See ``kernels.reference.rope.rope_kv_write``."""
        code = dtype_code(q, k, v, k_cache, v_cache)
        rows, query_heads, width = q.shape
        kv_heads = k.shape[1]
        require(
            all(map(_is_rows_of_heads, (q, k, v)))
            and k.shape == v.shape == (rows, kv_heads, width)
            and width % 2 == 0
            and k_cache.shape[2:] == v_cache.shape[2:] == k.shape[1:]
            and k_cache.is_contiguous()
            and v_cache.is_contiguous()
            and cos_sin.shape[1] == width
            and cos_sin.dtype is torch.float32
            and cos_sin.is_contiguous()
            and meta.positions.shape[0] == meta.slots.shape[0] == rows
            and are_indices(torch.int64, meta.positions, meta.slots),
            "rope_kv_write",
            *(q, k, v, cos_sin, k_cache, v_cache),
        )
        _done(
            self._rope_kv_write(
                *(self._handle, code, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0)),
                *(v.data_ptr(), v.stride(0), cos_sin.data_ptr()),
                *(meta.positions.data_ptr(), meta.slots.data_ptr()),
                *(k_cache.data_ptr(), v_cache.data_ptr(), rows, query_heads, kv_heads, width),
            )
        )

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        scale: float,
    ) -> torch.Tensor:
        """See ``kernels.reference.attention.attention``."""
        code = dtype_code(q, k_cache, v_cache)
        rows, query_heads, width = q.shape
        _, block_tokens, kv_heads, _ = k_cache.shape
        require(
            _is_rows_of_heads(q)
            and k_cache.shape == v_cache.shape
            and k_cache.shape[3] == width
            and query_heads % kv_heads == 0
            and k_cache.is_contiguous()
            and v_cache.is_contiguous()
            and meta.block_tables.stride(1) == 1
            and meta.block_tables.dtype is torch.int32
            and are_indices(torch.int32, meta.query_starts, meta.context_lens)
            and meta.block_tokens == block_tokens,
            "attention",
            *(q, k_cache, v_cache),
        )
        out = q.new_empty(rows, query_heads, width)
        tables = meta.block_tables
        _done(
            self._attention(
                *(self._handle, code, q.data_ptr(), q.stride(0)),
                *(k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr()),
                *(meta.query_starts.data_ptr(), meta.context_lens.data_ptr(), tables.data_ptr()),
                *(tables.stride(0), tables.shape[0], query_heads, kv_heads, width),
                *(block_tokens, scale),
            )
        )
        return out

    def pack(self, weight: torch.Tensor, allocate: Callable[[int], torch.Tensor]) -> Weight:
        """See ``kernels.native.resident.pack``."""
        return pack(self.context, weight, allocate)

    def decoder(self, weights: DecoderWeights) -> NativeDecoder:
        """``weights`` as a decoder on this context: ``kernels.reference.decoder`` in one call."""
        return NativeDecoder(self.context, weights)

    def gumbel_sample(
        self,
        logits: torch.Tensor,
        temperature: Sequence[float],
        top_p: Sequence[float],
        seed: Sequence[int],
        choice: Sequence[int],
        index: Sequence[int],
        top_k: Sequence[int] | None = None,
        min_p: Sequence[float] | None = None,
    ) -> list[int]:
        """See ``kernels.reference.sampling.gumbel_sample``."""
        rows, vocab = logits.shape
        wanted = temperature, top_p, seed, choice, index
        asked = [each for each in (top_k, min_p) if each is not None]
        require(
            {len(each) for each in (*wanted, *asked)} == {rows} and logits.dtype is torch.float32,
            "gumbel_sample",
            logits,
        )
        logits = logits.contiguous()
        out = (c_int64 * rows)()
        of = self._arrays.of
        _done(
            self._sample(
                *(self._handle, logits.data_ptr(), rows, vocab),
                *(of("temperature", c_float, temperature), of("top_p", c_float, top_p)),
                *(of("seed", c_uint64, seed), of("choice", c_uint32, choice)),
                (c_uint32 * rows)(*index),
                None if top_k is None else of("top_k", c_uint32, top_k),
                None if min_p is None else of("min_p", c_float, min_p, min_p_limit),
                out,
            )
        )
        return list(out)

    def penalize(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        counts: torch.Tensor,
        repetition: float,
        frequency: float,
        presence: float,
    ) -> None:
        """See ``kernels.reference.penalties.penalize``."""
        require(
            logits.dim() == 1
            and logits.is_contiguous()
            and logits.dtype is torch.float32
            and ids.shape == counts.shape == (len(ids),)
            and ids.dtype is counts.dtype is torch.int32
            and ids.is_contiguous()
            and counts.is_contiguous()
            and (len(ids) == 0 or (int(ids.min()) >= 0 and int(ids.max()) < len(logits))),
            "penalize",
            *(logits, ids, counts),
        )
        _done(
            self._penalize(
                *(self._handle, logits.data_ptr(), ids.data_ptr(), counts.data_ptr(), len(ids)),
                *(repetition, frequency, presence),
            )
        )
