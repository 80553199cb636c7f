"""A scheduler stepped by hand over a fake model, and what it should say."""

from __future__ import annotations

from typing import Any

from engine_builders import a_scheduler

from pop_node.engine.messages import Add, Commit, Drop, Release, Retarget, Token
from pop_node.engine.scheduling.schedule import Effect, TransferBound
from tests.fakes.fake_model import FakeModel, answer


class Engine:
    """A scheduler and a fake model, stepped by hand; ``effects`` collects everything said."""

    def __init__(self, num_blocks: int = 64, block_tokens: int = 4, **limits: Any) -> None:
        self.scheduler, self.pool = a_scheduler(num_blocks, block_tokens, **limits)
        self.model = FakeModel(num_blocks, block_tokens)
        self.effects: list[Effect] = []

    def tell(self, command: Add | Drop | Retarget | Release | Commit) -> list[Effect]:
        got = self.scheduler.handle(command, 0.0)
        self.effects += got
        self.scheduler.check()
        return got

    def step(self) -> dict[int, int]:
        """One step; returns how many tokens were computed per sequence."""
        schedule, effects = self.scheduler.schedule(0.0)
        self.effects += effects
        self.effects += self.scheduler.complete(schedule, self.model.run(schedule), 0.0)
        self.scheduler.check()
        return {row.sequence.seq: row.count for row in schedule.rows}

    def finish(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError("the engine does not come to rest")

    def tokens(self, seq: int) -> list[tuple[int, int, str]]:
        mine = [e for e in self.effects if isinstance(e, Token) and e.seq == seq]
        return [(e.index, e.id, e.finish) for e in mine]

    def said(self, kind: type) -> list[Any]:
        return [e for e in self.effects if isinstance(e, kind)]


def expected(
    prompt: list[int], count: int, last: str, first: int = 0
) -> list[tuple[int, int, str]]:
    """(index, id, finish) of the tokens after ``prompt``, the last with a finish."""
    text = answer(prompt, count)
    finishes = [""] * (count - 1) + [last]
    return [(first + i, text[i], finishes[i]) for i in range(count)]


def receive(engine: Engine, add: Add) -> TransferBound:
    """Admit a decode leg; returns where its KV is to arrive."""
    engine.tell(add)
    engine.step()
    bound = engine.said(TransferBound)[-1]
    assert bound.transfer == add.transfer
    return bound
