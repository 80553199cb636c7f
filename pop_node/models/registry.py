"""From files to a model: the table of families, reading safetensors, choosing kernels.

Weights come from safetensors only: its format cannot carry code, so pickled files are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernels.ops import Backend, NativeUnavailableError, Ops, load_ops
from pop_node.models.llama import Llama, LlamaConfig
from wire.errors import ConfigError

Model = Llama

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A real index of the largest open models has about 100k entries in 10 MB; config.json is 1 kB.
MAX_JSON_BYTES = 64 << 20


def load_backend(backend: Backend, threads: int, *, batch_invariant: bool = False) -> Ops:
    """``kernels.ops.load_ops`` with this project's errors.

    Raises:
        ConfigError: the backend cannot be had on this machine, or an argument is impossible.
    """
    try:
        return load_ops(backend, threads, batch_invariant=batch_invariant)
    except NativeUnavailableError as exc:
        raise ConfigError(
            f"backend {backend!r} cannot be used: {exc}",
            suggestion="install a C compiler (cc, gcc or clang), or use backend 'auto'",
        ) from exc
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc


def build_model(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], dtype: str, ops: Ops
) -> Model:
    """A model from the object of its ``config.json`` and its tensors.

    Raises:
        ConfigError: unsupported family or feature, or weights that do not fit.
    """
    return Llama(LlamaConfig.from_hf(config), weights, ops, dtype)


def load_model(directory: Path, dtype: str, ops: Ops) -> Model:
    """Read a Hugging Face model directory: ``config.json`` and safetensors, sharded or not.

    Raises:
        ConfigError: a file is missing, damaged, not safetensors or not supported.
    """
    config = _read_json(directory / CONFIG_FILE)
    return build_model(config, read_weights(directory), dtype, ops)


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model directory, memory-mapped: pages are read when first touched.

    Raises:
        ConfigError: no safetensors, a shard is missing or damaged, or a path leaves the directory.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping: iterating it fails)
                    if name in weights:
                        raise ConfigError(f"tensor {name} is in two files", where=str(path))
                    weights[name] = tensors.get_tensor(name)
        except (OSError, SafetensorError) as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
    return weights


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).exists():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.exists():
        raise ConfigError(
            f"no {WEIGHTS_FILE} and no {INDEX_FILE}",
            where=str(directory),
            suggestion="convert the model to safetensors; pickled weights are never read",
        )
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ConfigError("weight_map is not a table of file names", where=str(index))
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{name!r} is not the name of a safetensors file", where=str(index))
    return [directory / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"is larger than {MAX_JSON_BYTES} bytes", where=str(path))
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
    if not isinstance(content, dict):
        raise ConfigError("is not a JSON object", where=str(path))
    return content
