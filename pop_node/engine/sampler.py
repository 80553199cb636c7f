"""From logits to tokens: hands each row's own sampling facts to the operation that draws."""

from __future__ import annotations

import torch

from kernels.ops import Ops
from pop_node.engine.sequence import Sequence


def sample(ops: Ops, logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """One token id per row of ``logits`` [S, vocab] float32; row i belongs to ``sequences[i]``.

    The noise is keyed by (seed, choice, output index, token id) and by nothing else, so it is the
    same on any node and after any preemption. Every sequence here is choice 0 of its request.
    """
    return ops.gumbel_sample(
        logits,
        [s.temperature for s in sequences],
        [s.top_p for s in sequences],
        [s.seed for s in sequences],
        [0] * len(sequences),
        [s.output_tokens for s in sequences],
    )
