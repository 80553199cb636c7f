"""Sampling that any node can repeat: Gumbel-max with counter-based noise.

The token at output ``index`` of ``choice`` is a pure function of the logits and of
(seed, choice, index); no generator state exists, so nothing has to travel when a sequence moves.

    z_j = (logit_j - max logit) / temperature                                    float32
    g_j = -log(-log1p(-v_j)),  v_j = min((float32(r_j) + 0.5) 2^-32, 1 - 2^-24)  float32
    token = the allowed j that maximises z_j + g_j; the smallest j wins a tie

``r_j`` is lane ``j % 4`` of Philox-4x32-10 with the counter words (j // 4, index, choice, 0) and
the key words (seed mod 2^32, seed / 2^32). Both additions round to nearest. The largest noise comes
from ``v`` near 0, where float32 is finest, so all 32 random bits count there: g reaches 22.9.
Logarithms are taken in float64 and g is rounded once: libraries disagree about their last bits, and
rounding hides all but one such difference in 10^8.

A token is allowed if it passes, in this order:

- top-k: its z is at least the k-th largest; tokens that are equal to that one all stay.
- top-p: the probability (softmax of z over what top-k left) of all tokens that rank before it is
  below ``top_p``; the first always passes. Tokens rank by z, downwards, equal ones by id, upwards.
- min-p: its probability is at least ``min_p`` times the largest one, that is, its z is at least
  ``min_p_limit(min_p)``.

Penalties come before all of it, on the logits (``penalties``).

Temperature 0 is greedy: the largest logit, the smallest id wins a tie.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Holtzman et al.,
"The curious case of neural text degeneration" (2020) for the nucleus; Nguyen et al., "Turning up
the heat: min-p sampling" (2024). The order, and that ties of top-k stay, are those of transformers
(its logits processors; penalties, temperature, top-k, top-p, min-p).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox_4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox-4x32-10 of ``counter`` [..., 4] (32-bit words held as int64), in the same shape."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The product fills 64 bits: as int64 it may be negative, its two words are right anyway.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _MASK, (k1 + PHILOX_KEY_STEPS[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_noise(vocab: int, seed: int, choice: int, index: int) -> torch.Tensor:
    """Standard Gumbel noise g of every token id: [vocab] float32."""
    blocks = torch.arange((vocab + 3) // 4)
    counter = torch.stack(
        (
            blocks,
            torch.full_like(blocks, index),
            torch.full_like(blocks, choice),
            torch.zeros_like(blocks),
        ),
        dim=-1,
    )
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)).flatten()[:vocab]
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return (-torch.log(-torch.log1p(-v.double()))).float()


def nucleus(z: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens of ``z`` [V] the nucleus holds: [V] bool."""
    order = torch.sort(z, descending=True, stable=True).indices
    mass = torch.softmax(z.double(), dim=-1)[order]
    before = mass.cumsum(0) - mass
    inside = before < top_p
    inside[0] = True
    return torch.zeros_like(inside).scatter(0, order, inside)


def min_p_limit(min_p: float) -> float:
    """The smallest z that ``min_p`` allows: its logarithm as a float32; -inf for 0."""
    return float(np.float32(math.log(min_p))) if min_p > 0 else -math.inf


def allowed(z: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which tokens of ``z`` [V] may be drawn: [V] bool. ``top_k`` 0: all."""
    kept = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < len(z):
        kept = z >= z.topk(top_k).values[-1]
    if top_p < 1:
        kept = kept & nucleus(z.masked_fill(~kept, float("-inf")), top_p)
    return kept & (z >= min_p_limit(min_p))


def gumbel_sample(
    logits: torch.Tensor,
    temperature: Sequence[float],
    top_p: Sequence[float],
    seed: Sequence[int],
    choice: Sequence[int],
    index: Sequence[int],
    top_k: Sequence[int] | None = None,
    min_p: Sequence[float] | None = None,
) -> list[int]:
    """One token id per row of ``logits`` [S, V] float32; every list has S entries.

    A row with a NaN or without a finite maximum, from which nothing can be drawn, gets -1.

    Args:
        temperature: 0 is greedy, else positive; rounded to float32 first.
        top_p: mass of the nucleus, in (0, 1]; 1 keeps every token.
        seed: taken modulo 2^64.
        choice: number of the answer among the request's ``n``.
        index: output position of the token to draw.
        top_k: 0 keeps every token; None: 0 in all rows.
        min_p: in [0, 1]; 0 keeps every token; None: 0 in all rows.
    """
    tokens = []
    for row, line in enumerate(logits):
        peak = line.max()
        if not torch.isfinite(peak):
            tokens.append(-1)
            continue
        heat = float(np.float32(temperature[row]))
        if heat == 0:
            scores = line
        else:
            z = (line - peak) / heat
            scores = z + gumbel_noise(line.shape[0], seed[row], choice[row], index[row])
            k = 0 if top_k is None else top_k[row]
            least = 0.0 if min_p is None else min_p[row]
            scores = scores.masked_fill(~allowed(z, k, top_p[row], least), float("-inf"))
        # argmax may return any of equal maxima; the first is wanted.
        tokens.append(int((scores == scores.max()).nonzero()[0]))
    return tokens
