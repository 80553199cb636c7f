"""Is a command something this engine could ever carry out? Pure; the only place that decides it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pop_node.engine.messages import Add
from pop_node.engine.scheduling.sequence import Sequence

SEED_LIMIT = 2**64
TOP_K_LIMIT = 2**31
TRANSFER_ID_BYTES = 16

PENALTY_LIMIT = 1e6
"""Largest penalty, and with its inverse the bounds of the one that divides. Guess: far beyond all
that changes a text, while penalised logits stay finite in float32: others allow no token."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded model and its cache can hold."""

    vocab_size: int
    context_tokens: int
    block_tokens: int
    num_blocks: int


def problem_with_add(add: Add, limits: Limits) -> tuple[str, str] | None:
    """(code, message) when ``add`` must be declined, else None.

    ``code`` is one of ``wire.errors``: "invalid_request", "empty_prompt",
    "context_length_exceeded" or "out_of_blocks".
    """
    if add.leg not in ("prefill", "decode", "both"):
        return "invalid_request", f"unknown leg {add.leg!r}"
    if not add.prompt_ids:
        return "empty_prompt", "the prompt holds no token"
    for name, ids in (("prompt", add.prompt_ids), ("forced", add.forced_ids)):
        if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
            return "invalid_request", (
                f"a {name} id lies outside the vocabulary of {limits.vocab_size} tokens"
            )
    if add.max_tokens <= len(add.forced_ids):
        return "invalid_request", (
            f"max_tokens {add.max_tokens} leaves nothing to produce after "
            f"{len(add.forced_ids)} forced tokens"
        )
    if not (math.isfinite(add.temperature) and add.temperature >= 0):
        return "invalid_request", f"temperature {add.temperature} is not a number from 0 up"
    if not 0 < add.top_p <= 1:
        return "invalid_request", f"top_p {add.top_p} is not above 0 and at most 1"
    problem = _problem_with_limits(add)
    if problem is not None:
        return problem
    if not 0 <= add.seed < SEED_LIMIT:
        return "invalid_request", f"seed {add.seed} is not an unsigned 64-bit number"
    if add.leg != "both" and len(add.transfer) != TRANSFER_ID_BYTES:
        return (
            "invalid_request",
            f"a {add.leg} leg needs a transfer id of {TRANSFER_ID_BYTES} bytes",
        )
    length = len(add.prompt_ids) + add.max_tokens
    if length > limits.context_tokens:
        return "context_length_exceeded", (
            f"{len(add.prompt_ids)} prompt tokens and {add.max_tokens} to produce exceed the "
            f"context of {limits.context_tokens}"
        )
    # The last token produced needs no KV; a prefill leg keeps only what it was given.
    computed = len(add.prompt_ids) + len(add.forced_ids) if add.leg == "prefill" else length - 1
    blocks = -(-computed // limits.block_tokens)
    if blocks > limits.num_blocks:
        return "out_of_blocks", f"{blocks} KV blocks needed, the engine has {limits.num_blocks}"
    return None


def _problem_with_limits(add: Add) -> tuple[str, str] | None:
    if not 0 <= add.top_k < TOP_K_LIMIT:
        return "invalid_request", f"top_k {add.top_k} is not an unsigned 31-bit number"
    if not 0 <= add.min_p <= 1:
        return "invalid_request", f"min_p {add.min_p} is not from 0 to 1"
    if not 1 / PENALTY_LIMIT <= add.repetition_penalty <= PENALTY_LIMIT:
        return "invalid_request", (
            f"repetition_penalty {add.repetition_penalty} is not from {1 / PENALTY_LIMIT:g} to "
            f"{PENALTY_LIMIT:g}"
        )
    for penalty in (add.frequency_penalty, add.presence_penalty):
        if not abs(penalty) <= PENALTY_LIMIT:
            return "invalid_request", f"a penalty of {penalty} is beyond {PENALTY_LIMIT:g}"
    return None


def problem_with_commit(sequence: Sequence, ids: list[int], limits: Limits) -> str | None:
    """Why a decode leg cannot go on after the output ``ids``, or None."""
    given = sequence.emitted_from
    if len(ids) <= given or ids[:given] != sequence.ids[sequence.prompt_tokens :].tolist():
        return "the committed ids do not continue the forced ones"
    if len(ids) >= sequence.max_tokens:
        return "the committed ids leave nothing to decode"
    if not (min(ids) >= 0 and max(ids) < limits.vocab_size):
        return "a committed id lies outside the vocabulary"
    return None
