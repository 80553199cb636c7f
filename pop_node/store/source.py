"""A model as it comes from outside, whatever the format: what a bundle is written from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pop_node.store.dtypes import Array

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)`` in bytes; ``total`` 0 means unknown."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor in Hugging Face's naming; ``chunks()`` yields its stored bits in order, afresh at
    each call, in arrays of any shape that together have ``shape``'s elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Array]]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """``config`` is a Hugging Face configuration; ``files`` are copied as they are (tokenizer.json
    among them); ``licence`` is a name, "" when the source does not say."""

    config: dict[str, Any]
    files: dict[str, bytes]
    tensors: list[SourceTensor]
    licence: str
    chat_template: str
