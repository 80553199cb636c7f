"""What the legs of a simulated request say, and the only right answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.request.events import Event
from tests.fakes.fake_answer import answer_ids
from wire.messages import StepEntry, Submit, TextInput, TransferReport

PROMPT = TextInput("p")
REPORT = TransferReport(10, 10, 5, 1.0, 1.0, 0.1, 0.1)
ANSWER = answer_ids(PROMPT, 12)


def wanted(count: int) -> bytes:
    return b"".join(b"<%d>" % i for i in ANSWER[:count])


def entry(stream: int, index: int, count: int) -> StepEntry:
    return StepEntry(stream, index, ANSWER[index : index + count], wanted_at(index, count))


def wanted_at(index: int, count: int) -> bytes:
    return b"".join(b"<%d>" % i for i in ANSWER[index : index + count])


@dataclass
class Leg:
    """A simulated leg: it says its messages in order, each at a random moment.

    ``handoff`` is what a prefill leg says once its hand-over is taken, ``later`` what a decode leg
    says once its prefill leg was sent; ``transfer`` names the hand-over that it works on. ``over``:
    the router heard its end, or lost the link.
    """

    node: str
    submit: Submit
    attempt: int
    transfer: bytes
    said: list[Event] = field(default_factory=list)
    handoff: Event | None = None
    later: list[Event] = field(default_factory=list)
    cancelled: bool = False
    over: bool = False
