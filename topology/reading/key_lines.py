"""Where in a topology's text a key stands, for findings that are made after reading.

The text has been read and checked already, by ``topology.load``.
"""

from __future__ import annotations

from collections.abc import Sequence

from topology.reading.problems import Problems
from topology.reading.yaml_nodes import Mapping, read_yaml


class KeyLines:
    """Lines of the keys of ``text``, which ``source`` names."""

    def __init__(self, text: str, source: str) -> None:
        """Raises ``ConfigError`` if ``text`` is no YAML."""
        self._source = source
        self._root = read_yaml(text, Problems(source))

    def where(self, keys: Sequence[str]) -> str:
        """``source:line`` of the innermost of ``keys`` (outermost first) that is in the file."""
        line, value = 1, self._root
        for key in keys:
            if not isinstance(value, Mapping) or key not in value.entries:
                break
            entry = value.entries[key]
            line, value = entry.line, entry.value
        return f"{self._source}:{line}"
