"""The runner of accelerators on a fake one: the same tokens as the runner of the host.

The fake's copies come late and its graphs are recordings (``tests.fakes.late_device``); nothing
here has met a CUDA stream.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_builders import an_add
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import LAYERS, VOCABULARY, write_tiny_llama

from kernels.meta import AttentionMeta
from kernels.ops import Ops, reference_ops
from pop_node.engine.messages import Add, Token
from pop_node.engine.running.cuda_runner import MISSES_BEFORE_CAPTURE, CudaRunner
from pop_node.engine.running.runner import Runner
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.schedule import NO_TOKEN, Schedule
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.validate import Limits
from pop_node.models.registry import Model, load_model
from tests.fakes.late_device import HostSampler, LateDevice

BLOCKS, BLOCK_TOKENS, BUDGET, SEATS, CONTEXT = 40, 4, 24, 5, 120


def as_the_device_sees_it(ops: Ops) -> Ops:
    """Operations that believe the tensors of a batch: its host lists are a bucket's in a graph."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta, scale: float
    ) -> torch.Tensor:
        starts, contexts = meta.query_starts.tolist(), meta.context_lens.tolist()
        lens = [b - a for a, b in pairwise(starts)]
        assert max(lens) <= meta.max_query
        assert max(contexts) <= meta.max_context
        seen = dataclasses.replace(meta, query_lens_host=lens, context_lens_host=contexts)
        return ops.attention(q, k, v, seen, scale)

    return dataclasses.replace(ops, attention=attention)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    # Batch-invariant, so that every bit is the same whatever is computed together.
    ops = as_the_device_sees_it(reference_ops(batch_invariant=True))
    return load_model(directory, "float32", ops)


def a_cuda_runner(model: Model) -> tuple[CudaRunner, LateDevice]:
    device = LateDevice()
    runner = CudaRunner(
        model,
        device,
        HostSampler(),
        BLOCKS,
        BLOCK_TOKENS,
        token_budget=BUDGET,
        max_sequences=SEATS,
        context_tokens=CONTEXT,
    )
    for component in runner.cache:
        component.fill_(float("nan"))
    return runner, device


def a_scheduler() -> Scheduler:
    return Scheduler(
        BlockPool(BLOCKS, BLOCK_TOKENS),
        Limits(VOCABULARY, CONTEXT, BLOCK_TOKENS, BLOCKS),
        token_budget=BUDGET,
        max_sequences=SEATS,
        max_waiting=64,
    )


Answers = dict[int, list[int]]


def answers(runner: Any, adds: list[tuple[int, Add]]) -> Answers:
    """Tokens of each sequence, added before the step that is named."""
    scheduler, found = a_scheduler(), {}
    queue = sorted(adds, key=lambda pair: pair[0])
    step = 0
    while queue or scheduler.num_sequences:
        while queue and queue[0][0] <= step:
            _, add = queue.pop(0)
            found[add.seq] = []
            assert scheduler.handle(add, 0.0) == []
        schedule, _ = scheduler.schedule(0.0)
        step += 1
        if not schedule.rows:
            continue
        tell(scheduler, schedule, runner.launch(schedule, lambda layer: None), found)
    return found


def tell(scheduler: Scheduler, schedule: Schedule, collect: Any, found: Answers) -> None:
    """End a step."""
    for effect in scheduler.complete(schedule, collect(), 0.0):
        if isinstance(effect, Token):
            found[effect.seq].append(effect.id)
    scheduler.check()


def answers_ahead(runner: CudaRunner, adds: list[tuple[int, Add]]) -> Answers:
    """The same with two steps under way, as the engine's loop has them."""
    scheduler, found = a_scheduler(), {add.seq: [] for _, add in adds}
    queue = sorted(adds, key=lambda pair: pair[0])
    before: tuple[Schedule, Any] | None = None
    step = 0
    while queue or scheduler.num_sequences or before:
        while queue and queue[0][0] <= step:
            assert scheduler.handle(queue.pop(0)[1], 0.0) == []
        if before:
            scheduler.ahead(before[0])
        schedule, _ = scheduler.schedule(0.0)
        step += 1
        begun = None
        if schedule.rows:
            begun = schedule, runner.launch(schedule, lambda layer: None)
        if before:
            tell(scheduler, *before, found)
        if begun and begun[0].awaited:
            tell(scheduler, *begun, found)
            begun = None
        before = begun
    return found


prompt = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)
arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),
        prompt,
        st.integers(1, 12),
        st.sampled_from([0.0, 0.9]),
        st.booleans(),
        st.sampled_from([{}, {}, {"repetition_penalty": 1.4, "frequency_penalty": 0.6}]),
    ),
    min_size=1,
    max_size=8,
).map(
    lambda drawn: [
        (
            at,
            an_add(
                seq,
                prompt_ids=ids,
                max_tokens=more,
                temperature=temperature,
                top_p=0.8,
                seed=seq,
                stop_ids=list(range(0, VOCABULARY, 9)) if stops else [],
                **penalties,
            ),
        )
        for seq, (at, ids, more, temperature, stops, penalties) in enumerate(drawn, 1)
    ]
)


@settings(max_examples=12, deadline=None)
@given(adds=arrivals, captured=st.booleans())
def test_tokens_and_cache_are_those_of_the_host(
    model: Model, adds: list[tuple[int, Add]], captured: bool
) -> None:
    host = Runner(model, model._ops, BLOCKS, BLOCK_TOKENS)
    for component in host.cache:
        component.fill_(float("nan"))
    runner, device = a_cuda_runner(model)
    while captured and runner.prepare():
        pass
    assert answers(runner, adds) == answers(host, adds)
    assert captured or device.captures == 0
    for mine, theirs in zip(runner.cache, host.cache, strict=True):
        assert torch.equal(mine[:, :BLOCKS].isnan(), theirs.isnan())
        assert torch.equal(mine[:, :BLOCKS].nan_to_num(), theirs.nan_to_num())


@settings(max_examples=12, deadline=None)
@given(adds=arrivals, captured=st.booleans())
def test_tokens_are_the_same_with_two_steps_under_way(
    model: Model, adds: list[tuple[int, Add]], captured: bool
) -> None:
    host = Runner(model, model._ops, BLOCKS, BLOCK_TOKENS)
    runner, _ = a_cuda_runner(model)
    while captured and runner.prepare():
        pass
    assert answers_ahead(runner, adds) == answers(host, adds)


def test_what_only_decodes_is_replayed_and_the_rest_is_not(model: Model) -> None:
    runner, device = a_cuda_runner(model)
    while runner.prepare():
        pass
    assert device.captures == 4  # 1, 2, 4 and 5 rows, one context
    layers: list[int] = []
    scheduler = a_scheduler()
    scheduler.handle(an_add(1, prompt_ids=[1] * 9, max_tokens=4), 0.0)
    replays = []
    while scheduler.num_sequences:
        schedule, _ = scheduler.schedule(0.0)
        ids = runner.launch(schedule, layers.append)()
        replays.append(device.replays)
        scheduler.complete(schedule, ids, 0.0)
    assert replays == [0, 1, 2, 3]
    assert layers == list(range(LAYERS))  # of the prompt; nobody waits for a decode step's


def test_a_bucket_that_is_missed_often_is_captured_under_load(model: Model) -> None:
    runner, device = a_cuda_runner(model)
    runner.capture_first()
    assert device.captures == 2
    adds = [(0, an_add(seq, prompt_ids=[seq], max_tokens=60)) for seq in (1, 2)]
    answers(runner, adds)
    assert device.captures == 3
    assert device.replays == 59 - (MISSES_BEFORE_CAPTURE - 1)


def test_a_row_without_a_token_is_told_when_it_is_collected(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = a_cuda_runner(model)
    monkeypatch.setattr(HostSampler, "draw", lambda self, logits, parameters: torch.tensor([-1]))
    scheduler = a_scheduler()
    scheduler.handle(an_add(1), 0.0)
    schedule, _ = scheduler.schedule(0.0)
    collect = runner.launch(schedule, lambda layer: None)
    assert collect() == [NO_TOKEN]
    assert runner._last[0] == 0  # an id that the next step, already queued, can look up
