"""A whole model on the Triton operations, in the interpreter, against the reference operations."""

from __future__ import annotations

import torch
from kernel_cases import place

from kernels.ops import Ops, reference_ops
from kernels.triton.ops import TritonOps
from pop_node.models.llama import Llama, LlamaConfig

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def interpreted_ops(batch_invariant: bool) -> Ops:
    """What ``load_ops`` would give on a GPU, on the CPU."""
    ops = TritonOps(20, batch_invariant=batch_invariant)
    return Ops(
        name="interpreted",
        device=torch.device("cpu"),
        batch_invariant=batch_invariant,
        rms_norm=ops.rms_norm,
        add_rms_norm=ops.add_rms_norm,
        embed=ops.embed,
        linear=ops.linear,
        rope_kv_write=ops.rope_kv_write,
        attention=ops.attention,
        silu_mul=ops.silu_mul,
        logits=ops.logits,
        gumbel_sample=ops.gumbel_sample,
        penalize=ops.penalize,
        gate_up=ops.gate_up,
    )


def weights(rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Random ones by the names of the files."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    named = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        named |= {
            f"{prefix}self_attn.q_proj.weight": (48, hidden),
            f"{prefix}self_attn.k_proj.weight": (16, hidden),
            f"{prefix}self_attn.v_proj.weight": (16, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, 48),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
    drawn = {
        name: torch.randn(shape, generator=rng) / shape[1] ** 0.5 for name, shape in named.items()
    }
    norms = ["model.norm.weight"]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms += [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
    return drawn | {name: 1 + torch.randn(hidden, generator=rng) / 10 for name in norms}


def test_prefill_in_chunks_and_decode_beside_it(rng: torch.Generator) -> None:
    config, tensors = LlamaConfig.from_hf(CONFIG), weights(rng)
    ids = torch.randint(0, 97, (34,), generator=rng)
    results = []
    for ops in (reference_ops(), interpreted_ops(False), interpreted_ops(True)):
        draw = torch.Generator().manual_seed(5)
        model = Llama(config, tensors, ops, "float32")
        # Two sequences: one of 24 tokens in chunks, one of 10 that decodes meanwhile.
        room = [torch.zeros(2, n, 2, 8) for n in (24, 10)]
        places = place(draw, room, [24, 10], 4).meta
        cache = model.allocate_cache(int(places.block_tables.max()) + 1, 4)
        rows = []
        for first, end, decoded in ((0, 19, 8), (19, 23, 9), (23, 24, 10)):
            new = 8 if decoded == 8 else 1
            lens = ([end - first, new], [end, decoded])
            token = torch.cat((torch.arange(first, end), 24 + torch.arange(decoded - new, decoded)))
            meta = type(places)(
                positions=places.positions[token],
                slots=places.slots[token],
                query_starts=torch.tensor([0, lens[0][0], sum(lens[0])], dtype=torch.int32),
                context_lens=torch.tensor(lens[1], dtype=torch.int32),
                block_tables=places.block_tables,
                block_tokens=4,
                max_query=max(lens[0]),
                max_context=max(lens[1]),
                query_lens_host=lens[0],
                context_lens_host=lens[1],
            )
            last = meta.query_starts[1:].long() - 1
            rows.append(model.forward(ids[token], meta, cache, last))
        results.append(torch.cat(rows))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-5)
    arguments = ([0.8] * 6, [0.9] * 6, [1] * 6, [0] * 6, list(range(6)))
    ops = interpreted_ops(False)
    assert ops.gumbel_sample(results[1], *arguments) == reference_ops().gumbel_sample(
        results[0], *arguments
    )
