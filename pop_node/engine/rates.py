"""How fast this engine has been, as far as there is enough evidence to say so.

Routers compare nodes by these figures, so a number that rests on a step or two would send requests
across an ocean for noise: until there is enough evidence the rate is 0, "not measured yet", and all
nodes are priced alike. Pure; durations are arguments, in seconds.
"""

from __future__ import annotations

from pop_node.engine.messages import StepDone
from pop_node.engine.scheduling.schedule import Load

SMOOTHING = 0.2
"""Weight of the newest step. Guess: five steps to forget a load."""

MIN_CHUNK_TOKENS = 16
"""Prefill chunks below this (a block) say more about the fixed cost of a step than about the rate.
Guess."""

MIN_PREFILL_TOKENS = 128
MIN_DECODE_STEPS = 16
"""Evidence before a rate is told. Guesses: a short answer's worth. The first tokens of every node,
computed while all of them start on the same cores, differed by half (measured on two cores)."""


class StepRates:
    """Fading averages over the steps of one engine."""

    def __init__(self) -> None:
        self._prefill_tokens = self._prefill_s = 0.0  # fading sums
        self._seen_prefill_tokens = 0
        self._decode_step_s = 0.0
        self._seen_decode_steps = 0

    def step(self, prefill_tokens: int, seconds: float) -> None:
        """Count one step that computed ``prefill_tokens`` prompt tokens (0: it only decoded)."""
        if prefill_tokens == 0:
            self._seen_decode_steps += 1
            # A plain mean until there are enough steps for a fading one.
            weight = max(SMOOTHING, 1 / self._seen_decode_steps)
            self._decode_step_s += weight * (seconds - self._decode_step_s)
        elif prefill_tokens >= MIN_CHUNK_TOKENS:
            # A rate of sums: long chunks, which most tokens wait for, count for more.
            self._seen_prefill_tokens += prefill_tokens
            self._prefill_tokens += prefill_tokens - SMOOTHING * self._prefill_tokens
            self._prefill_s += seconds - SMOOTHING * self._prefill_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0: not measured yet."""
        if self._seen_prefill_tokens < MIN_PREFILL_TOKENS or self._prefill_s <= 0:
            return 0.0
        return self._prefill_tokens / self._prefill_s

    @property
    def decode_step_ms(self) -> float:
        """Milliseconds of a step that only decodes; 0: not measured yet."""
        return self._decode_step_s * 1000 if self._seen_decode_steps >= MIN_DECODE_STEPS else 0.0

    def step_done(self, tokens: list[tuple[int, int, int, str]], load: Load) -> StepDone:
        """What the agent is told after a step: its ``tokens``, the load after it and the rates."""
        return StepDone(
            tokens=tokens,
            queued_prefill_tokens=load.queued_prefill_tokens,
            running=load.running,
            waiting=load.waiting,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_step_ms=self.decode_step_ms,
            pinned=load.pinned,
            drafted=load.drafted,
            accepted=load.accepted,
        )
