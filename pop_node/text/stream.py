"""The text side of one output: ids in, printable text out, up to the first stop string.

A pure function of the ids so far: a node that takes over pushes the forced ids, drops what comes
out, and goes on as if it had been there from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from pop_node.text.detokenizer import Detokenizer
from pop_node.text.stop import StopMatcher
from pop_node.text.tokenizer import TextCodec


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a push made printable; ``stopped`` says that a stop string ended the text."""

    text: str
    stopped: bool


class TextStream:
    """Detokeniser and stop strings of one output."""

    def __init__(self, codec: TextCodec, stops: Sequence[str]) -> None:
        """Raises ``RequestError`` if a stop string is empty."""
        self._detokenizer = Detokenizer(codec.token_table)
        self._matcher = StopMatcher(stops)

    def push(self, ids: Iterable[int]) -> TextDelta:
        """Text that ``ids`` complete; after a stop always empty."""
        text = self._matcher.feed(self._detokenizer.push(ids))
        return TextDelta(text, self._matcher.stopped)

    def flush(self) -> str:
        """The rest of an output that ended without a stop string; "" after one."""
        text = self._matcher.feed(self._detokenizer.flush())
        return text + self._matcher.flush()


def escape_json(text: str) -> bytes:
    """``text`` as it stands between the quotes of a JSON string, in UTF-8."""
    return msgspec.json.encode(text)[1:-1]
