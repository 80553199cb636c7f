"""Sizes of a topology's models, from wherever something is known about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pop_node.hosting.memory import model_size
from pop_node.store.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, decode_manifest
from pop_node.store.origin import InterruptedReadError, is_url, open_origin
from pop_node.store.store import Store
from topology.budget import ModelSize
from topology.model import Model
from wire.errors import ConfigError


@dataclass(slots=True)
class Sizes:
    """What is known by model's name, and why something else is not."""

    known: dict[str, ModelSize] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def find_sizes(models: Iterable[Model], store: Path, given: Mapping[str, ModelSize]) -> Sizes:
    """Sizes of ``models``: ``given`` ones, else by the manifest in ``store``, else by that at the
    URL which is the model's source. A manifest that the topology would refuse tells nothing."""
    sizes = Sizes()
    rows = {row.name: row for row in Store(store).rows()}
    for model in models:
        if model.name in given:
            sizes.known[model.name] = given[model.name]
            continue
        try:
            row = rows.get(model.name)
            if row is not None and row.manifest is None:
                raise ConfigError(row.problem)
            manifest = row.manifest if row is not None else _remote_manifest(model)
            if manifest is None:
                continue
            _check(model, manifest)
        except ConfigError as exc:
            sizes.unknown[model.name] = str(exc)
        else:
            sizes.known[model.name] = model_size(manifest)
    return sizes


def _remote_manifest(model: Model) -> Manifest | None:
    if model.source is None or not is_url(model.source):
        return None
    try:
        data = open_origin(model.source).read(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    except InterruptedReadError as exc:
        raise ConfigError(str(exc)) from exc
    return decode_manifest(data, where=model.source)


def _check(model: Model, manifest: Manifest) -> None:
    if manifest.dtype != model.dtype:
        raise ConfigError(f"it is there in {manifest.dtype}, the topology asks for {model.dtype}")
    if model.digest is not None and manifest.identity != model.digest:
        raise ConfigError(
            f"its digest is {manifest.identity[:12]}, the topology pins {model.digest[:12]}"
        )
