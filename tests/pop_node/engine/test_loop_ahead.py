"""The engine's loop with a runner that is one step ahead: what it must not run ahead of.

Scheduler, stager and loop are real, tokens are hashes of all tokens before; the runner is a fake
that knows what is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_builders import a_scheduler, an_add

from pop_node.engine.loop import EngineLoop
from pop_node.engine.messages import Add, StepDone, Stop
from pop_node.engine.scheduling.schedule import Schedule
from pop_node.engine.staging.kv_mover import HostMover
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.kv_stream.staging import Staging, StagingLayout
from tests.fakes.fake_model import VOCABULARY, answer, chain

BLOCKS, BLOCK_TOKENS = 64, 4
SPEC = KvSpec((KvGroup("tokens", (0,), (KvComponent("kv", "float32", (2,)),)),))
PENALTY = {"presence_penalty": 0.5}


class Engine:
    """Runner and port at once: answers all of ``adds`` and stops."""

    depth = 2

    def __init__(self, adds: list[Add]) -> None:
        self._commands = deque[Any]([*adds, Stop()])
        self._late: dict[object, int] = {}  # by sequence: a token that the host may not know yet
        self._under_way: list[Schedule] = []
        self.most_under_way = 0
        self.penalised_steps = 0
        self.found: dict[int, list[int]] = {add.seq: [] for add in adds}
        scheduler, pool = a_scheduler(BLOCKS, BLOCK_TOKENS)
        staging = Staging.create(StagingLayout(8 * BLOCK_TOKENS, 1, 1))
        cache = torch.zeros(1, BLOCKS, BLOCK_TOKENS, 2)
        stager = Stager(
            SPEC, (cache,), BLOCK_TOKENS, staging, pool.generations, self.wake, HostMover()
        )
        try:
            EngineLoop(scheduler, self, stager, self, last_layer=0).run()  # type: ignore[arg-type]
        finally:
            staging.close()

    # ---- the port ------------------------------------------------------------------------------

    def take(self, *, wait: bool) -> object:
        if self._commands and (wait or not isinstance(self._commands[0], Stop)):
            return self._commands.popleft()
        return None

    def send(self, message: object) -> None:
        if isinstance(message, StepDone):
            for seq, _, token, _ in message.tokens:
                self.found[seq].append(token)

    def wake(self) -> None:
        """Nobody sleeps."""

    # ---- the runner ----------------------------------------------------------------------------

    def prepare(self) -> bool:
        return False

    def launch(self, schedule: Schedule, on_layer: object) -> Callable[[], list[int]]:
        rows = [schedule.rows[index] for index in schedule.sampled]
        for row in rows:
            if row.sequence.tally is not None:
                assert row.end == len(row.sequence.ids), "penalties of unknown tokens"
        assert not any(step.awaited for step in self._under_way)
        self._under_way.append(schedule)
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        self.penalised_steps += schedule.awaited
        drawn = []
        for row in rows:
            ids = list(row.sequence.ids)
            if row.end > len(ids):
                ids.append(self._late[row.sequence])
            drawn.append(chain(ids[: row.end])[-1] % VOCABULARY)
        self._late = {row.sequence: token for row, token in zip(rows, drawn, strict=True)}

        def collect() -> list[int]:
            assert self._under_way.pop(0) is schedule, "steps end in order"
            return drawn

        return collect


@pytest.mark.parametrize(
    ("asked", "most", "penalised"),
    [([{}, {}], 2, 0), ([PENALTY], 1, 6), ([{}, PENALTY | {"max_tokens": 3}], 2, 3)],
    ids=["nobody", "alone", "beside"],
)
def test_a_step_with_penalties_is_told_before_the_next_begins(
    asked: list[dict[str, Any]], most: int, penalised: int
) -> None:
    adds = [
        an_add(seq, prompt_ids=[seq, 2], **({"max_tokens": 6} | changes))
        for seq, changes in enumerate(asked, 1)
    ]
    engine = Engine(adds)
    assert engine.found == {add.seq: answer(add.prompt_ids, add.max_tokens) for add in adds}
    assert (engine.most_under_way, engine.penalised_steps) == (most, penalised)
