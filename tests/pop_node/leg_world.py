"""A leg with a fake engine, KV stream and detokeniser around it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pop_node.engine import messages as engine
from pop_node.legs import events as ev
from pop_node.legs import leg as legs
from wire.errors import PeerError, RequestError, TransferError
from wire.messages import (
    Detached,
    Failed,
    Finished,
    Refused,
    Sampling,
    Submit,
    TextInput,
    Transfer,
    TransferReport,
)

REPORT = TransferReport(100, 100, 50, 1.0, 2.0, 1.0, 0.5)
EOS = 2


@dataclass
class FakeText:
    """A fake detokeniser: token n reads "<n>"; the text "<7>" is a stop string."""

    seen: list[int] = field(default_factory=list)

    def push(self, ids):
        self.seen += ids
        text = "".join(f"<{i}>" for i in ids if i != 7)
        return FakeDelta(text, 7 in ids)

    def flush(self):
        return "!"


@dataclass
class FakeDelta:
    text: str
    stopped: bool


def make_leg(kind="both", forced=(), version=1):
    transfer = None if kind == "both" else Transfer(b"t" * 16, "peer", "127.0.0.1:1")
    submit = Submit(
        stream=5,
        request_id="r",
        attempt=1,
        leg=kind,
        model="m",
        tenant="",
        input=TextInput("hello"),
        sampling=Sampling(8, 0.0, 1.0, 1, [], False),
        forced_ids=list(forced),
        transfer=transfer,
        chain=[],
        deadline_remaining_ms=1000,
    )
    return legs.Leg(1, submit, frozenset({EOS}), lambda text: text.encode(), version)


def said(effects):
    return [e.message for e in effects if isinstance(e, ev.Say)]


def prepared():
    return ev.Prepared([10, 11, 12], 8, FakeText())


class World:
    """A fake engine and KV stream that answer a leg's effects when the test lets them."""

    def __init__(self, kind: str, version: int = 1) -> None:
        self.leg = make_leg(kind, version=version)
        self.kind = kind
        self.id = b"t" * 16  # of the transfer that the leg may speak of
        self.waits = False
        self.detached = 0
        self.retargets = 0
        self.in_engine = self.over = False
        self.transfer = "none"
        self.endings: list[object] = []
        self.index = 0
        self.tokenising = True
        self.finished_by_engine = False

    def feed(self, event) -> None:
        for effect in self.leg.handle(event):
            assert not self.over, "an effect after Over"
            match effect:
                case ev.ToEngine(engine.Add()):
                    assert not self.in_engine
                    self.in_engine = True
                case ev.ToEngine(engine.Drop() | engine.Release() as message):
                    assert self.in_engine
                    kept = getattr(message, "kept_tokens", 0)
                    assert kept == 0 or self.kind == "decode"
                    assert kept == self.endings[-1].kept_tokens if kept else True
                    self.finished_by_engine = True
                case ev.ToEngine(engine.Retarget(old, new)):
                    assert self.in_engine
                    assert (old, new) == (self.id, self.leg.transfer_id)
                    assert self.transfer == "closed"
                    self.id, self.transfer = new, "none"
                case ev.OpenTransfer() | ev.ExpectTransfer():
                    assert self.transfer == "none"
                    self.id, self.transfer = self.leg.transfer_id, "open"
                case ev.CancelTransfer():
                    assert self.transfer == "open"
                    assert effect.transfer == self.id
                    self.transfer = "closed"
                case ev.CommitTransfer():
                    assert self.transfer == "open"
                case ev.AwaitRetarget():
                    assert not self.waits
                    self.waits = True
                case ev.StopWaiting():
                    assert self.waits
                    self.waits = False
                case ev.Say(Detached()):
                    assert self.transfer == "closed"
                    assert not self.endings
                    self.detached += 1
                case ev.Say(Refused() | Finished() | Failed() as message):
                    self.endings.append(message)
                case ev.Over():
                    self.over = True

    def choices(self):
        out = []
        if self.tokenising:
            out += [prepared(), ev.PrepareFailed(RequestError("bad"))]
        if self.in_engine:
            out += [engine.Allocated(1, 0), engine.PrefillDone(1, 0.0, 1.0)]
            if self.leg.state == "running" and self.index < 6:
                finishes = ["handoff", "stop"] if self.kind == "prefill" else ["", "stop"]
                if self.kind != "decode" or self.transfer == "closed":
                    out += [engine.Token(1, self.index, 40 + self.index, f) for f in finishes]
            if self.leg.state == "queued":
                out.append(engine.Declined(1, "overloaded", "full"))
            if self.finished_by_engine:
                out.append(engine.Ended(1))
        if self.transfer == "open":
            out.append(ev.TransferFailed(TransferError("lost"), 16))
            out.append(ev.TransferFailed(TransferError("x", code="prompt_mismatch"), 16))
            if self.kind == "prefill" and self.leg.state == "handoff":
                out.append(ev.TransferDone(REPORT))
            if self.kind == "decode" and self.leg.state == "running":
                out.append(ev.TransferCommitted([40]))
        if self.waits:
            out.append(ev.WaitedEnough())
        if self.kind == "prefill" and self.leg.state != "closing" and self.retargets < 3:
            new = bytes([self.retargets]) * 16
            out.append(ev.Retargeted(self.retargets + 2, Transfer(new, "other", "127.0.0.1:2")))
        out.append(ev.Cancelled(16))
        out.append(ev.Broken(PeerError("deadline"), engine_gone=False))
        return out

    def step(self, event) -> None:
        match event:
            case ev.Retargeted():
                self.retargets += 1
            case ev.WaitedEnough():
                self.waits = False
            case ev.Prepared() | ev.PrepareFailed():
                self.tokenising = False
            case engine.Token():
                self.index += 1
                self.finished_by_engine |= event.finish == "stop"
            case engine.Declined() | engine.Ended():
                self.in_engine = False
            case ev.TransferFailed() | ev.TransferDone():
                self.transfer = "closed"
            case ev.TransferCommitted():
                self.transfer = "closed"
                self.index = 1
        self.feed(event)
