"""The clients of a drill: what they ask undisturbed, to compare with, and then all the time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

from popmesh.drill.check import judge
from popmesh.drill.ledger import Answers
from popmesh.drill.observation import Observation
from popmesh.drill.stream import Caller
from popmesh.drill.workload import Ask
from wire.errors import PeerError

REFERENCES_AT_ONCE = 4
"""Guess: a batch, but no queue."""

CALM_ROUNDS = 2
"""Answers of each client before the first fault: connections are made, buffers have grown."""

UNLUCKY_PAUSE_S = 0.5
"""A client whose request was refused asks again, but does not storm."""


async def ask_references(asks: Sequence[Ask], caller: Caller) -> dict[int, Observation]:
    """The answer to each request without any fault, by its number; raises ``PeerError`` when one
    fails."""
    gate = asyncio.Semaphore(REFERENCES_AT_ONCE)
    found: dict[int, Observation] = {}

    async def one(ask: Ask) -> None:
        async with gate:
            seen = await caller.ask(ask, ask.number)
        if not seen.complete:
            code, message = seen.error or ("peer_failed", "it ended without its end")
            raise PeerError(f"an undisturbed request failed: {message}", code=code)
        found[ask.number] = seen

    async with asyncio.TaskGroup() as tasks:
        for ask in asks:
            tasks.create_task(one(ask))
    return found


async def calm_wave(
    asks: Sequence[Ask],
    references: Mapping[int, Observation],
    caller: Caller,
    clients: int,
    seed: int,
) -> Answers:
    """What ``clients`` at a time see without any fault."""
    calm = Answers()

    async def client(number: int) -> None:
        rng = random.Random(f"calm {seed} {number}")
        for _ in range(CALM_ROUNDS):
            seen = await caller.ask(rng.choice(asks), number)
            calm.add(seen, judge(seen, references[seen.ask.number], ()), None)

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(client(number))
    return calm


async def keep_asking(
    number: int,
    asks: Sequence[Ask],
    caller: Caller,
    seed: int,
    answered: Callable[[Observation], Awaitable[None]],
    is_closing: Callable[[], bool],
) -> None:
    """Be client ``number`` until the drill closes; ``answered`` takes every answer."""
    rng = random.Random(f"client {seed} {number}")
    while not is_closing():
        seen = await caller.ask(rng.choice(asks), number)
        await answered(seen)
        if not seen.complete:
            await asyncio.sleep(UNLUCKY_PAUSE_S)
