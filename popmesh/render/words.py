"""Small things that many views share: counts in words, columns of names."""

from __future__ import annotations

from rich.table import Column


def counted(number: int, noun: str) -> str:
    """``1 router``, ``2 routers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def name_column(head: str) -> Column:
    """A column of names: a long one goes over several lines, it is never cut off and never pushes
    the other columns out of a narrow terminal."""
    return Column(head, overflow="fold")
