"""Reads a Llama configuration strictly: what this code does not compute is refused, not ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pop_node.models.rope import Llama3Scaling
from wire.errors import ConfigError

# Upper bound of any size in a configuration: guards against absurd allocations from a bad file.
MAX_SIZE = 1 << 24


def _fail(message: str, suggestion: str | None = None) -> ConfigError:
    return ConfigError(message, where="config.json", suggestion=suggestion)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer. Raises ConfigError."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise _fail(f"{key} is {value!r}, must be an integer from 1 to {MAX_SIZE}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive, finite number. Raises ConfigError."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(f"{key} is {value!r}, must be a number")
    if not 0.0 < value < float("inf"):
        raise _fail(f"{key} is {value!r}, must be positive and finite")
    return float(value)


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """(theta, scaling). Newer files keep both in ``rope_parameters``. Raises ConfigError."""
    nested = config.get("rope_parameters")
    scaling = nested if nested is not None else config.get("rope_scaling")
    if scaling is None:
        return _number(config, "rope_theta", 10_000.0), None
    if not isinstance(scaling, Mapping):
        raise _fail(f"rope_scaling is {scaling!r}, must be null or an object")
    theta = _number({**config, **scaling}, "rope_theta", 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise _fail(f"rope_scaling of type {kind!r} is not supported", "use null or 'llama3'")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if not low < high:
        raise _fail(f"low_freq_factor {low} must be below high_freq_factor {high}")
    original = _size(scaling, "original_max_position_embeddings")
    return theta, Llama3Scaling(_number(scaling, "factor"), low, high, original)


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes and constants of a Llama-family model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the object of a Hugging Face ``config.json``.

        Raises:
            ConfigError: not a Llama, a value is impossible, or a feature is not computed here.
        """
        if config.get("model_type") != "llama":
            raise _fail(
                f"model_type {config.get('model_type')!r} is not supported",
                "only 'llama' models can be served",
            )
        if config.get("hidden_act", "silu") != "silu":
            raise _fail(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
        for key in ("attention_bias", "mlp_bias", "quantization_config"):
            if config.get(key):
                raise _fail(f"{key} is not supported")
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", heads)
        head_dim = _size(config, "head_dim", hidden // heads or 1)
        if heads % kv_heads:
            raise _fail(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
        if head_dim % 2:
            raise _fail(f"head_dim is {head_dim}, rotary embedding needs an even one")
        theta, scaling = _rope(config)
        return cls(
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context_tokens=_size(config, "max_position_embeddings", 2048),
            norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
