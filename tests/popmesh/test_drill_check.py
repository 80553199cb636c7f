"""What counts as right, and what is said of what is not."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.drill.check import Window, judge
from popmesh.drill.observation import Loss, Observation, upto_of
from popmesh.drill.statistics import FaultSpan, pause_of, quantiles
from popmesh.drill.workload import make_asks
from popmesh.sse import SseEvent, SseParser
from wire.errors import PeerError

ASK = replace(make_asks(1, random.Random(1))[0], ignore_eos=True)
TEXTS = ["Once", " upon", " a", " time", " there"]


def event(text: str, upto: int, finish: str | None = None) -> SseEvent:
    said = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    return SseEvent(f"req:{upto}", msgspec.json.encode(said))


def answer(texts: list[str], tokens: int | None = None, start: float = 0.0) -> Observation:
    seen = Observation(ASK, 0, start)
    for number, text in enumerate(texts, 1):
        seen.take(event(text, number), start + number / 10)
    seen.take(event("", len(texts), "length"), start + 1)
    usage = {"choices": [], "usage": {"completion_tokens": tokens or len(texts)}}
    seen.take(SseEvent("", msgspec.json.encode(usage)), start + 1)
    seen.take(SseEvent("", b"[DONE]"), start + 1)
    seen.ended_s = start + 1
    return seen


REFERENCE = answer(TEXTS)


def verdict(seen: Observation, *windows: Window) -> tuple[str, str]:
    found = judge(seen, REFERENCE, windows)
    return found.kind, found.detail


def test_the_same_answer_is_right():
    assert verdict(answer(TEXTS)) == ("right", "")
    assert answer(TEXTS).finish_reason == "length"


@pytest.mark.parametrize(
    ("texts", "tokens", "kind", "said"),
    [
        (["Once", " upon", " upon", " a", " time", " there"], 5, "misnumbered", "6 tokens"),
        (["Once", " upon upon", " a", " time", " there"], 5, "repeated", "upon"),
        (["Once", "", " a", " time", " there"], 5, "missing", "upon"),
        (["Once", " upon", " a", " time", ""], 5, "missing", "' there'"),
        (["Once", " upon", " a", " Friday", " there"], 5, "differs", "not 'time there'"),
        (["Once", " upon", " a", " time"], 4, "missing", "4 tokens by usage, 5"),
        ([*TEXTS, "!"], 6, "repeated", "6 tokens by usage, 5"),
    ],
)
def test_what_is_wrong_is_named(texts, tokens, kind, said):
    found, detail = verdict(answer(texts, tokens))
    assert found == kind
    assert said in detail


@given(st.lists(st.sampled_from(["a", "b", " the", "."]), min_size=2, max_size=12), st.data())
def test_a_lost_or_doubled_token_is_never_right(texts, data):
    at = data.draw(st.integers(0, len(texts) - 1))
    reference = answer(texts)
    lost = answer([*texts[:at], "", *texts[at + 1 :]])
    assert judge(lost, reference, ()).kind == "missing"
    doubled = answer([*texts[:at], texts[at] * 2, *texts[at + 1 :]])
    assert judge(doubled, reference, ()).kind == "repeated"


def test_ids_climb_to_the_number_of_tokens():
    backwards = answer(TEXTS)
    backwards.ids = ["req:1", "req:3", "req:2", "req:5"]
    assert verdict(backwards) == ("repeated", "event id 2 came after 3")
    other = answer(TEXTS)
    other.ids = ["req:1", "another:5"]
    assert verdict(other)[0] == "misnumbered"
    short = answer(TEXTS)
    short.ids = short.ids[:-1]
    assert verdict(short)[0] == "misnumbered"
    assert (upto_of("req:12"), upto_of("req"), upto_of("req:x")) == (12, None, None)


def test_endings():
    cut = answer(TEXTS)
    cut.complete = False
    assert verdict(cut)[0] == "cut"
    error = answer(TEXTS)
    error.error = ("no_route", "nobody")
    assert verdict(error) == ("error", "no_route: nobody")
    refused = Observation(ASK, 0, 0.0, error=("overloaded", "busy"), status=503)
    assert verdict(refused)[0] == "refused"
    hang = answer(TEXTS)
    hang.timed_out, hang.ended_s = True, 61.0
    kind, detail = verdict(hang)
    assert kind == "hang"
    assert "60.5 s" in detail


def test_a_lost_connection_is_fine_only_while_its_router_was_harmed():
    seen = answer(TEXTS)
    seen.losses = [Loss(10.0, "http://r1", "reset")]
    assert verdict(seen, Window("http://r1", 9.0, 20.0))[0] == "right"
    assert verdict(seen, Window("http://r2", 9.0, 20.0))[0] == "cut"
    assert verdict(seen, Window("http://r1", 11.0, 20.0))[0] == "cut"
    seen.losses = [Loss(10.0, "http://r1", "no_route", refused=True)]
    assert verdict(seen, Window("http://r1", 9.0, 20.0))[0] == "right"
    assert verdict(seen)[0] == "refused"


def test_an_answer_may_end_by_itself_where_it_was_allowed_to():
    free = replace(ASK, ignore_eos=False)
    short, long = answer(TEXTS[:3]), answer(TEXTS)
    short.ask = long.ask = free
    assert judge(short, long, ()).kind == "missing", "the text ends early"
    other = answer(["Once", " more"])
    other.ask = free
    assert judge(other, long, ()).kind == "differs"


def test_a_pause_is_the_longest_wait_while_a_fault_was_there():
    seen = Observation(ASK, 0, 0.0, attempts=2, ended_s=9.0)
    seen.arrivals = [1.0, 1.1, 4.0, 4.1, 8.9]
    faults = [
        FaultSpan(1, "a", 1.05, 3.0),
        FaultSpan(2, "b", 2.0, 3.5),
        FaultSpan(3, "c", 20.0, 30.0),
    ]
    pause = pause_of(seen, faults)
    assert pause is not None
    assert (pause.fault, pause.start_s, round(pause.length_s, 6)) == (1, 1.1, 2.9)
    later = pause_of(seen, faults[1:])
    assert later is not None
    assert later.fault == 2, "the first that came, where none was there at its beginning"
    assert pause_of(replace(seen, attempts=1), faults) is None
    stood_still = pause_of(replace(seen, attempts=1, nodes=("z", "a")), faults)
    assert stood_still is not None
    assert (stood_still.fault, stood_still.start_s) == (1, 1.1)
    short = replace(seen, attempts=1, nodes=("a",), arrivals=[0.5, 1.0, 1.9, 2.8, 3.1, 9.0])
    assert pause_of(short, faults[:1]) is None, "nothing that a load does not explain"
    assert pause_of(seen, faults[2:]) is None


def test_quantiles_are_by_nearest_rank():
    assert quantiles([]).count == 0
    hundred = quantiles(float(n) for n in range(100, 0, -1))
    assert (hundred.p50_s, hundred.p90_s, hundred.p99_s, hundred.max_s) == (50, 90, 99, 100)
    assert quantiles([2.0]).p50_s == 2.0


STREAM = (
    b": hello\n\nid: req:1\ndata: one\n\ndata: two\r\nid: req:2\r\n\r\n"
    b"event: x\ndata: a\ndata: b\n\nid: req:9\n\ndata: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_events_are_the_same_whatever_the_cuts(cuts):
    parser, found = SseParser(), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        found += parser.feed(STREAM[start:end])
    assert found == [
        SseEvent("req:1", b"one"),
        SseEvent("req:2", b"two"),
        SseEvent("", b"a\nb"),
        SseEvent("", b"[DONE]"),
    ]


def test_an_endless_event_is_refused():
    parser = SseParser()
    for _ in range(15):
        parser.feed(b"data: " + b"x" * 65536 + b"\n")
    with pytest.raises(PeerError, match="too large"):
        parser.feed(b"data: " + b"x" * 65536 + b"\n")


def test_asks_are_seeded_and_mixed():
    asks = make_asks(32, random.Random(4))
    assert asks == make_asks(32, random.Random(4))
    assert asks != make_asks(32, random.Random(5))
    assert len({ask.prompt.split()[0] for ask in asks}) == 32
    mixtures = {(a.kind, a.temperature > 0, len(a.prompt) > 500) for a in asks}
    assert len(mixtures) >= 4
    body = asks[1].body("m")
    assert body["messages"][0]["content"] == asks[1].prompt
    assert body["stream_options"] == {"include_usage": True}
    assert asks[0].body("m")["prompt"] == asks[0].prompt
