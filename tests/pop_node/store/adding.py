"""What adding a model to a store made, or why it was refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pop_node.models.registry import load_weights
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError


def weights_of(store: Store, name: str = "tiny") -> dict[str, torch.Tensor]:
    bundle = store.get(name)
    return load_weights(bundle.path, bundle.manifest, torch.device("cpu"))[0]


def refused(store: Store, source: Path | str, match: str) -> ConfigError:
    with pytest.raises(ConfigError, match=match) as caught:
        store.add(str(source), "tiny", "float32", unwatched)
    assert store.list() == []
    return caught.value
