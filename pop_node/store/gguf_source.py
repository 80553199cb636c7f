"""Reads a model in a GGUF file: Llama architecture, any quantisation the gguf package decodes.

Owns GGUF's names and layout; must not know bundles. Dequantisation works on bands of rows, so
memory stays small whatever the tensor. Whatever is not understood (another architecture, rope
scaling, experts, unknown tensors) is a ``ConfigError``: a model converted half right answers
nonsense.
The gguf package is an optional extra and imported only here and in ``gguf_tokenizer``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pop_node.store.dtypes import Array
from pop_node.store.gguf_tokenizer import read_tokenizer
from pop_node.store.source import SourceModel, SourceTensor
from wire.errors import ConfigError

BAND_ELEMENTS = 4 * 1024 * 1024
"""16 MiB of float32 at a time; decoding one makes a few temporaries of that size."""

Meta = Callable[..., Any]
"""``meta(key, default)`` -> value of a GGUF field."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: Path) -> SourceModel:
    """Describe the model in a GGUF file; weights are decoded later, band by band.

    Raises ``ConfigError`` if the file is broken or holds something else than a plain Llama model
    with a SmolLM tokenizer, or if the gguf package is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        raise ConfigError(
            "reading GGUF needs the gguf package", suggestion="pip install 'popmesh[gguf]'"
        ) from exc
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, LookupError) as exc:
        raise ConfigError(f"not a readable GGUF file: {exc}", where=str(path)) from exc

    def meta(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    try:
        config = _config(meta, tied=all(t.name != "output.weight" for t in reader.tensors))
        files, vocab_size = _text_files(meta, config)
        config["vocab_size"] = vocab_size
        tensors = [_tensor(tensor, config["head_dim"]) for tensor in reader.tensors]
        _check_shapes(tensors, config)
    except ConfigError as exc:
        raise ConfigError(str(exc), where=str(path)) from exc
    template = meta("tokenizer.chat_template", "")
    return SourceModel(config, files, tensors, str(meta("general.license", "")), template)


def _config(meta: Meta, *, tied: bool) -> dict[str, Any]:
    architecture = meta("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"architecture {architecture!r} is not supported, only 'llama' is")
    if meta("llama.expert_count", 0):
        raise ConfigError("mixtures of experts are not supported in GGUF")
    if meta("llama.rope.scaling.type", "none") != "none":
        raise ConfigError("rope scaling is not supported in GGUF")
    hidden = _integer(meta, "llama.embedding_length")
    heads = _integer(meta, "llama.attention.head_count")
    head_dim = _integer(meta, "llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _integer(meta, key, head_dim) != head_dim:
            raise ConfigError(f"{key} differs from the head dimension {head_dim}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _integer(meta, "llama.feed_forward_length"),
        "num_hidden_layers": _integer(meta, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(meta, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _integer(meta, "llama.context_length"),
        "rms_norm_eps": _real(meta, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _real(meta, "llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _integer(meta: Meta, key: str, default: int | None = None) -> int:
    value = meta(key, default)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} is {value!r}, not a positive integer")
    return value


def _real(meta: Meta, key: str, default: float | None = None) -> float:
    """A float32 field as the shortest decimal that means it (1e-05, not 9.99999974e-06)."""
    value = meta(key, default)
    if not isinstance(value, float) or not value > 0:
        raise ConfigError(f"{key} is {value!r}, not a positive number")
    return float(str(np.float32(value)))


def _text_files(meta: Meta, config: dict[str, Any]) -> tuple[dict[str, bytes], int]:
    """Tokenizer files and vocabulary size; adds the special ids to ``config``."""
    tokenizer, tokens = read_tokenizer(meta)
    special_ids = {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = meta(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise ConfigError(f"{name} token {number} is outside the vocabulary")
        settings[f"{name}_token"] = tokens[number]
        if name != "unk":
            special_ids[f"{name}_token_id"] = number
    template = meta("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    config.update(special_ids)
    files = {
        "generation_config.json": _json(special_ids),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _json(settings),
    }
    return files, len(tokens)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _tensor(tensor: Any, head_dim: int) -> SourceTensor:
    """``tensor`` is gguf's: ``data`` [rows, encoded bytes per row], ``shape`` innermost first."""
    name = _huggingface_name(tensor.name)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    rotary = ".attn_q." in tensor.name or ".attn_k." in tensor.name
    if rotary and (len(shape) != 2 or shape[0] % head_dim):
        raise ConfigError(f"tensor {tensor.name} of shape {shape} does not consist of heads")
    order = _half_order(shape[0], head_dim) if rotary else None
    chunks = partial(_bands, tensor.data, tensor.tensor_type, shape, order)
    return SourceTensor(name, "F32", shape, chunks)


def _huggingface_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if layer.isdecimal() and part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.weight"
    raise ConfigError(f"unknown tensor {name!r}: not a plain Llama model")


def _half_order(rows: int, head_dim: int) -> Array:
    """Rows of Q or K in Hugging Face's order.

    Rotary embedding turns pairs of rows: GGUF keeps a pair side by side (2i, 2i + 1), Hugging Face
    half a head apart (i, i + head_dim / 2).
    """
    within = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    order: Array = (np.arange(0, rows, head_dim)[:, None] + within).reshape(-1)
    return order


def _bands(
    data: Array, encoding: Any, shape: tuple[int, ...], order: Array | None
) -> Iterator[Array]:
    """Float32 values of a tensor, a band of rows at a time; each row is encoded on its own."""
    from gguf.quants import dequantize

    rows = data if len(shape) > 1 else data[None]
    height = max(1, BAND_ELEMENTS // shape[-1])
    for start in range(0, len(rows), height):
        stop = start + height
        band = rows[start:stop] if order is None else rows[order[start:stop]]
        try:
            yield dequantize(np.ascontiguousarray(band), encoding)
        except NotImplementedError as exc:
            raise ConfigError(f"GGUF encoding {encoding.name} cannot be decoded") from exc


def _check_shapes(tensors: list[SourceTensor], config: dict[str, Any]) -> None:
    """All tensors of the described model are there, and no layer beyond it."""
    names = {tensor.name for tensor in tensors}
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{part}.weight" for part in _LAYER.values()}
    odd = sorted(names - {"lm_head.weight"} ^ expected)
    if odd:
        raise ConfigError(f"{len(odd)} tensors missing or too many, {odd[0]} the first")
    embedding = next(t for t in tensors if t.name == "model.embed_tokens.weight")
    if embedding.shape != (config["vocab_size"], config["hidden_size"]):
        raise ConfigError(f"the embedding has shape {embedding.shape}")
