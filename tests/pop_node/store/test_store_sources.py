"""Models that come as Hugging Face directories, and how their element types are converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_models import tensors, write_huggingface

from pop_node.store import safetensors_file
from pop_node.store.dtypes import convert, float32_to_bfloat16
from pop_node.store.safetensors_file import read_header
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from pop_node.text.tokenizer import TextCodec
from tests.pop_node.store.adding import refused, weights_of
from wire.errors import ConfigError


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_narrowing_rounds_as_torch_does(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    ours = torch.from_numpy(float32_to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(ours[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_narrowing_at_every_tie_and_its_neighbours() -> None:
    upper = np.arange(2**16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(np.float32)
        ours = float32_to_bfloat16(values)
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        kept = ~np.isnan(values)
        assert np.array_equal(ours[kept], expected.view(np.uint16)[kept])
        assert ((ours[~kept] & 0x7FFF) == 0x7FC0).all()


def test_widening_is_exact_for_every_value() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    for source, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        stored = bits if source == "BF16" else bits.view(np.float16)
        expected = torch.from_numpy(bits.view(np.int16)).view(kind).float().numpy()
        np.testing.assert_array_equal(convert(stored, source, "F32"), expected)
    assert convert(bits, "BF16", "BF16") is bits


# ---- Hugging Face ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floats_are_converted_and_the_rest_is_kept(
    tmp_path: Path, store: Store, kind: torch.dtype, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file as save_torch

    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 64)  # so that tensors span chunks
    source = write_huggingface(tmp_path / "source")
    torch.manual_seed(5)
    original = {name: torch.randn(value.shape).to(kind) for name, value in tensors().items()}
    original["model.steps"] = torch.arange(7)
    original["model.empty"] = torch.zeros(0, 4, dtype=kind)
    save_torch(original, source / "model.safetensors")
    manifest = store.add(str(source), "tiny", dtype, unwatched)
    found = weights_of(store)
    target = getattr(torch, dtype)
    assert found.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(found[name], value.to(target) if value.is_floating_point() else value)
    config = json.loads((store.get("tiny").path / "config.json").read_text())
    assert config["torch_dtype"] == manifest.dtype == dtype


def test_a_model_without_a_licence_or_template_is_taken(tmp_path: Path, store: Store) -> None:
    source = write_huggingface(tmp_path / "source")
    (source / "README.md").unlink()
    (source / "tokenizer_config.json").unlink()
    assert store.add(str(source), "tiny", "float32", unwatched).licence == ""
    assert TextCodec.load(store.get("tiny").path).template is None
    store.verify("tiny")


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path, store: Store) -> None:
    source = write_huggingface(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    error = refused(store, source, "pytorch_model.bin.*run any code")
    assert error.suggestion == "save the model as safetensors first"


def test_directories_that_are_no_models(tmp_path: Path, store: Store) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(store, empty, "config.json")
    source = write_huggingface(tmp_path / "source", quantization_config={"quant_method": "awq"})
    refused(store, source, "quantised")
    write_huggingface(source, num_hidden_layers="two")
    refused(store, source, "num_hidden_layers is 'two'")
    write_huggingface(source, max_position_embeddings=None)
    refused(store, source, "max_position_embeddings is None")
    write_huggingface(source)
    (source / "tokenizer.json").unlink()
    refused(store, source, "no tokenizer.json")
    write_huggingface(source)
    (source / "model.safetensors").unlink()
    refused(store, source, "neither model.safetensors nor")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({}, "no weight_map"),
        (None, "no weight_map"),
        ({"model.norm.weight": "../../etc/passwd"}, "outside the directory"),
        ({"model.norm.weight": 7}, "outside the directory"),
        ({"model.norm.weight": "absent.safetensors"}, "absent.safetensors"),
        ({"model.nothing": "model-00001-of-00002.safetensors"}, "model.nothing is not in"),
    ],
)
def test_bad_indexes_are_refused(
    tmp_path: Path, store: Store, weight_map: object, match: str
) -> None:
    source = write_huggingface(tmp_path / "source", shards=2)
    index = json.dumps({"weight_map": weight_map})
    (source / "model.safetensors.index.json").write_text(index)
    refused(store, source, match)


def test_eight_bit_floats_are_refused(tmp_path: Path, store: Store) -> None:
    source = write_huggingface(tmp_path / "source")
    header = b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + b"abcd"
    (source / "model.safetensors").write_bytes(data)
    refused(store, source, "type F8_E4M3 are not supported")


# ---- safetensors -------------------------------------------------------------------------------


def with_header(header: bytes, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def one(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return with_header(json.dumps({"w": entry}).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        with_header(b"{}", length=2**63),
        with_header(b"{}", length=1000),
        with_header(b"[]"),
        with_header(b"{\xff}"),
        with_header(b'{"w":{}}'),
        with_header(b'{"w":[]}'),
        one(data_offsets=[0, 12]),
        one(data_offsets=[8, 16]),
        one(data_offsets=[-8, 0]),
        one(data_offsets=[8, 0]),
        one(data_offsets=["0", "8"]),
        one(data_offsets=[0]),
        one(shape=[3]),
        one(shape=[-1, -2]),
        one(shape=["2"]),
        one(shape=2),
        one(dtype=None),
    ],
)
def test_malformed_weight_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_header(path)


def test_layouts_are_those_of_the_format(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.int8),
        "c": np.zeros((0, 3), np.float16),
        "d": np.float64([[1.5]]),
    }
    theirs = tmp_path / "theirs.safetensors"
    save_file(arrays, theirs)
    raw = theirs.read_bytes()
    for span in read_header(theirs):
        assert raw[span.offset : span.offset + span.nbytes] == arrays[span.name].tobytes()
