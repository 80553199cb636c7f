"""Shared by the tests of this folder: a tiny model, an empty store, a small disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from pop_node.store.store import Store
from tests.pop_node.store.tiny_models import write_huggingface


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny model as a Hugging Face directory."""
    return write_huggingface(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store without a model."""
    return Store(tmp_path / "store")
