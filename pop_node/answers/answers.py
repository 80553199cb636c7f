"""Answers of this node that somebody may ask for again, because they were lost on the way.

A record is what a new attempt needs: the newest ``Submit`` and all output tokens so far. Text is
not kept, it follows from them (``text_after``). Pure: time is an argument, in seconds of a
monotonic clock; records leave ``KEEP_S`` after their leg ended, or sooner when there are too many.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pop_node.text.stream import TextStream, escape_json
from pop_node.text.tokenizer import TextCodec
from wire.messages import Submit
from wire.prefix import canonical_bytes

KEEP_S = 30.0
"""How long after its leg's end an answer can be asked for; routers promise the same to clients."""

MAX_ANSWERS = 1024
"""Per model: as many as there can be legs."""

MAX_BYTES = 32 * 1024 * 1024
"""Of prompts and ids, per model: 1024 prompts of 30 KB."""

BYTES_PER_TOKEN = 36
"""A list's place and a Python int."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of an answer. ``ids`` are its output tokens, forced ones included; ``reason``
    is "stop" or "length" when that is all of it, "" when it could go on."""

    submit: Submit
    ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    reason: str

    @property
    def key(self) -> Key:
        """Tenant and request id: who may ask, and for what."""
        return self.submit.tenant, self.submit.request_id

    @property
    def num_bytes(self) -> int:
        """What keeping it costs, roughly."""
        return len(canonical_bytes(self.submit.input)) + BYTES_PER_TOKEN * len(self.ids)


def fullest(answers: Iterable[Answer]) -> Answer | None:
    """The one with most tokens, a complete one before one that is not."""
    return max(answers, key=lambda answer: (len(answer.ids), answer.reason != ""), default=None)


class AnswerBook:
    """Records of legs that have ended, by tenant and request id; the oldest leave first."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._kept: dict[Key, tuple[Answer, float]] = {}  # in the order in which they expire

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, answer: Answer, now: float) -> None:
        """Keep an answer unless a fuller one is kept under its key."""
        held = self.get(*answer.key, now)
        if held is not None:
            if fullest((answer, held)) is held:
                return
            self._remove(answer.key)
        self._kept[answer.key] = answer, now + KEEP_S
        self.num_bytes += answer.num_bytes
        while self._kept and (len(self._kept) > MAX_ANSWERS or self.num_bytes > MAX_BYTES):
            self._remove(next(iter(self._kept)))

    def get(self, tenant: str, request_id: str, now: float) -> Answer | None:
        """The answer, if it is kept and not expired."""
        answer, expires_at = self._kept.get((tenant, request_id), (None, now))
        return answer if expires_at > now else None

    def expire(self, now: float) -> None:
        """Drop what nobody may ask for any more."""
        while self._kept:
            key, (_, expires_at) = next(iter(self._kept.items()))
            if expires_at > now:
                return
            self._remove(key)

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do."""
        return next((expires_at for _, expires_at in self._kept.values()), None)

    def _remove(self, key: Key) -> None:
        answer, _ = self._kept.pop(key)
        self.num_bytes -= answer.num_bytes


def text_after(codec: TextCodec, answer: Answer, from_index: int) -> bytes:
    """What became printable by the tokens from ``from_index`` on, JSON-escaped; takes time in
    proportion to all tokens, so it runs on a worker thread."""
    stream = TextStream(codec, answer.submit.sampling.stop)
    stream.push(answer.ids[:from_index])
    text = stream.push(answer.ids[from_index:]).text
    if answer.reason:
        text += stream.flush()
    return escape_json(text)
