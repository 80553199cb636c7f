"""The table of operations that models are written against, and the choice of a backend.

One forward-pass code runs on every backend. Shapes and meaning of each operation are documented
once, at its readable version in ``kernels.reference``.

Batch-invariant operations give a row the same bits in any batch: alone, beside others, in a prefill
chunk of any length, as a decode step, wherever its KV blocks lie, with any number of threads. Then
a model's logits for a token are a function of the tokens before it alone. The bits are the same
within one class: backend, instruction set (native), dtype and form of the weights (Triton);
another class rounds otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.decoder import Decoder, DecoderWeights
from kernels.meta import AttentionMeta
from kernels.native.build import NativeUnavailableError, ensure_library
from kernels.native.ops import NativeOps
from kernels.reference import invariant
from kernels.reference.activation import silu_mul
from kernels.reference.attention import attention
from kernels.reference.linear import linear, logits
from kernels.reference.norm import add_rms_norm, rms_norm
from kernels.reference.penalties import penalize
from kernels.reference.resident import embed
from kernels.reference.rope import rope_kv_write
from kernels.reference.sampling import gumbel_sample
from kernels.resident import Weight
from kernels.triton.available import TritonUnavailableError, find_device

__all__ = ["Backend", "NativeUnavailableError", "Ops", "TritonUnavailableError", "load_ops"]

Backend = Literal["auto", "reference", "native", "triton"]

INVARIANT_SUFFIX = "+batch_invariant"
"""In the name of operations of which batch invariance was asked."""

_CPU = torch.device("cpu")
_Tensor = torch.Tensor
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ops:
    """Operations of one backend.

    ``name`` is for people, e.g. ``native/avx512_bf16``, or ``native/avx512_bf16+batch_invariant``
    where that was asked for. Tensors given to them are on ``device``. ``batch_invariant``: they
    are, asked for or not.
    """

    name: str
    device: torch.device
    batch_invariant: bool
    rms_norm: Callable[[_Tensor, _Tensor, float], _Tensor]
    add_rms_norm: Callable[[_Tensor, _Tensor, _Tensor, float], tuple[_Tensor, _Tensor]]
    embed: Callable[[Weight, _Tensor], _Tensor]
    linear: Callable[[_Tensor, Weight, _Tensor | None], _Tensor]
    rope_kv_write: Callable[
        [_Tensor, _Tensor, _Tensor, _Tensor, AttentionMeta, _Tensor, _Tensor], None
    ]
    attention: Callable[[_Tensor, _Tensor, _Tensor, AttentionMeta, float], _Tensor]
    silu_mul: Callable[[_Tensor], _Tensor]
    logits: Callable[[_Tensor, Weight], _Tensor]
    gumbel_sample: Callable[
        [
            _Tensor,
            Sequence[float],
            Sequence[float],
            Sequence[int],
            Sequence[int],
            Sequence[int],
            Sequence[int] | None,
            Sequence[float] | None,
        ],
        list[int],
    ]
    penalize: Callable[[_Tensor, _Tensor, _Tensor, float, float, float], None]
    decoder: Callable[[DecoderWeights], Decoder] | None = None
    """Computes a decoder as a whole, like ``kernels.reference.decoder`` does operation by
    operation; None where there is no quicker way than that."""
    pack: Callable[[_Tensor, Callable[[int], _Tensor]], Weight] | None = None
    """Makes a matrix smaller, keeping its bits, in memory from the second argument, which is given
    bytes: see ``kernels.native.resident.pack``. None where products with such are no quicker."""
    gate_up: Callable[[_Tensor, Weight], _Tensor] | None = None
    """``silu_mul(linear(x, weight, None))``, bit for bit; None where that is the quickest way."""


def reference_ops(*, batch_invariant: bool = False) -> Ops:
    """The readable torch versions: the oracle, and the fallback where nothing can be compiled.

    Batch-invariant ones have the same bits on every machine. Decode takes 1.2 to 5 times as long
    with them, prefill 12 to 18 times (benchmarks/invariance.py).
    """
    if batch_invariant:
        return Ops(
            name=f"reference{INVARIANT_SUFFIX}",
            device=_CPU,
            batch_invariant=True,
            rms_norm=invariant.rms_norm,
            add_rms_norm=invariant.add_rms_norm,
            embed=embed,
            linear=invariant.linear,
            rope_kv_write=rope_kv_write,
            attention=invariant.attention,
            silu_mul=invariant.silu_mul,
            logits=invariant.product,
            gumbel_sample=gumbel_sample,
            penalize=penalize,
        )
    return Ops(
        name="reference",
        device=_CPU,
        batch_invariant=False,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        embed=embed,
        linear=linear,
        rope_kv_write=rope_kv_write,
        attention=attention,
        silu_mul=silu_mul,
        logits=logits,
        gumbel_sample=gumbel_sample,
        penalize=penalize,
    )


def native_ops(threads: int, isa: str | None = None, *, batch_invariant: bool = False) -> Ops:
    """The compiled CPU versions on a pool of ``threads`` workers, the caller included.

    They have one order of summation for every batch, so invariance costs nothing here: asking for
    it puts it into the name.

    Args:
        isa: instruction set to use; None picks the fastest of this processor.

    Raises:
        ValueError: ``threads`` is below 1.
        NativeUnavailableError: cannot be built, loaded or run here.
    """
    native = NativeOps(ensure_library(), threads, isa)
    return Ops(
        name=f"native/{native.isa}{INVARIANT_SUFFIX if batch_invariant else ''}",
        device=_CPU,
        batch_invariant=True,
        rms_norm=native.rms_norm,
        add_rms_norm=native.add_rms_norm,
        embed=embed,
        linear=native.linear,
        rope_kv_write=native.rope_kv_write,
        attention=native.attention,
        silu_mul=native.silu_mul,
        logits=native.logits,
        gumbel_sample=native.gumbel_sample,
        penalize=native.penalize,
        decoder=native.decoder,
        pack=native.pack,
    )


def triton_ops(*, batch_invariant: bool = False, overlap: bool = False) -> Ops:
    """The Triton kernels and cuBLAS on the current CUDA device; ``overlap`` as ``TritonOps`` takes
    it.

    Also keeps cuBLAS, in this process, from adding up parts of a sum in bfloat16.

    Raises:
        TritonUnavailableError: no device that can run them, or no triton.
    """
    device = find_device()
    from kernels.triton.ops import TritonOps  # needs triton, which is an optional part

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    facts = torch.cuda.get_device_properties(device)
    ops = TritonOps(facts.multi_processor_count, batch_invariant=batch_invariant, overlap=overlap)
    return Ops(
        name=f"triton/sm_{facts.major}{facts.minor}{INVARIANT_SUFFIX if batch_invariant else ''}",
        device=device,
        batch_invariant=batch_invariant,
        rms_norm=ops.rms_norm,
        add_rms_norm=ops.add_rms_norm,
        embed=ops.embed,
        linear=ops.linear,
        rope_kv_write=ops.rope_kv_write,
        attention=ops.attention,
        silu_mul=ops.silu_mul,
        logits=ops.logits,
        gumbel_sample=ops.gumbel_sample,
        penalize=ops.penalize,
        pack=ops.pack,
        gate_up=ops.gate_up,
    )


def load_ops(backend: Backend, threads: int, *, batch_invariant: bool = False) -> Ops:
    """Operations of ``backend``.

    ``auto`` is triton where there is a CUDA device for it, else native if it can be had, else
    reference and a warning.

    Also sets how many threads torch itself uses in this process: ``threads`` for the reference, 1
    beside the native pool, whose workers torch's own would compete with, and beside a GPU.

    Args:
        batch_invariant: promise that a row's bits never depend on its batch (see the module).

    Raises:
        ValueError: ``threads`` is below 1, or the backend is unknown.
        NativeUnavailableError: ``native`` was asked for and cannot be had.
        TritonUnavailableError: likewise, ``triton``.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    if backend not in ("auto", "reference", "native", "triton"):
        raise ValueError(f"unknown backend {backend!r}")
    if backend in ("auto", "triton"):
        try:
            ops = triton_ops(batch_invariant=batch_invariant)
        except TritonUnavailableError as exc:
            if backend == "triton":
                raise
            _logger.debug("no Triton kernels: %s", exc)
        else:
            torch.set_num_threads(1)
            return ops
    if backend != "reference":
        try:
            ops = native_ops(threads, batch_invariant=batch_invariant)
        except NativeUnavailableError as exc:
            if backend == "native":
                raise
            _logger.warning("slow reference kernels in use: native kernels unavailable: %s", exc)
        else:
            torch.set_num_threads(1)
            return ops
    torch.set_num_threads(threads)
    return reference_ops(batch_invariant=batch_invariant)
