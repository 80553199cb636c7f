"""Reading model directories and configurations: what is accepted and what is refused, and how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cases import LLAMA3_ROPE, Sequences, tiny_transformers_llama
from safetensors.torch import save_file

from kernels.ops import load_ops
from pop_node.models.llama import LlamaConfig
from pop_node.models.registry import load_backend, load_model, prepare, read_weights
from pop_node.models.rope import cos_sin_table
from wire.errors import ConfigError

GOOD = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def write_model(folder: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """A tiny model directory; returns its tensors."""
    theirs = tiny_transformers_llama()
    weights = {
        name: tensor.clone()
        for name, tensor in theirs.state_dict().items()
        if name != "lm_head.weight"
    }
    (folder / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return weights
    table = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(weights)}
    for file in set(table.values()):
        save_file({n: weights[n] for n in weights if table[n] == file}, folder / file)
    index = json.dumps({"weight_map": table})
    (folder / "model.safetensors.index.json").write_text(index)
    return weights


@pytest.mark.parametrize("shards", [1, 3])
def test_loads_a_directory(tmp_path: Path, shards: int) -> None:
    weights = write_model(tmp_path, shards=shards)
    read = read_weights(tmp_path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    model = load_model(tmp_path, "bfloat16", load_ops("auto", 1))
    sequences = Sequences(model)
    assert sequences.step({sequences.new(): [1, 2, 3]})[0].isfinite().all()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never read"):
        read_weights(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read"):
        read_weights(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, shards=3)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-1\.safetensors: cannot be read"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "table",
    [{"a": "../model.safetensors"}, {"a": "/x.safetensors"}, {"a": "weights.bin"}, {"a": 1}, [], 3],
)
def test_an_index_cannot_name_other_files(tmp_path: Path, table: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ConfigError, match=r"index\.json"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_bad_config_file_is_refused(tmp_path: Path, content: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path, "float32", load_ops("reference", 1))


def test_without_a_compiler_native_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no C compiler on PATH.*install a C compiler"):
        load_backend("native", 1)
    with pytest.raises(ConfigError, match="threads is 0"):
        load_backend("auto", 0)


def test_config_defaults() -> None:
    config = LlamaConfig.from_hf({**GOOD, "num_key_value_heads": None, "rope_scaling": None})
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (4, 16, 500000.0)
    assert (config.rope_scaling, config.tied_embeddings) == (None, False)


def test_config_reads_both_places_of_rope_settings() -> None:
    old = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    nested = LlamaConfig.from_hf({**GOOD, "rope_parameters": LLAMA3_ROPE})
    flat = LlamaConfig.from_hf({**GOOD, "rope_scaling": old, "rope_theta": 10000.0})
    assert nested == flat
    assert flat.rope_scaling is not None
    assert flat.rope_scaling.factor == 8.0
    plain = {"rope_type": "default", "rope_theta": 5.0}
    assert LlamaConfig.from_hf({**GOOD, "rope_parameters": plain}).rope_theta == 5.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
        ({"rope_scaling": "yarn"}, "must be null or an object"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must be below"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 1 << 40}, "vocab_size is"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"intermediate_size": None}, "intermediate_size is None"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        LlamaConfig.from_hf({**GOOD, **changes})
    assert error.value.where == "config.json"


def test_what_was_prepared_from_another_configuration_is_not_used(tmp_path: Path) -> None:
    write_model(tmp_path)
    right = load_model(tmp_path, "float32", load_ops("reference", 1)).weights.cos_sin
    good = (tmp_path / "config.json").read_text()
    for content in (json.dumps({**GOOD, "rope_theta": 7.0}), "{", "[]"):
        (tmp_path / "config.json").write_text(content)
        prepare(tmp_path)  # says nothing: who loads will
    (tmp_path / "config.json").write_text(good)
    model = load_model(tmp_path, "float32", load_ops("reference", 1))
    assert torch.equal(model.weights.cos_sin, right)
    cos_sin_table.cache_clear()
    prepare(tmp_path)
    load_model(tmp_path, "float32", load_ops("reference", 1))
    assert (cos_sin_table.cache_info().hits, cos_sin_table.cache_info().misses) == (1, 1)
