"""What the clients of a drill ask: a fixed, seeded set of requests. Pure.

Prompts are made of plain words, short and long, so that prefill takes from a few to some hundred
milliseconds and the KV cache is worth sending; each begins with its own number, so that no two
share a prefix. Half are greedy, half are sampled with a seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat", "completion"]

SHORT_WORDS = (8, 40)
LONG_WORDS = (150, 420)
"""Guess: a long prompt of the small test model's tokenizer is 200 to 600 tokens, two to five chunks
of chunked prefill."""

MAX_TOKENS = (1, 8, 24, 48, 64)
"""Answers from one token, which never reach a decode node, to a second or two of decoding."""

_TEXT = (
    "the harbour was quiet when a ship with red sails came in from the north and its captain asked "
    "for water bread and a map of islands that nobody had drawn yet so we gave him paper ink and "
    "three winters of weather records while children counted gulls on every roof along our shore"
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; ``number`` names it in reports."""

    number: int
    kind: Kind
    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool

    @property
    def path(self) -> str:
        """Where it is posted."""
        return "/v1/chat/completions" if self.kind == "chat" else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body of a streamed request."""
        told: dict[str, Any] = {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.kind == "chat":
            return told | {"messages": [{"role": "user", "content": self.prompt}]}
        return told | {"prompt": self.prompt}


def make_asks(count: int, rng: random.Random) -> list[Ask]:
    """``count`` requests in which every mixture of kind, length and sampling comes up."""
    asks = []
    for number in range(count):
        bounds = LONG_WORDS if number % 4 in (1, 2) else SHORT_WORDS
        words = rng.choices(_TEXT.split(), k=rng.randint(*bounds))
        asks.append(
            Ask(
                number=number,
                kind="chat" if number % 2 else "completion",
                prompt=f"{rng.randrange(10**9)}. {' '.join(words)}",
                max_tokens=MAX_TOKENS[number % len(MAX_TOKENS)],
                temperature=0.0 if number % 4 < 2 else rng.choice((0.5, 0.8, 1.0)),
                seed=rng.getrandbits(63),
                ignore_eos=number % 6 != 0,
            )
        )
    return asks
