"""A drive that stops reading: whatever is asked of the store is answered, or refused with words."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pop_node.store.partial import partial_bundle
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.tiny_models import tensors, write_huggingface
from wire.errors import ConfigError

READS = ((os, "stat"), (os, "open"), (os, "scandir"), (os, "listdir"), (io, "open"))
MOST = 60
"""More than any of these asks of the drive."""


class Drive:
    """Below ``root`` the ``left``-th look at the drive fails, and all after it; 0: none does."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for owner, name in READS:
            real = getattr(owner, name)

            def read(path: Any, *arguments: Any, real: Any = real, **named: Any) -> Any:
                if self.left and str(path).startswith(str(root)):
                    self.left = max(1, self.left - 1)
                    if self.left == 1:
                        raise OSError(errno.EIO, "Input/output error")
                return real(path, *arguments, **named)

            monkeypatch.setattr(owner, name, read)


ASKED: dict[str, Callable[[Store], object]] = {
    "list": lambda store: [manifest.identity for manifest in store.list()],
    "rows": lambda store: [(row.name, row.problem, row.nbytes) for row in store.rows()],
    "row": lambda store: store.row("a"),
    "get": lambda store: store.get("a").path,
    "has": lambda store: (store.has("a"), store.has("nobody")),
    "lacks": lambda store: (store.lacks("a"), store.lacks("nobody")),
    "hold": lambda store: store.hold("a").close(),
    "entries": lambda store: list(store.entries()),
    "partials": lambda store: [path for path, _ in store.partials()],
    "open_partial": lambda store: store.open_partial("b"),
    "verify": lambda store: store.verify("a"),
    "gc": lambda store: store.gc(abandoned=False),
}


@pytest.fixture
def full(store: Store, source: Path, tmp_path: Path) -> Store:
    """A store with two models and the beginning of a third."""
    there = Store(tmp_path / "there")
    store.add(str(source), "a", "float32", unwatched)
    store.add(str(write_huggingface(tmp_path / "c", tensors(3))), "c", "float32", unwatched)
    other = write_huggingface(tmp_path / "b", tensors(5))
    begun = there.add(str(other), "b", "float32", unwatched)
    with partial_bundle(store.root / "partial", begun, on_wait=lambda: None):
        pass
    return store


@pytest.mark.parametrize("what", ASKED)
def test_what_is_asked_of_a_drive_that_fails_is_answered_or_refused(
    full: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    ask = ASKED[what]
    expected = ask(full)
    drive = Drive(full.root, monkeypatch)
    refused: list[str] = []
    for looks in range(2, MOST):
        drive.left = looks
        try:
            answer = ask(full)
        except ConfigError as exc:
            refused.append(str(exc))
        if drive.left > 1:  # it asked no more of the drive
            assert answer == expected
            break
    else:
        raise AssertionError(f"{what} asks more than {MOST} times")
    assert refused or what in ("has", "lacks")
    assert all("Input/output error" in why for why in refused)
    drive.left = 0
    assert ask(full) == expected


def test_what_cannot_be_read_of_one_model_is_said_of_that_one(
    full: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {row.name: row.nbytes for row in full.rows()}
    broken = full.get("a").path
    Drive(broken, monkeypatch).left = 1
    rows = {row.name: row for row in full.rows()}
    assert "Input/output error" in rows["a"].problem
    assert not rows["c"].problem
    assert rows["c"].nbytes == sizes["c"]
    assert full.has("a"), "it is there, though nobody can use it"
