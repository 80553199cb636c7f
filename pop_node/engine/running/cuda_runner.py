"""Runs scheduled steps on an accelerator, which may be one step ahead of what the host knows.

Three streams: what computes, uploads of the steps' numbers, downloads of sampled ids. The host
queues a step and goes on; ids of running sequences go from step to step on the device. All numbers
of a step travel in one copy (``step_layout``) into one of two places and from there, in order with
what computes, to where kernels and graphs read them.

Steps that only decode run as graphs, once their bucket (``graph_plan``) was captured: some before
the engine is ready, the others while it has nothing to do, or when they were missed too often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.meta import AttentionMeta
from pop_node.engine.running.cuda_device import Device
from pop_node.engine.running.graph_plan import Bucket, GraphPlan
from pop_node.engine.running.runner import Model, OnLayer
from pop_node.engine.running.step_layout import Fields, StepShape, cut, cut_host, fill, spans
from pop_node.engine.scheduling.schedule import Schedule
from pop_node.engine.scheduling.sequence import Sequence

DEPTH = 2
"""Steps under way: one is computed while the next is queued. A third would only wait, and know yet
one token less of its sequences."""

MISSES_BEFORE_CAPTURE = 32
"""Steps without their graph before a busy engine stops for a capture, which takes as long as
several steps. Guess."""


class Sampler(Protocol):
    """``device_sampler.DeviceSampler``, or what tests put in its place."""

    @property
    def words(self) -> int: ...

    def pack(self, schedule: Schedule) -> NDArray[np.int64]: ...

    def penalize(self, logits: torch.Tensor, schedule: Schedule) -> None: ...

    def draw(self, logits: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor: ...


class CudaRunner:
    """A model with its cache, in the place of ``runner.Runner``.

    ``cache`` is as there, but for a block more than the scheduler knows: rows of padding write
    their KV there.
    """

    depth = DEPTH

    def __init__(
        self,
        model: Model,
        device: Device,
        sampler: Sampler,
        num_blocks: int,
        block_tokens: int,
        *,
        token_budget: int,
        max_sequences: int,
        context_tokens: int,
    ) -> None:
        self._model = model
        self._device = device
        self._sampler = sampler
        self._block_tokens = block_tokens
        self._scratch_block = num_blocks
        self.cache = model.allocate_cache(num_blocks + 1, block_tokens)
        self._plan = GraphPlan(max_sequences, context_tokens)
        self._graphs: dict[Bucket, Callable[[], None]] = {}
        self._missed: Counter[Bucket] = Counter()
        self._widest = -(-context_tokens // block_tokens)
        largest = StepShape(token_budget, max_sequences, max_sequences, self._widest, sampler.words)
        _, nbytes = spans(largest)
        where = device.device
        self._host = [device.page_locked(nbytes) for _ in range(DEPTH)]
        self._staged = [torch.zeros(nbytes, dtype=torch.uint8, device=where) for _ in range(DEPTH)]
        self._numbers = torch.zeros(nbytes, dtype=torch.uint8, device=where)
        vocab = model.config.vocab_size
        self._logits = torch.zeros(max_sequences, vocab, dtype=torch.float32, device=where)
        self._last = torch.zeros(max_sequences, dtype=torch.int64, device=where)
        self._ids = [device.page_locked(8 * max_sequences).view(torch.int64) for _ in range(DEPTH)]
        self._uploads, self._downloads = device.lane(), device.lane()
        self._uploaded, self._taken, self._sampled, self._arrived = (
            [device.event() for _ in range(DEPTH)] for _ in range(4)
        )
        self._turn = 0
        self._places: dict[Sequence, int] = {}

    # ---- steps ---------------------------------------------------------------------------------

    def launch(self, schedule: Schedule, on_layer: OnLayer | None) -> Callable[[], list[int]]:
        """Queue a step; at most ``depth`` may be under way; one that is awaited ends first.

        ``on_layer(i)`` is called when what computes layer i's KV is queued, in a step that has
        prompts.

        Returns:
            What waits for the step and gives the token sampled for each of ``schedule.sampled``, or
            ``NO_TOKEN``.
        """
        turn = self._turn = (self._turn + 1) % DEPTH
        bucket = self._bucket(schedule)
        graph = None if bucket is None else self._graph(bucket)
        shape = self._exact(schedule) if bucket is None or graph is None else self._shape(bucket)
        count = len(schedule.sampled)
        with torch.inference_mode():
            fields = self._upload(shape, schedule, self._places, turn)
            if graph is not None:
                graph()
                logits = self._logits[:count]
            else:
                logits = self._forward(
                    fields, _meta(fields, schedule, self._block_tokens), on_layer
                )
            self._places = {
                schedule.rows[row].sequence: place for place, row in enumerate(schedule.sampled)
            }
            if count == 0:
                return list
            if schedule.awaited:
                self._sampler.penalize(logits, schedule)
            tokens = self._sampler.draw(logits, fields.sampling[:count])
            # Where there is none, the next step, which is queued before anybody knows, needs some.
            torch.clamp(tokens, min=0, out=self._last[:count])
            self._sampled[turn].record()
            self._downloads.wait(self._sampled[turn])
            self._downloads.copy(self._ids[turn][:count], tokens)
            self._downloads.record(self._arrived[turn])

        def collect() -> list[int]:
            self._arrived[turn].synchronize()
            ids: list[int] = self._ids[turn][: len(tokens)].tolist()
            return ids

        return collect

    def _upload(
        self, shape: StepShape, schedule: Schedule, places: Mapping[Sequence, int], turn: int
    ) -> Fields:
        """Bring the numbers of a step to the device; what is queued from here on finds them."""
        _, nbytes = spans(shape)
        self._uploaded[turn].synchronize()  # two steps ago: this memory was copied from
        host: NDArray[np.uint8] = self._host[turn].numpy()
        fields = cut_host(host, shape)
        fill(fields, schedule, self._block_tokens, self._scratch_block, places)
        if schedule.sampled:
            fields.sampling[: len(schedule.sampled)] = self._sampler.pack(schedule)
        self._uploads.wait(self._taken[turn])
        self._uploads.copy(self._staged[turn][:nbytes], self._host[turn][:nbytes])
        self._uploads.record(self._uploaded[turn])
        self._uploaded[turn].wait()
        self._numbers[:nbytes].copy_(self._staged[turn][:nbytes])
        self._taken[turn].record()
        return self._cut(shape)

    def _cut(self, shape: StepShape) -> Fields:
        return cut(self._numbers, shape, torch.int64, torch.int32, torch.Tensor.view)

    def _forward(
        self, fields: Fields, meta: AttentionMeta, on_layer: OnLayer | None
    ) -> torch.Tensor:
        given = fields.ids
        ids = torch.where(given < 0, self._last[(-1 - given).clamp_(min=0)], given)
        return self._model.forward(ids, meta, self.cache, fields.logit_rows, on_layer)

    def _exact(self, schedule: Schedule) -> StepShape:
        longest = max(row.end for row in schedule.rows)
        return StepShape(
            schedule.num_tokens,
            len(schedule.rows),
            len(schedule.sampled),
            -(-longest // self._block_tokens),
            self._sampler.words,
        )

    # ---- graphs --------------------------------------------------------------------------------

    def capture_first(self) -> None:
        """Before the engine is ready."""
        for bucket in self._plan.first():
            self._capture(bucket)

    def prepare(self) -> bool:
        """Use a moment without work: capture a graph; False when there is none left to capture."""
        bucket = self._plan.missing(self._graphs)
        if bucket is None:
            return False
        self._capture(bucket)
        return True

    def _bucket(self, schedule: Schedule) -> Bucket | None:
        """Of a step in which sequences decode a token each, and whose layers nobody waits for."""
        rows = schedule.rows
        plain = len(schedule.sampled) == len(rows) == schedule.num_tokens
        if not plain or schedule.completing or any(r.sequence.leg == "prefill" for r in rows):
            return None
        return self._plan.bucket(len(rows), max(row.end for row in rows))

    def _graph(self, bucket: Bucket) -> Callable[[], None] | None:
        if bucket not in self._graphs:
            self._missed[bucket] += 1
            if self._missed[bucket] < MISSES_BEFORE_CAPTURE:
                return None
            self._capture(bucket)
        return self._graphs[bucket]

    def _shape(self, bucket: Bucket) -> StepShape:
        width = -(-bucket.context // self._block_tokens)
        return StepShape(bucket.rows, bucket.rows, bucket.rows, width, self._sampler.words)

    def _capture(self, bucket: Bucket) -> None:
        """Over the cut of the bucket, filled with padding: its runs harm nothing."""
        nothing = Schedule((), (), (), 0)
        with torch.inference_mode():
            fields = self._upload(self._shape(bucket), nothing, {}, self._turn)
            meta = AttentionMeta(
                positions=fields.positions,
                slots=fields.slots,
                query_starts=fields.query_starts,
                context_lens=fields.context_lens,
                block_tables=fields.block_tables,
                block_tokens=self._block_tokens,
                max_query=1,
                max_context=bucket.context,
                query_lens_host=[1] * bucket.rows,
                context_lens_host=[bucket.context] * bucket.rows,
            )
            logits = self._logits[: bucket.rows]

            def work() -> None:
                logits.copy_(self._forward(fields, meta, _nobody))

            self._graphs[bucket] = self._device.capture(work)


def _nobody(layer: int) -> None:
    """Hears of layers."""


def _meta(fields: Fields, schedule: Schedule, block_tokens: int) -> AttentionMeta:
    lens = [row.count for row in schedule.rows]
    ends = [row.end for row in schedule.rows]
    return AttentionMeta(
        positions=fields.positions,
        slots=fields.slots,
        query_starts=fields.query_starts,
        context_lens=fields.context_lens,
        block_tables=fields.block_tables,
        block_tokens=block_tokens,
        max_query=max(lens),
        max_context=max(ends),
        query_lens_host=lens,
        context_lens_host=ends,
    )
