"""Submits that wait for a model, without a node around them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pop_node.legs import parking
from pop_node.legs.parking import Parking
from tests.pop_node.hand_router import a_submit
from wire.errors import OverloadError
from wire.messages import Failed, Finished, Loading, Refused, Retarget, Transfer


class FakeLink:
    """A fake router link: keeps what it is told."""

    def __init__(self) -> None:
        self.version = 3
        self.said: list[Any] = []
        self.news = asyncio.Event()

    def say(self, message: Any) -> None:
        self.said.append(message)
        self.news.set()


def parked(eta_s: float = 2.0) -> tuple[Parking, Any]:
    return Parking(lambda model: eta_s), FakeLink()


def transfer(number: int) -> Transfer:
    return Transfer(bytes([number]) * 16, "b", "127.0.0.1:1")


async def test_those_who_wait_for_a_model_leave_together_with_the_time_they_have_left() -> None:
    desk, link = parked()
    for stream, model in enumerate(["one", "two", "one"]):
        desk.add(link, a_submit(stream, "both", model=model, deadline_remaining_ms=5000))
    assert link.said == [Loading(stream, 2000) for stream in range(3)]
    assert desk.waiting_for("one") == 2
    taken = desk.take("one")
    assert [submit.stream for _, submit in taken] == [0, 2]
    assert all(0 < submit.deadline_remaining_ms <= 5000 for _, submit in taken)
    desk.refuse("two", OverloadError("no room", code="not_loaded", retry_after_s=3.0))
    assert link.said[-1] == Refused(1, "not_loaded", "no room", True, 3000)
    assert len(desk) == 0


async def test_a_deadline_passes_and_an_estimate_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "RETELL_S", 0.01)
    eta_s = 1.0
    desk, link = Parking(lambda model: eta_s), FakeLink()
    someone: Any = link
    desk.add(someone, a_submit(1, "both", deadline_remaining_ms=60_000))
    eta_s = 50.0
    link.news.clear()
    async with asyncio.timeout(60):
        await link.news.wait()
        assert link.said[-1] == Loading(1, 50_000)
        desk.add(someone, a_submit(2, "both", deadline_remaining_ms=0))
        while not any(isinstance(m, Failed) for m in link.said):
            link.news.clear()
            await link.news.wait()
    assert [m.stream for m in link.said if isinstance(m, Failed)] == [2]
    assert len(desk) == 1
    desk.router_left(someone)
    assert len(desk) == 0


async def test_cancels_and_retargets_find_those_who_wait() -> None:
    desk, link = parked()
    desk.add(link, a_submit(1, "prefill", transfer=transfer(1), forced_ids=[5, 6]))
    assert not desk.retarget(link, Retarget(9, 2, transfer(2)))
    assert desk.retarget(link, Retarget(1, 2, transfer(2)))
    ((_, submit),) = desk.take(submit_model())
    assert (submit.attempt, submit.transfer) == (2, transfer(2))
    desk.add(link, submit)
    assert desk.retarget(link, Retarget(1, 3, Transfer(b"short", "b", "")))
    assert isinstance(link.said[-1], Failed)
    assert not desk.cancel(link, 1)
    desk.add(link, submit)
    assert desk.cancel(link, 1)
    assert link.said[-1] == Finished(1, "cancelled", 2, 0.0, 0.0, None)


def submit_model() -> str:
    return a_submit(0, "both").model


async def test_only_so_many_wait_and_none_twice() -> None:
    desk, link = parked()
    for stream in range(parking.MAX_PARKED):
        submit = a_submit(stream, "both")
        assert desk.problem(link, submit) is None
        desk.add(link, submit)
    full = desk.problem(link, a_submit(10**6, "both"))
    assert full is not None
    assert full.retryable
    twice = desk.problem(link, a_submit(0, "both"))
    assert twice is not None
    assert twice.code == "protocol_error"
    nonsense = Parking(lambda model: 1.0).problem(link, a_submit(1, "both", chain=[b"x"]))
    assert nonsense is not None
    desk.refuse_all(OverloadError("bye"))
    assert len(desk) == 0
