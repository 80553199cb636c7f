"""What a request asks of a model: its input, and how to choose tokens."""

from __future__ import annotations

from wire.messages.base import MIN_VERSION, WireStruct

LIMITS_VERSION = 4
"""First version that knows ``top_k`` and what follows it."""


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
    """How to choose tokens. ``temperature`` 0 is greedy; ``max_tokens`` None: up to the context.

    From ``top_k`` on version 4; an older node would not know of it, see ``needed_version``.
    ``top_k`` 0 keeps every token, like ``min_p`` 0.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int  # unsigned 64-bit; the router draws one when the client gave none
    stop: list[str]
    ignore_eos: bool
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def needed_version(self) -> int:
        """The first version of the mesh wire that says all that is asked here."""
        news = (
            self.top_k,
            self.min_p,
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
        )
        return MIN_VERSION if news == (0, 0.0, 0.0, 0.0, 1.0) else LIMITS_VERSION
