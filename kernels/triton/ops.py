"""The Triton operations with the signatures of ``kernels.reference``, bound to one device."""

from __future__ import annotations

from functools import partial

import torch

from kernels.meta import AttentionMeta
from kernels.resident import Weight
from kernels.triton import few_rows
from kernels.triton.activation import silu_mul
from kernels.triton.attention import attention
from kernels.triton.linear import invariant_linear, invariant_logits, linear, logits
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.penalties import penalize
from kernels.triton.resident_ops import ResidentOps
from kernels.triton.rope import rope_kv_write
from kernels.triton.sampling import gumbel_sample


class TritonOps:
    """Operations for a device with ``multiprocessors``, batch-invariant if asked for; with
    ``overlap`` kernels of a decode step start while those before end (``kernels.triton.overlap``),
    which has not been measured yet."""

    rms_norm = staticmethod(rms_norm)
    silu_mul = staticmethod(silu_mul)
    gumbel_sample = staticmethod(gumbel_sample)
    penalize = staticmethod(penalize)

    def __init__(
        self, multiprocessors: int, *, batch_invariant: bool = False, overlap: bool = False
    ) -> None:
        self._multiprocessors = multiprocessors
        self._batch_invariant = batch_invariant
        self._overlap = overlap
        self.add_rms_norm = partial(add_rms_norm, overlap=overlap)
        self.rope_kv_write = partial(rope_kv_write, overlap=overlap)
        if batch_invariant:
            self.dense_linear, self.dense_logits = invariant_linear, invariant_logits
        else:
            self.dense_linear = partial(linear, overlap=overlap)
            self.dense_logits = partial(logits, overlap=overlap)
        self._resident = ResidentOps(batch_invariant=batch_invariant)
        self.pack = self._resident.pack

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        """See ``kernels.reference.resident.embed``."""
        if isinstance(weight, torch.Tensor):
            return weight[ids]
        return self._resident.embed(weight, ids)

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """See ``kernels.reference.linear.linear``."""
        if isinstance(weight, torch.Tensor):
            return self.dense_linear(x, weight, bias)
        return self._resident.linear(x, weight, bias)

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``kernels.reference.linear.logits``."""
        if isinstance(weight, torch.Tensor):
            return self.dense_logits(x, weight)
        return self._resident.logits(x, weight)

    def gate_up(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``kernels.ops.Ops.gate_up``."""
        if (
            isinstance(weight, torch.Tensor)
            and not self._batch_invariant
            and few_rows.fits(x, weight)
        ):
            return few_rows.gate_up(x, weight, overlap=self._overlap)
        return silu_mul(self.linear(x, weight, None))

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
            overlap=self._overlap,
        )
