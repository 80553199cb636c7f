"""Writes a tiny random Llama as a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 199
CONTEXT_TOKENS = 512
LAYERS = 3
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM = 64, 96, 4, 2, 16


def write_tiny_llama(directory: Path) -> Path:
    """config.json and model.safetensors; always the same weights."""
    generator = torch.Generator().manual_seed(20)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {
        "model.embed_tokens.weight": weight(VOCABULARY, _HIDDEN),
        "model.norm.weight": torch.ones(_HIDDEN),
        "lm_head.weight": weight(VOCABULARY, _HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": torch.ones(_HIDDEN),
            at + "post_attention_layernorm.weight": torch.ones(_HIDDEN),
            at + "self_attn.q_proj.weight": weight(_HEADS * _HEAD_DIM, _HIDDEN),
            at + "self_attn.k_proj.weight": weight(_KV_HEADS * _HEAD_DIM, _HIDDEN),
            at + "self_attn.v_proj.weight": weight(_KV_HEADS * _HEAD_DIM, _HIDDEN),
            at + "self_attn.o_proj.weight": weight(_HIDDEN, _HEADS * _HEAD_DIM),
            at + "mlp.gate_proj.weight": weight(_INNER, _HIDDEN),
            at + "mlp.up_proj.weight": weight(_INNER, _HIDDEN),
            at + "mlp.down_proj.weight": weight(_HIDDEN, _INNER),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory
