"""Small chunks and short waits, and the tiny model of the store's tests as a bundle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from pop_node.peers import bring, choice, client, gathering, survey, swarm
from pop_node.store import fetch, layout
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.tiny_models import write_huggingface
from topology.model import Model


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(swarm, "FIRST_RUN_BYTES", 3 * 4096)
    monkeypatch.setattr(swarm, "RUN_BYTES", 3 * 4096)
    monkeypatch.setattr(swarm, "BACKOFF_S", 0.01)
    monkeypatch.setattr(swarm, "LOOK_S", 0.02)
    monkeypatch.setattr(swarm, "UNKNOWN_S", 0.2)
    monkeypatch.setattr(gathering, "LOOK_S", 0.02)
    monkeypatch.setattr(bring, "LOOK_S", 0.02)
    monkeypatch.setattr(survey, "AGAIN_S", 0.05)
    monkeypatch.setattr(choice, "TURN_S", 1.0)
    monkeypatch.setattr(client, "STALL_S", 2.0)
    monkeypatch.setattr(client, "MAX_RETRY_AFTER_S", 0.05)
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_huggingface(tmp_path / "source")


@pytest.fixture
def original(tmp_path: Path, source: Path) -> Store:
    """A store that has the model ``tiny``."""
    store = Store(tmp_path / "original")
    store.add(str(source), "tiny", "float32", unwatched)
    return store


@pytest.fixture
def tiny(original: Store) -> Model:
    """The model as a topology pins it, without a source."""
    return Model("tiny", digest=original.get("tiny").manifest.identity, dtype="float32")
