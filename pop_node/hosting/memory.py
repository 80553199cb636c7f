"""What a model takes and offers, from its manifest alone: known before it was ever loaded."""

from __future__ import annotations

from pop_node.engine.config import EngineConfig
from pop_node.kv_stream.spec import DTYPE_BYTES
from pop_node.store.manifest import Manifest
from pop_node.store.resident_plan import weights_bytes
from topology.budget import ModelSize
from topology.model import Node
from wire.messages import ModelOffer


def model_size(manifest: Manifest) -> ModelSize:
    """Bytes of the model on the disk, of its weights, and of a token's KV over all layers.

    Resident weights are counted without escapes, which are few and known only to who has read them.
    """
    kv = manifest.kv
    kv_bytes = 2 * kv.layers * kv.kv_heads * kv.head_dim * DTYPE_BYTES[manifest.dtype]
    decoded = manifest.data.decoded_bytes
    return ModelSize(manifest.total_bytes, decoded, kv_bytes, weights_bytes(manifest))


def model_memory(manifest: Manifest, node: Node) -> int:
    """Bytes of ``memory_gb`` that the model takes on ``node``: weights as they stay in memory, KV
    cache and engine. What a load needs beyond has the room of the KV cache, used only later."""
    return model_size(manifest).memory_bytes(node)


def cold_offer(
    name: str, manifest: Manifest, engine: EngineConfig, kv_host: str, kv_port: int
) -> ModelOffer:
    """What the model's engine will offer. Without a ``kv_port`` of its own, nobody knows yet where
    it will take KV streams."""
    context = min(manifest.context_tokens, engine.num_blocks * engine.block_tokens)
    return ModelOffer(
        name=name,
        identity=manifest.identity,
        context_tokens=min(context, engine.context_tokens or context),
        kv_bytes_per_token=model_size(manifest).kv_bytes_per_token,
        block_tokens=engine.block_tokens,
        total_blocks=engine.num_blocks,
        dtype=engine.dtype,
        kv_address=f"{kv_host}:{kv_port}" if kv_port else "",
    )
