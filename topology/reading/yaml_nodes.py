"""YAML text to a small tree that remembers lines.

Owns everything about YAML as a notation: syntax, sizes, tags, aliases, duplicate keys. Knows
nothing of topologies. The text may be hostile: work is bounded by ``MAX_BYTES`` before parsing, by
``MAX_DEPTH`` and ``MAX_VALUES`` while parsing and again while aliases are expanded, and every way
to fail is a ``ConfigError``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import yaml

from topology.reading.problems import Problems
from wire.errors import ConfigError

MAX_BYTES = 4 * 1024 * 1024  # guess: thousands of sites fit in a quarter of it
MAX_DEPTH = 16  # a topology is five levels deep
MAX_VALUES = 200_000  # guess: 30 values for each of 6,000 nodes

Kind = Literal["text", "integer", "number", "boolean", "nothing", "date"]

_KINDS: dict[str, Kind] = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "integer",
    "tag:yaml.org,2002:float": "number",
    "tag:yaml.org,2002:bool": "boolean",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "date",
}
_LIST_TAG = "tag:yaml.org,2002:seq"
_MAP_TAG = "tag:yaml.org,2002:map"


@dataclass(frozen=True, slots=True)
class Scalar:
    """A leaf. ``kind`` is what YAML takes it for; ``plain`` means written without quotes."""

    line: int
    text: str
    kind: Kind
    plain: bool


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    line: int
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A value and the line of its key; the value may begin elsewhere (below, or at an anchor)."""

    line: int
    value: Value


@dataclass(frozen=True, slots=True)
class Mapping:
    """A map from text to values, in the file's order."""

    line: int
    entries: dict[str, Entry]


Value = Scalar | Items | Mapping


def describe(value: Value) -> str:
    """What a value is, in words for an error message."""
    match value:
        case Items():
            return "a list"
        case Mapping():
            return "a map"
        case Scalar(kind="nothing"):
            return "nothing"
        case Scalar(text=text, kind=kind):
            return f"the {kind} {shorten(text)!r}"


def shorten(text: str) -> str:
    """``text`` as far as an error message wants to repeat it."""
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_yaml(text: str, problems: Problems) -> Value:
    """The document in ``text`` as a tree.

    Mistakes that leave a tree (duplicate keys, odd tags, merge keys) go to ``problems``; the others
    (syntax, bounds) raise ``ConfigError`` at once.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB", where=f"{problems.source}:1")
    root = _compose(text, problems.source)
    if root is None:
        raise ConfigError(
            "the file is empty",
            where=f"{problems.source}:1",
            suggestion="start from topology/examples/demo.yaml",
        )
    return _Reader(problems).value(root, 1)


class _TooMuchError(yaml.MarkedYAMLError):
    """Well-formed so far, but beyond a bound."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that gives up on too much before time and Python's recursion limit do."""

    depth = 0
    count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            deep = self.depth > MAX_DEPTH
            what = f"nested deeper than {MAX_DEPTH}" if deep else f"more than {MAX_VALUES} values"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _TooMuchError(problem=what, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, source: str) -> yaml.Node | None:
    line = 0
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            line = loader.line
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = mark.line if mark else line
        problem = " ".join(part for part in (exc.context, exc.problem) if part)
        message = problem if isinstance(exc, _TooMuchError) else f"not YAML: {problem}"
        raise ConfigError(message, where=f"{source}:{line + 1}") from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position)
        message = f"character U+{ord(text[exc.position]):04X} is not allowed in YAML"
        raise ConfigError(message, where=f"{source}:{line + 1}") from exc
    except (ValueError, OverflowError) as exc:  # PyYAML hands bad \U escapes to chr() unchecked
        message = "not YAML: an escape or number is out of range"
        raise ConfigError(message, where=f"{source}:{line + 1}") from exc


class _Reader:
    """Turns PyYAML's graph into our tree, counting what aliases expand to."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._count = 0

    def value(self, node: yaml.Node, depth: int) -> Value:
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:  # an alias to itself is infinitely deep
            what = f"more than {MAX_VALUES} values" if depth <= MAX_DEPTH else "endless nesting"
            raise ConfigError(
                f"{what} once aliases (*name) are expanded",
                where=f"{self._problems.source}:{line}",
                suggestion="write the values out",
            )
        if isinstance(node, yaml.ScalarNode):
            kind = _KINDS.get(node.tag)
            if kind is None:
                self._refuse_tag(node, line)
            return Scalar(line, node.value, kind or "text", node.style is None)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != _LIST_TAG:
                self._refuse_tag(node, line)
            return Items(line, tuple(self.value(item, depth + 1) for item in node.value))
        assert isinstance(node, yaml.MappingNode)
        if node.tag != _MAP_TAG:
            self._refuse_tag(node, line)
        return Mapping(line, self._entries(node, depth))

    def _entries(self, node: yaml.MappingNode, depth: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            value = self.value(value_node, depth + 1)
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._problems.add(line, "merge keys (<<) are not read", "write the keys out")
                continue
            read = self.value(key_node, depth + 1)
            if not isinstance(read, Scalar) or read.kind != "text":
                hint = f'quote it: "{shorten(read.text)}"' if isinstance(read, Scalar) else None
                self._problems.add(line, f"a key must be text, not {describe(read)}", hint)
                continue
            key = read.text
            if key in entries:
                first = entries[key].line
                message = f"{shorten(key)!r} is given twice (first on line {first})"
                self._problems.add(line, message, "keep one")
            else:
                entries[key] = Entry(line, value)
        return entries

    def _refuse_tag(self, node: yaml.Node, line: int) -> None:
        tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
        self._problems.add(line, f"the tag {tag!r} is not read", "remove it")
