"""Mistakes found in one configuration file, gathered so that a person can mend them in one go."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from wire.errors import ConfigError

MAX_SHOWN = 20  # a screenful; the rest is counted
_MAX_NAMES = 12  # candidates worth listing when nothing is close
_MAX_COMPARED = 5_000  # guess: a tenth of a second of comparing


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: 1-based line, what is wrong, and how to find what to write instead."""

    line: int
    message: str
    suggest: Callable[[], str | None]

    def text(self) -> str:
        """Message and suggestion as one."""
        suggestion = self.suggest()
        return f"{self.message} ({suggestion})" if suggestion else self.message


class Problems:
    """Collects mistakes of one ``source`` (a file's name)."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: list[Problem] = []

    def add(self, line: int, message: str, suggestion: str | None = None) -> None:
        """Note a mistake and go on reading."""
        self._found.append(Problem(line, message, lambda: suggestion))

    def add_misspelt(self, line: int, message: str, word: str, known: Iterable[str]) -> None:
        """Note a word that is none of ``known``; the nearest one is looked up only if shown."""
        self._found.append(Problem(line, message, lambda: closest(word, known)))

    def raise_if_any(self) -> None:
        """Raise one ``ConfigError`` with the mistakes by line; ``where`` is the first one's."""
        if not self._found:
            return
        first, *others = sorted(self._found, key=lambda p: p.line)
        if not others:
            raise ConfigError(first.message, where=self._where(first), suggestion=first.suggest())
        lines = [first.text()]
        lines += [f"{self._where(p)}: {p.text()}" for p in others[: MAX_SHOWN - 1]]
        if len(others) >= MAX_SHOWN:
            lines.append(f"and {len(others) - MAX_SHOWN + 1} more")
        error = ConfigError("\n".join(lines), where=self._where(first))
        error.suggestion = first.suggest()
        raise error

    def _where(self, problem: Problem) -> str:
        return f"{self.source}:{problem.line}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """A suggestion for a misspelt ``word``: the nearest known one, or what there is to choose."""
    names = list(islice(known, _MAX_COMPARED))
    if close := difflib.get_close_matches(word[:100], names, n=1):
        return f"did you mean {close[0]!r}?"
    if not names:
        return None
    more = ", …" if len(names) > _MAX_NAMES else ""
    return f"known: {', '.join(names[:_MAX_NAMES])}{more}"
