"""A model as it comes from outside, whatever the format: what a bundle is written from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pop_node.store.dtypes import Array
from wire.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)`` in bytes; ``total`` 0 means unknown."""


def unwatched(phase: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""


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


def template_text(files: Mapping[str, bytes]) -> str:
    """Text that stands for the chat template in the model's identity, "" for none.

    Raises ``ConfigError`` if the file that would hold it is malformed.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    try:
        template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template") or ""
    except (ValueError, AttributeError) as exc:
        raise ConfigError(f"tokenizer_config.json cannot be read: {exc}") from exc
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
