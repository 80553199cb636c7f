"""Models in the mesh, read from the view: what is warm, loaded, guessed, sent."""

from __future__ import annotations

from router.metrics import Gauge, Labels, Metric, ToldCounter
from router.routing.view_builder import ViewBuilder
from wire.messages import EngineLoad


def model_metrics(builder: ViewBuilder) -> list[Metric]:
    """By node and model, as far as nodes have told. Counters begin anew when an engine does."""

    def engines() -> list[tuple[Labels, EngineLoad]]:
        nodes = builder.snapshot().nodes
        return [
            ((name, model), engine)
            for name, node in nodes.items()
            for model, engine in node.engines.items()
        ]

    def swaps() -> dict[Labels, float]:
        seen = engines()
        return {at: engine.last_load_ms / 1e3 for at, engine in seen if engine.last_load_ms}

    def used() -> dict[Labels, float]:
        nodes = builder.snapshot().nodes.values()
        return {(node.name,): float(node.memory_used_bytes) for node in nodes if node.memory_bytes}

    def pieces() -> dict[Labels, float]:
        seen = engines()
        packed = {(*at, "packed"): float(engine.kv_packed_pieces) for at, engine in seen}
        return packed | {(*at, "raw"): float(engine.kv_raw_pieces) for at, engine in seen}

    return [
        Gauge(
            "popmesh_model_ready",
            "1 when the model is in the node's memory and answers.",
            lambda: {at: float(engine.ready) for at, engine in engines()},
            ("node", "model"),
        ),
        Gauge(
            "popmesh_model_swap_seconds",
            "The model's last load there: begun to first token.",
            swaps,
            ("node", "model"),
        ),
        Gauge(
            "popmesh_model_memory_used_bytes",
            "What models take of the memory that the node has for them.",
            used,
            ("node",),
        ),
        ToldCounter(
            "popmesh_model_drafted_tokens_total",
            "Tokens that the model's engine there guessed ahead since it started.",
            lambda: {at: float(engine.drafted_tokens) for at, engine in engines()},
            ("node", "model"),
        ),
        ToldCounter(
            "popmesh_model_accepted_tokens_total",
            "Guessed tokens that were right; acceptance = accepted / drafted.",
            lambda: {at: float(engine.accepted_tokens) for at, engine in engines()},
            ("node", "model"),
        ),
        ToldCounter(
            "popmesh_model_kv_sent_bytes_total",
            "KV that was sent from there, counted as what it is unpacked.",
            lambda: {at: float(engine.kv_sent_bytes) for at, engine in engines()},
            ("node", "model"),
        ),
        ToldCounter(
            "popmesh_model_kv_wire_bytes_total",
            "Data frames that carried it; wire bytes / sent bytes is what packing leaves.",
            lambda: {at: float(engine.kv_wire_bytes) for at, engine in engines()},
            ("node", "model"),
        ),
        ToldCounter(
            "popmesh_model_kv_pieces_total",
            "Pieces that it was sent in, by how they travelled.",
            pieces,
            ("node", "model", "as"),
        ),
    ]
