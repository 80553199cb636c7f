"""Sampling whose result stays on the device: parameters go there with the step's other numbers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.triton.penalties import penalize
from kernels.triton.sampling import PARAMETERS, pack_parameters, sample_on_device
from pop_node.engine.running.sampler import penalize_row
from pop_node.engine.scheduling.schedule import Schedule


class DeviceSampler:
    """``words``: of 64 bits, per sampled row."""

    words = PARAMETERS

    def pack(self, schedule: Schedule) -> NDArray[np.int64]:
        """Parameters of the sampled rows: [N, words] int64.

        The index of the token to draw follows from the row's end: tokens before it may still be on
        their way from the device.
        """
        rows = [schedule.rows[index] for index in schedule.sampled]
        packed: NDArray[np.int64] = pack_parameters(
            [row.sequence.temperature for row in rows],
            [row.sequence.top_p for row in rows],
            [row.sequence.seed for row in rows],
            [0] * len(rows),
            [row.end - row.sequence.prompt_tokens for row in rows],
            [row.sequence.top_k for row in rows],
            [row.sequence.min_p for row in rows],
        ).numpy()
        return packed

    def penalize(self, logits: torch.Tensor, schedule: Schedule) -> None:
        """Change rows of ``logits`` [N, vocab], those of ``schedule.sampled``, in place.

        Their sequences' tokens are all known here: who is penalised is not run ahead of.
        """
        for line, index in enumerate(schedule.sampled):
            row = schedule.rows[index]
            sequence = row.sequence
            if sequence.tally is not None:
                assert row.end == len(sequence.ids), "a token is still on its way"
                penalize_row(_from_the_host, logits[line], sequence, sequence.tally)

    def draw(self, logits: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """Ids [N] int64 on the device of ``logits`` [N, vocab]; -1 where no logit is finite."""
        return sample_on_device(logits, parameters)


def _from_the_host(
    line: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Queue the upload and the kernel. A copy from memory that is not page-locked would wait for
    the step before; torch keeps page-locked memory until what was queued has read it."""
    if line.is_cuda:
        ids, counts = (
            each.pin_memory().to(line.device, non_blocking=True) for each in (ids, counts)
        )
    penalize(line, ids, counts, repetition, frequency, presence)
