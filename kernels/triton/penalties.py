"""Penalties on tokens that were there before; every term is defined in
``kernels.reference.penalties``.

Roofline: 16 bytes per token that was there, some of them apart from each other; a launch's latency
for all that a context holds. Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, ceil_div, require

BLOCK = 1024
"""Tokens of one program. Guess."""


@triton.jit(do_not_specialize=["entries"])
def penalize_kernel(
    logits_ptr, ids_ptr, counts_ptr, entries, repetition, frequency, presence, BLOCK: tl.constexpr
):
    """Change the logits of BLOCK tokens, in float64 and rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < entries
    token = tl.load(ids_ptr + at, mask=held, other=0).to(tl.int64)  # [BLOCK]
    count = tl.load(counts_ptr + at, mask=held, other=0)  # [BLOCK]
    logit = tl.load(logits_ptr + token, mask=held, other=0.0).to(tl.float64)  # [BLOCK]
    zero = tl.zeros((BLOCK,), tl.float32)  # parameters are float32 numbers
    factor = (zero + repetition).to(tl.float64)
    logit = tl.where(logit > 0.0, logit / factor, logit * factor)
    less = (zero + frequency).to(tl.float64) * count.to(tl.float64)
    less += tl.where(count > 0, (zero + presence).to(tl.float64), 0.0)
    tl.store(logits_ptr + token, (logit - less).to(tl.float32), mask=held)


def plan_penalize(
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: float,
    frequency: float,
    presence: float,
) -> Launch:
    """See ``kernels.reference.penalties.penalize``. Raises ``ValueError``: shapes or dtypes do not
    fit."""
    require(
        logits.dim() == 1
        and logits.is_contiguous()
        and logits.dtype is torch.float32
        and ids.shape == counts.shape == (len(ids),)
        and ids.dtype is counts.dtype is torch.int32
        and ids.is_contiguous()
        and counts.is_contiguous(),
        "penalize",
        *(logits, ids, counts),
    )
    arguments: dict[str, torch.Tensor | int | float] = {
        "logits_ptr": logits,
        "ids_ptr": ids,
        "counts_ptr": counts,
        "entries": len(ids),
        "repetition": repetition,
        "frequency": frequency,
        "presence": presence,
    }
    return Launch(penalize_kernel, (ceil_div(len(ids), BLOCK),), arguments, {"BLOCK": BLOCK})


def penalize(
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """See ``kernels.reference.penalties.penalize``."""
    device = logits.device
    if len(ids):
        on_device = ids.to(device), counts.to(device)
        plan_penalize(logits, *on_device, repetition, frequency, presence).run()
