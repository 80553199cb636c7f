"""Bytes of answers: SSE events and final JSON bodies, in the OpenAI shapes.

Pure. Generated text arrives JSON-escaped from the node, so an event is ``head + text + tail`` where
head and tail are computed once per stream; nothing per token looks into the text. Every event has
an id that says up to which output token a client has read with it (``router.api.event_id``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from router.api.event_id import TextProof, place_of
from router.api.types import ApiKind

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode

ClientFinish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; ``cached_tokens`` of the prompt came from a prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, Any]:
        """The OpenAI usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class StreamRenderer:
    """Events of one streamed answer."""

    def __init__(
        self, kind: ApiKind, answer_id: str, model: str, created_s: int, include_usage: bool
    ) -> None:
        chat = kind == "chat"
        self._chat = chat
        self._include_usage = include_usage
        object_name = b"chat.completion.chunk" if chat else b"text_completion"
        self.id = b"id: %b:" % answer_id.encode()
        self._start = (
            b'\ndata: {"id":'
            + _encode(answer_id)
            + b',"object":"'
            + object_name
            + b'","created":%d' % created_s
            + b',"model":'
            + _encode(model)
            + b',"choices":['
        )
        # With include_usage every chunk but the last carries "usage": null (OpenAI API reference).
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        if chat:
            self.head = self._start + b'{"index":0,"delta":{"content":"'
            self.tail = b'"},"logprobs":null,"finish_reason":null}' + self._end
        else:
            self.head = self._start + b'{"index":0,"text":"'
            self.tail = b'","logprobs":null,"finish_reason":null}' + self._end

    def opening(self) -> bytes:
        """What comes before any text: for chats, the role."""
        if not self._chat:
            return b""
        return (
            self.id
            + place_of(0, TextProof())
            + self._start
            + b'{"index":0,"delta":{"role":"assistant","content":""},'
            + b'"logprobs":null,"finish_reason":null}'
            + self._end
        )

    def text(self, escaped: bytes, place: bytes) -> bytes:
        """One event; ``escaped`` is JSON-escaped UTF-8 without quotes, ``place`` is its id without
        the request's."""
        return b"".join((self.id, place, self.head, escaped, self.tail))

    def closing(self, reason: ClientFinish, usage: Usage, proof: TextProof | None) -> bytes:
        """The finish reason, the usage if asked for, and ``[DONE]``; ``proof`` of all text."""
        finish = reason.encode()
        delta = b'{"index":0,"delta":{},' if self._chat else b'{"index":0,"text":"",'
        start = self.id + place_of(usage.completion_tokens, proof) + self._start
        out = start + delta + b'"logprobs":null,"finish_reason":"' + finish + b'"}' + self._end
        if self._include_usage:
            out += start + b'],"usage":' + _encode(usage.as_json()) + b"}\n\n"
        return out + DONE


def error_event(error_json: bytes) -> bytes:
    """The one typed error event that ends a stream which cannot go on."""
    return b"data: " + error_json + b"\n\n"


def whole_answer(
    kind: ApiKind,
    answer_id: str,
    model: str,
    created_s: int,
    escaped: bytes,
    reason: ClientFinish,
    usage: Usage,
) -> bytes:
    """JSON body of an answer that is not streamed; ``escaped`` as in ``StreamRenderer.text``."""
    if kind == "chat":
        object_name = b"chat.completion"
        choice = b'"message":{"role":"assistant","content":"' + escaped + b'","refusal":null}'
        answer = b'{"index":0,' + choice
    else:
        object_name = b"text_completion"
        answer = b'{"index":0,"text":"' + escaped + b'"'
    return (
        b'{"id":'
        + _encode(answer_id)
        + b',"object":"'
        + object_name
        + b'","created":%d' % created_s
        + b',"model":'
        + _encode(model)
        + b',"choices":['
        + answer
        + b',"logprobs":null,"finish_reason":"'
        + reason.encode()
        + b'"}],"usage":'
        + _encode(usage.as_json())
        + b"}"
    )
