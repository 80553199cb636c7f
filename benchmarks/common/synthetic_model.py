"""The synthetic model of ``warm_start.py``: Llama-3.1-8B's shapes with fewer layers."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256
SEED = 8


def shapes(gib: float) -> dict[str, tuple[int, ...]]:
    """Tensors of the cut model; less than 3 GiB also cuts the vocabulary."""
    vocab = VOCAB if gib >= 3 else 16384
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "lm_head.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    outside = sum(math.prod(shape) * 2 for shape in found.values())
    per_layer = sum(math.prod(shape) * 2 for shape in layer.values())
    for number in range(max(1, round((gib * 2**30 - outside) / per_layer))):
        found |= {f"model.layers.{number}.{name}.weight": s for name, s in layer.items()}
    return found


def prepare(work: Path, gib: float) -> tuple[Path, Path]:
    """(safetensors file, bundle directory)."""
    from pop_node.store.store import Store

    name = f"cut-{gib:g}"
    source = work / name
    if not (source / "config.json").exists():
        write_source(source, shapes(gib))
    store = Store(work / "store")
    store.add(str(source), name, "bfloat16", lambda *_: None)
    return source / "model.safetensors", store.get(name).path


def write_source(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    import numpy as np

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    rng = np.random.default_rng(SEED)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = math.prod(shape)
            while left:
                part = rng.standard_normal(min(left, 1 << 23), dtype=np.float32)
                file.write((part.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                left -= len(part)
        file.flush()
        os.fsync(file.fileno())
    (folder / "tokenizer.json").write_text("{}")
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in tensors),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": tensors["lm_head.weight"][0],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
