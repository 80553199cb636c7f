"""Typed access to the maps of a configuration file.

A getter always returns a value of the right type: a mistake is noted in ``Problems`` and a stand-in
returned, so that one reading finds every mistake. Whoever uses this raises before using the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import TypeVar

from topology.reading.problems import Problems
from topology.reading.yaml_nodes import Entry, Items, Mapping, Scalar, Value, describe, shorten

MAX_TEXT = 1024  # guess: no path or description of an operator is longer

# Decimal notation only: YAML 1.1 also reads 010 as eight and 1:30 as ninety.
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})(\.[0-9]{0,40})?([eE][-+]?[0-9]{1,3})?")

T = TypeVar("T", bound=str)


class Fields:
    """One map whose keys are known beforehand; unknown keys are noted at once."""

    def __init__(self, entry: Entry, known: Collection[str], problems: Problems) -> None:
        self.line = entry.line
        self.problems = problems
        self._entries: dict[str, Entry] = {}
        # Of something that is no map every key would be missing: one report is enough.
        self._broken = not isinstance(entry.value, Mapping)
        if not isinstance(entry.value, Mapping):
            hint = f"keys: {', '.join(known)}"
            problems.add(entry.line, f"expected a map, found {describe(entry.value)}", hint)
            return
        self._entries = entry.value.entries
        for key, found in self._entries.items():
            if key not in known:
                message = f"unknown key {shorten(key)!r}"
                problems.add_misspelt(found.line, message, key, known)

    def entry(self, key: str, *, required: bool = False) -> Entry | None:
        """The raw entry; a required one that is missing is noted on the map's own line."""
        found = self._entries.get(key)
        if found is None and required and not self._broken:
            self.problems.add(self.line, f"{key!r} is missing")
        return found

    def text(self, key: str, default: str | None = None) -> str:
        """Printable text on one line; required when there is no default."""
        found = self.entry(key, required=default is None)
        text = read_text(key, found.value, self.problems) if found else default
        return text or ""

    def text_or_none(self, key: str) -> str | None:
        """Like ``text``, None when absent."""
        found = self.entry(key)
        return read_text(key, found.value, self.problems) if found else None

    def number(
        self,
        key: str,
        low: float,
        high: float,
        default: float | None = None,
        *,
        above: bool = False,
    ) -> float:
        """A number in [low, high], or (low, high] with ``above``; required without default."""
        found = self.entry(key, required=default is None)
        if found is None:
            return low if default is None else default
        return self._number(key, found.value, low, high, above=above)

    def number_or_none(
        self, key: str, low: float, high: float, *, above: bool = False
    ) -> float | None:
        """Like ``number``, None when absent."""
        found = self.entry(key)
        return self._number(key, found.value, low, high, above=above) if found else None

    def integer(self, key: str, low: int, high: int, default: int) -> int:
        """A whole number in [low, high]."""
        value = self.integer_or_none(key, low, high)
        return default if value is None else value

    def integer_or_none(self, key: str, low: int, high: int) -> int | None:
        """A whole number in [low, high], None when absent."""
        found = self.entry(key)
        if found is None:
            return None
        value = self._number(key, found.value, low, high, above=False)
        if value != int(value):
            self.problems.add(
                found.value.line, f"{key} must be whole, found {describe(found.value)}"
            )
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        found = self.entry(key)
        if found is None:
            return default
        value = found.value
        if isinstance(value, Scalar) and value.plain and value.text in ("true", "false"):
            return value.text == "true"
        hint = "in small letters, without quotes"
        self.problems.add(value.line, f"{key} must be true or false, found {describe(value)}", hint)
        return default

    def choice(self, key: str, options: tuple[T, ...], default: T) -> T:
        """One of ``options``."""
        found = self.entry(key)
        if found is None:
            return default
        return self._choice(key, found.value, options) or default

    def choices(self, key: str, options: tuple[T, ...], default: tuple[T, ...]) -> tuple[T, ...]:
        """A non-empty list of distinct ``options``."""
        found = self.entry(key)
        if found is None:
            return default
        items = self._items(key, found.value)
        chosen = [self._choice(key, item, options) for item in items]
        return tuple(option for option in chosen if option is not None)

    def texts(
        self, key: str, *, required: bool = False, empty: bool = False, distinct: bool = True
    ) -> list[tuple[str, int]] | None:
        """A list of texts, each with its line; None when absent. ``empty`` allows an empty list."""
        found = self.entry(key, required=required)
        if found is None:
            return None
        items = self._items(key, found.value, empty=empty, distinct=distinct)
        read = [(read_text(key, item, self.problems), item.line) for item in items]
        return [(text, line) for text, line in read if text]

    def _items(
        self, key: str, value: Value, *, empty: bool = False, distinct: bool = True
    ) -> tuple[Value, ...]:
        if not isinstance(value, Items):
            text = value.text if isinstance(value, Scalar) and value.kind == "text" else ""
            hint = f"write [{shorten(text)}]" if text else None
            self.problems.add(value.line, f"{key} must be a list, found {describe(value)}", hint)
            return ()
        if not value.values and not empty:
            self.problems.add(value.line, f"{key} is empty", "name at least one")
        seen: set[str] = set()
        for item in value.values if distinct else ():
            if isinstance(item, Scalar):
                if item.text in seen:
                    message = f"{key} names {shorten(item.text)!r} twice"
                    self.problems.add(item.line, message, "keep one")
                seen.add(item.text)
        return value.values

    def _choice(self, key: str, value: Value, options: tuple[T, ...]) -> T | None:
        text = read_text(key, value, self.problems)
        for option in options:
            if option == text:
                return option
        if text is not None:
            hint = f"write {' or '.join(options)}"
            self.problems.add(value.line, f"{key} cannot be {shorten(text)!r}", hint)
        return None

    def _number(self, key: str, value: Value, low: float, high: float, *, above: bool) -> float:
        number = read_number(key, value, self.problems)
        if number is None:
            return high
        if not (low < number if above else low <= number) or number > high:
            least = f"above {low:g}" if above else f"at least {low:g}"
            message = f"{key} must be {least} and at most {high:g}, found {describe(value)}"
            self.problems.add(value.line, message)
            return high
        return number


def read_text(key: str, value: Value, problems: Problems) -> str | None:
    """Printable, non-empty text on one line, or None with the mistake noted."""
    if not isinstance(value, Scalar) or value.kind != "text":
        hint = None
        if isinstance(value, Scalar):
            nothing = value.kind == "nothing"
            hint = (
                "fill it in or remove the key" if nothing else f'quote it: "{shorten(value.text)}"'
            )
        problems.add(value.line, f"{key} must be text, found {describe(value)}", hint)
        return None
    text = value.text
    if not text or not text.isprintable() or text != text.strip():
        what = "empty" if not text.strip() else f"{shorten(text)!r}"
        problems.add(
            value.line, f"{key} must be printable text without spaces around it, not {what}"
        )
        return None
    if len(text) > MAX_TEXT:
        problems.add(value.line, f"{key} is longer than {MAX_TEXT} characters")
        return None
    return text


def read_number(key: str, value: Value, problems: Problems) -> float | None:
    """A finite number in plain decimal notation, or None with the mistake noted."""
    hint = None
    if isinstance(value, Scalar):
        decimal = _DECIMAL.fullmatch(value.text) is not None
        number = float(value.text) if decimal else math.nan
        if value.plain and math.isfinite(number):
            return number
        if value.plain and (decimal or value.text.lower().lstrip("+-") in (".inf", ".nan")):
            problems.add(value.line, f"{key} must be finite, found {shorten(value.text)!r}")
            return None
        if value.kind != "nothing":
            hint = "remove the quotes" if decimal else "write a plain decimal number"
    problems.add(value.line, f"{key} must be a number, found {describe(value)}", hint)
    return None
