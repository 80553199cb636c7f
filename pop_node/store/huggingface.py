"""Reads a model in a Hugging Face directory: safetensors, one file or several with an index."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from pop_node.store.manifest import MAX_FILE_BYTES
from pop_node.store.safetensors_file import TensorSpan, read_chunks, read_header
from pop_node.store.source import SourceModel, SourceTensor, template_text
from wire.errors import ConfigError

_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LICENCE_LINE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)


def open_huggingface(directory: Path) -> SourceModel:
    """Describe the model in ``directory``; weights are read later, chunk by chunk.

    Raises ``ConfigError``: something is missing, malformed, quantised, or only there as a pickle.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(
            "no config.json here",
            where=str(directory),
            suggestion="give the directory that holds a model's config.json and safetensors",
        )
    config = _read_object(directory / "config.json")
    if config.get("quantization_config") is not None:
        raise ConfigError(
            "the model is quantised", where=str(directory), suggestion="use its original weights"
        )
    files = {
        name: _read_bounded(directory / name) for name in _COPIED if (directory / name).is_file()
    }
    if "tokenizer.json" not in files:
        raise ConfigError(
            "no tokenizer.json",
            where=str(directory),
            suggestion="save the tokenizer with transformers' PreTrainedTokenizerFast",
        )
    tensors = [
        SourceTensor(span.name, span.dtype, span.shape, partial(read_chunks, path, span))
        for path, span in _tensor_spans(directory)
    ]
    return SourceModel(config, files, tensors, _licence(directory), template_text(files))


def _tensor_spans(directory: Path) -> list[tuple[Path, TensorSpan]]:
    single = directory / _WEIGHTS_FILE
    index = directory / _INDEX_FILE
    if single.is_file():
        return [(single, span) for span in read_header(single)]
    if index.is_file():
        return _indexed_spans(directory, index)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ConfigError(
            f"only pickled weights ({pickles[0]}): reading a pickle can run any code",
            where=str(directory),
            suggestion="save the model as safetensors first",
        )
    raise ConfigError(f"neither {_WEIGHTS_FILE} nor {_INDEX_FILE}", where=str(directory))


def _indexed_spans(directory: Path, index: Path) -> list[tuple[Path, TensorSpan]]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError("has no weight_map", where=str(index))
    shards: dict[str, dict[str, TensorSpan]] = {}
    found = []
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(f"names a file outside the directory: {shard!r}", where=str(index))
        path = directory / shard
        if shard not in shards:
            shards[shard] = {span.name: span for span in read_header(path)}
        if name not in shards[shard]:
            raise ConfigError(f"tensor {name} is not in {shard}", where=str(index))
        found.append((path, shards[shard][name]))
    return found


def _read_bounded(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"larger than {MAX_FILE_BYTES} bytes", where=str(path))
    return path.read_bytes()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bounded(path))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot be read as JSON: {exc}", where=str(path)) from exc
    if not isinstance(value, dict):
        raise ConfigError("is not a JSON object", where=str(path))
    return value


def _licence(directory: Path) -> str:
    """The licence named in the model card's front matter."""
    card = directory / "README.md"
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(64 * 1024)
    front = head.split("---", 2)[1] if head.startswith("---") else ""
    match = _LICENCE_LINE.search(front)
    return match[1] if match else ""
