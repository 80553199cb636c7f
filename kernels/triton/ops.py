"""The Triton operations with the signatures of ``kernels.reference``, bound to one device."""

from __future__ import annotations

import torch

from kernels.meta import AttentionMeta
from kernels.triton import few_rows
from kernels.triton import linear as linear_kernels
from kernels.triton.activation import silu_mul
from kernels.triton.attention import attention
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.penalties import penalize
from kernels.triton.rope import rope_kv_write
from kernels.triton.sampling import gumbel_sample


class TritonOps:
    """Operations for a device with ``multiprocessors``, batch-invariant if asked for."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    rope_kv_write = staticmethod(rope_kv_write)
    silu_mul = staticmethod(silu_mul)
    gumbel_sample = staticmethod(gumbel_sample)
    penalize = staticmethod(penalize)

    def __init__(self, multiprocessors: int, *, batch_invariant: bool = False) -> None:
        self._multiprocessors = multiprocessors
        self._batch_invariant = batch_invariant
        chosen = linear_kernels
        self.linear = chosen.invariant_linear if batch_invariant else chosen.linear
        self.logits = chosen.invariant_logits if batch_invariant else chosen.logits

    def gate_up(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See ``kernels.ops.Ops.gate_up``."""
        if self._batch_invariant or not few_rows.fits(x, weight):
            return silu_mul(self.linear(x, weight, None))
        return few_rows.gate_up(x, weight)

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        scale: float,
        *,
        window: int | None = None,
        chunk: int | None = None,
    ) -> torch.Tensor:
        """See ``kernels.reference.attention.attention``."""
        return attention(
            q,
            k_cache,
            v_cache,
            meta,
            scale,
            window=window,
            chunk=chunk,
            multiprocessors=self._multiprocessors,
            batch_invariant=self._batch_invariant,
        )
