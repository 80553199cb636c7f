"""Random Llamas for the GPU benchmarks: sizes, weights and prompts, ours and transformers'."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from kernels.ops import Ops  # noqa: E402
from pop_node.models.llama import DTYPES, Llama, LlamaConfig  # noqa: E402
from pop_node.models.packing import Packer  # noqa: E402

SEED = 20240607


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's sizes; ``config`` is its config.json."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    context: int

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
        }

    @property
    def read_weights(self) -> int:
        """Elements of the weights that each step reads: all matrices, of embeddings the head."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden

    @property
    def kv_elements(self) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SMOLLM2 = Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, True, 8448)
LLAMA_8B = Shape("llama3-8b", 32, 4096, 32, 8, 128, 14336, 128256, False, 8448)
TINY = Shape("tiny", 2, 32, 4, 2, 8, 48, 96, True, 256)


def weights(shape: Shape, dtype: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Random ones by their names in files; what is multiplied as one lies back to back.

    All are numbers of bfloat16, so that a model is the same in either dtype.
    """
    rng = torch.Generator(device).manual_seed(SEED)
    hidden, kind = shape.hidden, DTYPES[dtype]

    def draw(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, device=device, generator=rng) * columns**-0.5
        return drawn.bfloat16().to(kind)

    def norm() -> torch.Tensor:
        drawn = torch.randn(hidden, device=device, generator=rng)
        return (1 + drawn / 10).bfloat16().to(kind)

    named = {"model.embed_tokens.weight": draw(shape.vocab, hidden), "model.norm.weight": norm()}
    if not shape.tied:
        named["lm_head.weight"] = draw(shape.vocab, hidden)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        q, k, v = draw(queries + 2 * keys, hidden).split([queries, keys, keys])
        gate, up = draw(2 * shape.inner, hidden).split(shape.inner)
        named |= {
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": draw(hidden, queries),
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": draw(hidden, shape.inner),
            at + "input_layernorm.weight": norm(),
            at + "post_attention_layernorm.weight": norm(),
        }
    return named


def prompts(shape: Shape, count: int, tokens: int) -> list[list[int]]:
    """Random ones."""
    rng = torch.Generator().manual_seed(SEED)
    drawn: list[list[int]] = torch.randint(0, shape.vocab, (count, tokens), generator=rng).tolist()
    return drawn


def a_model(shape: Shape, dtype: str, ops: Ops, form: str = "plain") -> Llama:
    """A random one, its matrices in ``form``: ``plain`` or ``resident``."""
    named = weights(shape, dtype, ops.device)
    if form == "plain":
        return Llama(LlamaConfig.from_hf(shape.config), named, ops, dtype)
    return Llama(LlamaConfig.from_hf(shape.config), named, ops, dtype, Packer(ops, release=False))


def hugging_face(shape: Shape, dtype: str, device: torch.device) -> Any:
    """transformers' model of the same weights, to call; None where it is not installed.

    It is made in ``dtype``: one that is cast to it later loses its rotary frequencies' last bits
    too, which it computes in float32, and is far worse than what people run.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers import LlamaConfig as TheirConfig
    except ImportError:
        return None
    config = TheirConfig(**shape.config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    named = weights(shape, dtype, device)
    if shape.tied:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    model.load_state_dict(named)
    return model
