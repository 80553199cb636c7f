"""Models that come as GGUF files; and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import TEMPLATE, TOKENS, tensors, write_gguf

from pop_node.store import gguf_source
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from pop_node.text.tokenizer import TextCodec
from tests.pop_node.store.adding import refused, weights_of

Q8_0 = gguf.GGMLQuantizationType.Q8_0


# ---- GGUF --------------------------------------------------------------------------------------


def test_gguf_gives_back_the_model_it_was_made_from(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "BAND_ELEMENTS", 100)  # three rows at a time, across heads
    path = write_gguf(tmp_path / "tiny.gguf")
    manifest = store.add(str(path), "tiny", "float32", unwatched)
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
    store.add(str(path), "tiny", "bfloat16", unwatched)
    for name, value in weights.items():
        # Rows are quantised one by one, so their order within a head makes no difference.
        decoded = gguf.dequantize(gguf.quantize(value, Q8_0), Q8_0) if value.ndim == 2 else value
        expected = torch.from_numpy(decoded).to(torch.bfloat16)
        assert torch.equal(weights_of(store)[name], expected)


def test_a_model_with_its_own_output_matrix_is_not_tied(tmp_path: Path, store: Store) -> None:
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    store.add(str(write_gguf(tmp_path / "untied.gguf", weights)), "tiny", "float32", unwatched)
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
