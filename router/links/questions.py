"""Questions to a node that have one answer each, matched by number: ``Attach`` and ``Drill``.

A drill is answered once it begins; one that reports, by its report.

Knows neither links nor time; ``node_link`` sends the questions and hands the answers in.
"""

from __future__ import annotations

import asyncio

from wire.errors import MeshError
from wire.messages import COLD_START, Attach, Attached, Drill, DrillReport, DrillStarted, Refused

Answer = Attached | Refused | DrillStarted | DrillReport

ANSWER_TIMEOUT_S = 2.0
"""Longest wait for an answer. Nodes answer from memory in one round trip, and the longest on Earth
is a third of a second; a node that needs longer is as good as gone to a client that waits."""


def reports(question: Attach | Drill) -> bool:
    """``DrillReport`` is the answer to wait for."""
    return isinstance(question, Drill) and question.fault == COLD_START


def version_of(question: Attach | Drill) -> int:
    """The first version of the mesh wire that knows the question."""
    return 3 if reports(question) else 2


class Questions:
    """Open questions of one link. Whoever asks bounds how many there are."""

    def __init__(self) -> None:
        self._open: dict[int, asyncio.Future[Answer]] = {}
        self._reporting: set[int] = set()

    def open(self, number: int, reports: bool = False) -> asyncio.Future[Answer]:
        """The answer to question ``number``, once it is here; numbers are used once.

        ``reports``: that it begins is no answer yet.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        if reports:
            self._reporting.add(number)
        return future

    def close(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._open.pop(number, None)
        self._reporting.discard(number)

    def answered(self, number: int, answer: Answer) -> bool:
        """Hand an answer to whoever waits for it; False when nobody does."""
        future = self._open.get(number)
        if future is None or future.done():
            return False
        if number in self._reporting and isinstance(answer, DrillStarted) and not answer.error:
            return True
        future.set_result(answer)
        return True

    def lost(self, error: MeshError) -> None:
        """The link is gone: no open question will be answered."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
