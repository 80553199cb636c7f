"""Runs one scheduled step on the model: the owner of the weights and of the KV cache's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from kernels.meta import AttentionMeta
from kernels.ops import Ops
from pop_node.engine.running.batch import Batch, build_batch
from pop_node.engine.running.decode_batch import DecodeBatches, decodes
from pop_node.engine.running.sampler import RowSampler
from pop_node.engine.scheduling.schedule import Schedule
from pop_node.kv_stream.spec import KvSpec

OnLayer = Callable[[int], None]


class ModelConfig(Protocol):
    """What the engine needs to know of a model's configuration."""

    @property
    def context_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class Model(Protocol):
    """What ``pop_node.models`` loads."""

    @property
    def config(self) -> ModelConfig: ...

    def kv_spec(self) -> KvSpec: ...

    def allocate_cache(self, num_blocks: int, block_tokens: int) -> tuple[torch.Tensor, ...]: ...

    def forward(
        self,
        ids: torch.Tensor,
        meta: AttentionMeta,
        cache: tuple[torch.Tensor, ...],
        logit_rows: torch.Tensor,
        on_layer: OnLayer | None,
    ) -> torch.Tensor: ...


class StepRunner(Protocol):
    """What computes an engine's steps, ``depth`` of them under way at a time."""

    @property
    def depth(self) -> int: ...

    @property
    def cache(self) -> tuple[torch.Tensor, ...]: ...

    def launch(self, schedule: Schedule, on_layer: OnLayer | None) -> Callable[[], list[int]]:
        """Begin a step; what is returned waits for it and gives the token sampled for each of
        ``schedule.sampled``, or ``NO_TOKEN``. Without ``on_layer`` the layers may be computed as
        one."""

    def prepare(self) -> bool:
        """Use a moment without work; False when there is nothing left to prepare."""


class Runner:
    """A model with its cache. ``cache`` holds one tensor ``[layers, blocks, block_tokens, *shape]``
    per component of the model's ``KvSpec``, group by group."""

    def __init__(self, model: Model, ops: Ops, num_blocks: int, block_tokens: int) -> None:
        self._model = model
        self._sampler = RowSampler(ops)
        self._block_tokens = block_tokens
        self.cache = model.allocate_cache(num_blocks, block_tokens)
        self._decode_batches = DecodeBatches(block_tokens)

    depth = 1
    """Steps under way: the processor that computes them is the one that would queue the next."""

    def launch(self, schedule: Schedule, on_layer: OnLayer | None) -> Callable[[], list[int]]:
        """``run`` in the form that all runners share: what it returns gives the tokens."""
        ids = self.run(schedule, on_layer)
        return lambda: ids

    def prepare(self) -> bool:
        """There is nothing to do in a moment without work."""
        return False

    def run(self, schedule: Schedule, on_layer: OnLayer | None) -> list[int]:
        """Compute all rows; returns the tokens drawn after each of ``schedule.sampled``, in order,
        ``NO_TOKEN`` where their logits allow none.

        ``on_layer(i)`` is called when the KV of these rows is in the cache for model layer i.
        """
        batch = self._batch(schedule)
        logits = self._model.forward(batch.ids, batch.meta, self.cache, batch.logit_rows, on_layer)
        if not schedule.sampled:
            return []
        return self._sampler.draw(logits, [schedule.rows[i] for i in schedule.sampled])

    def _batch(self, schedule: Schedule) -> Batch:
        device = self.cache[0].device
        if device.type == "cpu" and decodes(schedule):
            return self._decode_batches.build(schedule)
        return build_batch(schedule, self._block_tokens, device)
