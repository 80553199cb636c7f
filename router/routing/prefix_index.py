"""Which node holds how much of a prompt's beginning, from the digests that nodes publish.

Also learns how many tokens a byte of text is worth, per model. Synchronous, bounded, clock-free.
"""

from __future__ import annotations

from wire.messages import CacheDelta

MAX_VALUES_PER_NODE = 65_536
"""Chain values kept per node and model: 16 MiB of prompt text at 256 bytes a value; beyond it a
node's new values are not recorded, which costs a prefix hit and nothing else."""

MAX_MODELS_PER_NODE = 64
"""Models per node whose digests are kept; a node serves a handful."""

DEFAULT_TOKENS_PER_BYTE = 0.25
"""Until a model's own ratio is learned. Source: usual English text, 4 bytes a token."""

_LEARNING = 0.1  # weight of a new observation; guess: settles within some twenty requests
_MIN_LEARN_BYTES = 64  # shorter prompts are mostly template


class PrefixIndex:
    """Chain values by model, each with the nodes that hold it and the tokens it stands for."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[bytes, dict[str, int]]] = {}
        self._by_node: dict[str, dict[str, set[bytes]]] = {}

    def apply(self, node: str, delta: CacheDelta) -> None:
        """Take over one node's change."""
        models = self._by_node.setdefault(node, {})
        if delta.model not in models and len(models) >= MAX_MODELS_PER_NODE:
            return
        held = models.setdefault(delta.model, set())
        values = self._by_model.setdefault(delta.model, {})
        if delta.reset:
            for value in held:
                _remove(values, value, node)
            held.clear()
        for value in delta.removed:
            if value in held:
                held.discard(value)
                _remove(values, value, node)
        for value, tokens in delta.added:
            if value in held or len(held) < MAX_VALUES_PER_NODE:
                held.add(value)
                values.setdefault(value, {})[node] = max(0, tokens)

    def forget(self, node: str) -> None:
        """Drop everything a node held (it went away or started anew)."""
        for model, held in self._by_node.pop(node, {}).items():
            values = self._by_model[model]
            for value in held:
                _remove(values, value, node)

    def cached_tokens(self, model: str, chain: list[bytes]) -> dict[str, int]:
        """For each node that holds a beginning of ``chain``: tokens of the longest one."""
        values = self._by_model.get(model)
        found: dict[str, int] = {}
        if not values:
            return found
        for value in reversed(chain):
            for node, tokens in values.get(value, {}).items():
                found.setdefault(node, tokens)
        return found


class TokenRatio:
    """Tokens per byte of canonical request, learned per model from what nodes accepted."""

    def __init__(self) -> None:
        self._ratio: dict[str, float] = {}

    def estimate(self, model: str, num_bytes: int) -> int:
        """Expected prompt tokens, at least 1."""
        return max(1, round(num_bytes * self._ratio.get(model, DEFAULT_TOKENS_PER_BYTE)))

    def learn(self, model: str, num_bytes: int, prompt_tokens: int) -> None:
        """A node counted ``prompt_tokens`` in a canonical request of ``num_bytes``."""
        if num_bytes < _MIN_LEARN_BYTES or prompt_tokens <= 0:
            return
        seen = prompt_tokens / num_bytes
        held = self._ratio.get(model)
        self._ratio[model] = seen if held is None else held + _LEARNING * (seen - held)


def _remove(values: dict[bytes, dict[str, int]], value: bytes, node: str) -> None:
    holders = values.get(value)
    if holders is not None:
        holders.pop(node, None)
        if not holders:
            del values[value]
