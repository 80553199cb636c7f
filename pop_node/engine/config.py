"""How an engine process is set up; told to it as the first message on its socket.

Values with their checks; imports neither torch nor msgspec.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from wire.errors import ConfigError

Backend = Literal["auto", "reference", "native", "triton"]

WeightForm = Literal["plain", "resident"]

WeightChoice = Literal["plain", "resident", "auto"]

DEFAULT_BLOCK_TOKENS = 16
"""Guess between waste at the end of a sequence (half a block) and the length of block tables."""

DEFAULT_TOKEN_BUDGET = 512
"""Tokens per step. Guess: long enough for full matrix-multiply speed, short enough that running
answers do not stall visibly while a long prompt is computed."""

DEFAULT_MAX_SEQUENCES = 64
"""Sequences that hold a seat in the batch at once. Guess: four full batches of 16."""

DEFAULT_MAX_WAITING = 256
"""Sequences that may queue. Guess: beyond it another node is quicker."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What an engine process can have ready before it knows its model: operations, and memory for
    weights, ``memory_bytes`` in one piece of which ``touched_bytes`` are used before."""

    backend: Backend
    threads: int
    batch_invariant: bool
    memory_bytes: int
    touched_bytes: int

    def to_argument(self) -> str:
        """As an argument of the process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> Ahead:
        """Counterpart of ``to_argument``."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs to know before it loads.

    ``context_tokens`` caps the model's own context. ``kv_tokens`` sizes the KV cache; a part of a
    block is left out. ``backend`` "auto" picks the fastest one that works here.
    ``batch_invariant``: the logits of a token are bitwise the same alone, in any batch, after a
    prefix hit, by prefill in any chunks or by decode, among engines of one backend, instruction set
    and dtype (on Triton, of one form of the weights too). ``weights``: how matrices lie in memory,
    as they are or in 12 bits a weight, bit for bit the same (``kernels.resident``), or whichever is
    faster (``weight_form``). Raises ``ConfigError`` for impossible values.
    """

    model_dir: Path
    dtype: str
    backend: Backend
    threads: int
    kv_tokens: int
    context_tokens: int | None = None
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    token_budget: int = DEFAULT_TOKEN_BUDGET
    max_sequences: int = DEFAULT_MAX_SEQUENCES
    max_waiting: int = DEFAULT_MAX_WAITING
    batch_invariant: bool = False
    weights: WeightChoice = "plain"

    def __post_init__(self) -> None:
        for name in ("threads", "block_tokens", "token_budget", "max_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine: {name} is {getattr(self, name)}, must be at least 1")
        if self.kv_tokens < self.block_tokens:
            raise ConfigError(
                f"engine: kv_tokens {self.kv_tokens} is less than one block of {self.block_tokens}"
            )
        if self.context_tokens is not None and self.context_tokens < 2:
            raise ConfigError(f"engine: context_tokens {self.context_tokens} holds no answer")
        if self.max_sequences > self.token_budget:
            raise ConfigError(
                f"engine: {self.max_sequences} sequences cannot each decode a token under a budget "
                f"of {self.token_budget} per step"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.kv_tokens // self.block_tokens
