"""JSON bodies that clients send, as strict msgspec structs, and what parsing makes of them.

Owns the shapes and ranges of the supported parameters. Which other parameters are refused and which
are harmless is ``router.api.parse``'s business. Source of names, ranges and defaults: the OpenAI
API reference for chat completions and (legacy) completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from wire.messages import Input, Sampling

ApiKind = Literal["chat", "completion"]

MAX_COUNT = 2**31 - 1
"""Largest token count or token id taken from a client: more than any context or vocabulary."""

MAX_STOP_STRINGS = 4
"""Source: OpenAI API reference."""

MAX_STOP_CHARS = 256
"""Longest stop string, in characters. Guess: nodes hold back that much text of every stream."""

MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
"""Guesses: far beyond what leaves a text readable. Logits are divided by it: near 0 they would be
infinite."""

Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
Temperature = Annotated[float, msgspec.Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=MAX_COUNT)]
MinP = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
RepetitionPenalty = Annotated[
    float, msgspec.Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)
]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]
StopList = Annotated[list[StopString], msgspec.Meta(max_length=MAX_STOP_STRINGS)]


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str | list[TextPart]

    def text(self) -> str:
        """The content as one string; parts are joined as they stand."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a streamed answer."""

    include_usage: bool = False


class GenerationBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Parameters that both endpoints share.

    ``top_k`` (0 or -1: all tokens), ``min_p`` and ``repetition_penalty`` are extensions that vLLM
    and others have under these names; the other ranges are those of the OpenAI API reference.
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    max_tokens: Count | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    seed: int | None = None
    stop: StopString | StopList | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0


class ChatBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: Count | None = None


class CompletionBody(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[TokenId]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that is well formed; whether the mesh can serve it is still open.

    ``max_tokens`` None means "to the context"; ``seed`` is unsigned 64-bit or None (router draws).
    """

    kind: ApiKind
    model: str
    input: Input
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def sampling(self, drawn_seed: int) -> Sampling:
        """The wire form, with ``drawn_seed`` where the client gave none."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=drawn_seed if self.seed is None else self.seed,
            stop=list(self.stop),
            ignore_eos=self.ignore_eos,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
        )
