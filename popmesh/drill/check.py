"""Was an answer what it would have been without any fault? Pure.

The reference is what the same mesh said to the same request before the first fault. Text is
compared, so is the number of tokens that usage reports, and event ids have to climb to it. Text
that differs from some point on, with the right number of tokens, is its own verdict ("differs"): a
mesh whose numerics depend on the batch may do that, an exact one may not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from popmesh.drill.observation import Observation, upto_of

VerdictKind = Literal[
    "right", "differs", "repeated", "missing", "misnumbered", "cut", "error", "refused", "hang"
]

FAILURES: tuple[VerdictKind, ...] = (
    "repeated", "missing", "misnumbered", "cut", "error", "refused", "hang",
)  # fmt: skip
"""Verdicts that no mesh may earn; "differs" joins them where answers have to be exact."""

EXCERPT_CHARS = 24
LOSS_SLACK_S = 0.5
"""A client may feel the end of a router a moment before the drill has noted its own blow."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``detail`` says what is wrong, in words; empty for "right"."""

    kind: VerdictKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """A router was out, from ``start_s`` to ``end_s`` on the drill's clock, by our own doing."""

    url: str
    start_s: float
    end_s: float


def judge(seen: Observation, reference: Observation, windows: Iterable[Window]) -> Verdict:
    """The worst that can be said of ``seen``."""
    return (
        _how_it_ended(seen, list(windows))
        or _count(seen, reference)
        or _numbering(seen)
        or _text(seen, reference)
        or Verdict("right")
    )


def _how_it_ended(seen: Observation, windows: list[Window]) -> Verdict | None:
    if seen.timed_out:
        waited_s = seen.ended_s - (seen.arrivals[-1] if seen.arrivals else seen.started_s)
        return Verdict("hang", f"no end by the deadline; the last {waited_s:.1f} s were silent")
    if seen.error is not None:
        code, message = seen.error
        refused = seen.status is not None and not seen.arrivals
        kind: VerdictKind = "refused" if refused else "error"
        return Verdict(kind, f"{code}: {message}")
    for loss in seen.losses:
        if not any(
            window.url == loss.url
            and window.start_s - LOSS_SLACK_S <= loss.at_s <= window.end_s + LOSS_SLACK_S
            for window in windows
        ):
            if loss.refused:
                return Verdict("refused", f"{loss.url}, which was not harmed: {loss.message}")
            return Verdict("cut", f"{loss.url} broke off though it was not harmed: {loss.message}")
    if not seen.complete:
        return Verdict("cut", "the stream ended without its end")
    return None


def _count(seen: Observation, reference: Observation) -> Verdict | None:
    """Tokens, where the request fixes their number."""
    if not seen.ask.ignore_eos or seen.completion_tokens == reference.completion_tokens:
        return None
    said, expected = seen.completion_tokens, reference.completion_tokens
    kind: VerdictKind = "missing" if (said or 0) < (expected or 0) else "repeated"
    return Verdict(kind, f"{said} tokens by usage, {expected} were asked for")


def _numbering(seen: Observation) -> Verdict | None:
    """Event ids name one request and climb to the number of tokens in usage."""
    if not seen.ids:
        return None
    requests = {event_id.rpartition(":")[0] for event_id in seen.ids}
    counts = [upto_of(event_id) for event_id in seen.ids]
    if len(requests) > 1 or None in counts:
        return Verdict("misnumbered", f"event ids of several requests or forms: {seen.ids[-1]!r}")
    numbers = [count for count in counts if count is not None]
    for earlier, later in itertools.pairwise(numbers):
        if later <= earlier:
            return Verdict("repeated", f"event id {later} came after {earlier}")
    if numbers[-1] != seen.completion_tokens:
        said = f"the last event id says {numbers[-1]} tokens, usage {seen.completion_tokens}"
        return Verdict("misnumbered", said)
    return None


def _text(seen: Observation, reference: Observation) -> Verdict | None:
    text, expected = seen.text, reference.text
    if text == expected:
        if seen.finish_reason == reference.finish_reason:
            return None
        return Verdict("differs", f"{seen.finish_reason} instead of {reference.finish_reason}")
    head = _common_head(text, expected)
    tail = _common_head(text[head:][::-1], expected[head:][::-1])
    where = f"at character {head}"
    if head + tail == len(expected):
        extra = text[head : len(text) - tail]
        if text[:head].endswith(extra) or text[head + len(extra) :].startswith(extra):
            return Verdict("repeated", f"{where}: {_cut(extra)!r} twice")
    if head + tail == len(text):
        return Verdict("missing", f"{where}: {_cut(expected[head : len(expected) - tail])!r}")
    return Verdict("differs", f"{where}: {_cut(text[head:])!r}, not {_cut(expected[head:])!r}")


def _common_head(one: str, other: str) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def _cut(text: str) -> str:
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "…"
