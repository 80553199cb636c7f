"""Penalties on tokens that were there before, in place on a row of logits.

    l <- l / repetition  where l > 0, else l * repetition      tokens of the prompt or the answer
    l <- l - (frequency * count + presence)                    tokens of the answer, ``count`` times

In float64, rounded once to float32. The products are exact there, so an implementation may fuse
them with what follows. Sums of float32 numbers: parameters are rounded to float32 first.

Source: Keskar et al., "CTRL" (2019), section 4.1, with the sign taken into account as transformers
does, for repetition; the OpenAI API reference for the other two.
"""

from __future__ import annotations

import torch


def penalize(
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Change one row of logits.

    Args:
        logits: [V] float32, changed in place.
        ids: [E] int32, tokens of the prompt and the answer, each once.
        counts: [E] int32, how often each is in the answer; 0: only in the prompt.
        repetition: above 0; 1 leaves logits alone.
        frequency, presence: 0 leaves them alone.
    """
    at = ids.long()
    chosen = logits[at].double()
    factor, per_count, once = torch.tensor([repetition, frequency, presence]).double()  # float32
    chosen = torch.where(chosen > 0, chosen / factor, chosen * factor)
    chosen = chosen - (per_count * counts + once * (counts > 0))
    logits[at] = chosen.float()
