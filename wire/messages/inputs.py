"""What a request asks of a model: its input, and how to choose tokens."""

from __future__ import annotations

from wire.messages.base import WireStruct


class ChatTurn(WireStruct, frozen=True):
    """One message of a conversation; ``role``: system, user, assistant, tool or developer."""

    role: str
    content: str


class ChatInput(WireStruct, frozen=True, tag=1):
    """A conversation: the node renders the model's own chat template."""

    turns: list[ChatTurn]


class TextInput(WireStruct, frozen=True, tag=2):
    """A plain text: the node tokenises it as it is."""

    text: str


class TokensInput(WireStruct, frozen=True, tag=3):
    """Token ids: used as they are."""

    ids: list[int]


Input = ChatInput | TextInput | TokensInput


class Sampling(WireStruct, frozen=True):
    """How to choose tokens. ``temperature`` 0 is greedy; ``max_tokens`` None: up to the context."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int  # unsigned 64-bit; the router draws one when the client gave none
    stop: list[str]
    ignore_eos: bool
