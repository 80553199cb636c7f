"""From a schedule to tensors: ids, places in the KV cache, and which rows want logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.meta import AttentionMeta
from pop_node.engine.scheduling.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Batch:
    """``ids`` [T] int64 and ``logit_rows`` [tokens to draw] int64 index the same T rows."""

    ids: torch.Tensor
    meta: AttentionMeta
    logit_rows: torch.Tensor


def build_batch(schedule: Schedule, block_tokens: int, device: torch.device) -> Batch:
    """Lay out the rows of a non-empty schedule one after another, without padding.

    Python touches each row once; everything per token is vectorised.
    """
    rows = schedule.rows
    lens = np.array([row.count for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    ends = starts + lens
    query_starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lens, out=query_starts[1:])
    ids = np.concatenate([np.frombuffer(row.tokens(), dtype=np.int32) for row in rows])
    widths = -(-ends // block_tokens)
    tables = np.zeros((len(rows), int(widths.max())), dtype=np.int32)
    for index, row in enumerate(rows):
        width = widths[index]
        tables[index, :width] = np.frombuffer(row.sequence.blocks, dtype=np.int32, count=width)
    owner = np.repeat(np.arange(len(rows)), lens)  # [T]: the row of each token
    positions = np.arange(schedule.num_tokens) + (starts - query_starts[:-1])[owner]
    blocks = tables[owner, positions // block_tokens].astype(np.int64)
    slots = blocks * block_tokens + positions % block_tokens
    meta = AttentionMeta(
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        query_starts=torch.from_numpy(query_starts.astype(np.int32)).to(device),
        context_lens=torch.from_numpy(ends.astype(np.int32)).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        block_tokens=block_tokens,
        max_query=int(lens.max()),
        max_context=int(ends.max()),
        query_lens_host=lens.tolist(),
        context_lens_host=ends.tolist(),
    )
    logit_rows = query_starts[1:][list(schedule.sampled)] - 1
    if schedule.num_drafts:
        drafts = [len(rows[index].drafts) for index in schedule.sampled]
        logit_rows = np.concatenate(
            [
                np.arange(last - count, last + 1)
                for last, count in zip(logit_rows, drafts, strict=True)
            ]
        )
    return Batch(
        ids=torch.from_numpy(ids.astype(np.int64)).to(device),
        meta=meta,
        logit_rows=torch.from_numpy(logit_rows).to(device),
    )
