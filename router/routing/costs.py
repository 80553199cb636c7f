"""Cost of serving one request with one pair of nodes, in seconds.

    total = to_prefill + load + queue + prefill + kv_tail + interference + decode + to_client

Every term estimates time that the client waits, so terms add up without unit tricks. The one
weighted term is ``decode``: a second spread over a whole answer hurts less than a second before its
first token (``DECODE_WEIGHT``). ``load`` is the wait until the model is in memory at both nodes
(``router.routing.loading``). Pure functions of a frozen view; know no HTTP and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.routing.speeds import BATCH_DOUBLING, base_step_s, prefill_rate
from router.routing.view import NodeView, Pending, Speed, View
from topology.geography import estimate_rtt_ms, great_circle_km, link_between
from topology.model import BYTES_PER_MBIT, Position

EXPECTED_OUTPUT_TOKENS = 128
"""Length of an answer for which the decode node's speed is priced. Guess: a chat turn."""

DECODE_WEIGHT = 0.25
"""Worth of a second of decoding against a second of TTFT. Guess: people read slower than nodes
write."""

CHUNK_TOKENS = 256
"""Prefill tokens per engine step next to running decodes; each chunk also waits for one decode
step."""

SAME_PLACE_KM = 100.0
"""A client this near to the router sees the router's measured round trips."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One term of a cost: ``seconds`` of ``term`` because of ``detail``."""

    term: str
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a request needs, in tokens; ``cached`` maps nodes to prompt tokens they already hold."""

    model: str
    prompt_tokens: int
    output_tokens: int
    cached: Mapping[str, int]


def typical_speed(view: View, node: NodeView, model: str) -> Speed:
    """What the engines of this node's kind do."""
    return view.speeds.get((model, node.kin), Speed())


def uncached_tokens(work: Work, node: str) -> int:
    """Prompt tokens to compute at ``node``; at least the last one always is."""
    return max(1, work.prompt_tokens - work.cached.get(node, 0))


def client_rtt_s(view: View, client: Position, node: NodeView) -> tuple[float, str]:
    """Round trip of a client (served by an edge next to it) to ``node``, and how it was known.

    For a client next to this router it is the router's own figure, else an estimate by distance.
    """
    home = view.position()
    if client == home or great_circle_km(client, home) <= SAME_PLACE_KM:
        source = "measured" if node.rtt_measured else "estimated"
        return node.rtt_ms / 1e3, f"RTT {node.rtt_ms:.1f} ms {source}"
    rtt_ms = estimate_rtt_ms(client, node.position, view.topology.defaults)
    return rtt_ms / 1e3, f"RTT {rtt_ms:.1f} ms by distance"


def queue_s(view: View, node: NodeView, model: str, now: float) -> tuple[float, str]:
    """Prefill tokens before ours over the prefill rate: ``(queued - rate * age + pending) / rate``.

    ``age`` is the time since the last ``Load``: the queue has been worked on since.
    """
    engine = node.engines[model]
    rate = prefill_rate(engine, typical_speed(view, node, model))
    pending = node.pending.get(model, Pending()).prefill_tokens
    queued = max(0.0, engine.queued_prefill_tokens - rate * max(0.0, now - node.load_at)) + pending
    return queued / rate, f"{queued:.0f} tokens queued at {rate:.0f}/s"


def compute_s(view: View, node: NodeView, work: Work) -> tuple[float, str]:
    """Prefill of the uncached tokens; each chunk shares its step with the running decodes."""
    engine = node.engines[work.model]
    typical = typical_speed(view, node, work.model)
    rate = prefill_rate(engine, typical)
    tokens = uncached_tokens(work, node.name)
    seconds = tokens / rate
    if engine.running:
        chunks = -(-tokens // CHUNK_TOKENS)
        seconds += chunks * (engine.decode_step_ms / 1e3 or base_step_s(engine, typical))
    cached = min(work.cached.get(node.name, 0), work.prompt_tokens)
    return seconds, f"{tokens} tokens at {rate:.0f}/s, {cached} cached, {engine.running} decoding"


def decode_s(view: View, node: NodeView, work: Work) -> tuple[float, str]:
    """``DECODE_WEIGHT * tokens * step(n)`` with ``step(n) = base * (1 + n / BATCH_DOUBLING)``.

    ``n`` counts running, waiting and just-sent sequences and ours.
    """
    engine = node.engines[work.model]
    base = base_step_s(engine, typical_speed(view, node, work.model))
    pending = node.pending.get(work.model, Pending()).streams
    sequences = engine.running + engine.waiting + pending + 1
    step = base * (1.0 + sequences / BATCH_DOUBLING)
    seconds = DECODE_WEIGHT * work.output_tokens * step
    return (
        seconds,
        f"{DECODE_WEIGHT:g} x {work.output_tokens} tokens at {step * 1e3:.1f} ms a step "
        f"with {sequences} in the batch",
    )


def kv_tail_s(
    view: View, prefill: NodeView, decode: NodeView, work: Work, hide_s: float | None = None
) -> tuple[float, str]:
    """What the KV transfer adds after the prefill; zero when both are one node.

        tail = max(0, rtt + bytes / bandwidth - compute) + rtt / 2

    The transfer starts one round trip (open, grant) after the prefill does, runs beside it, and the
    last byte travels half a round trip. ``bytes`` leaves out tokens that the decode node holds.
    Bandwidth is the pair's measured rate, else the topology's. ``hide_s`` stands for the compute
    when that is under way or over already.
    """
    if prefill.name == decode.name:
        return 0.0, "same node"
    link = link_between(view.topology, prefill.site, decode.site)
    measured = prefill.links.get(decode.name)
    rtt = (link.rtt_ms or 0.0) / 1e3
    bandwidth = (link.bandwidth_mbps or 1.0) * BYTES_PER_MBIT
    if measured is not None and measured.rtt_ms > 0:
        rtt = measured.rtt_ms / 1e3
    if measured is not None and measured.bytes_per_s > 0:
        bandwidth = measured.bytes_per_s
    tokens = max(0, work.prompt_tokens - work.cached.get(decode.name, 0))
    kv_bytes = tokens * prefill.offers[work.model].kv_bytes_per_token
    compute = compute_s(view, prefill, work)[0] if hide_s is None else hide_s
    seconds = max(0.0, rtt + kv_bytes / bandwidth - compute) + rtt / 2
    return seconds, (
        f"{kv_bytes / 1e6:.2f} MB at {bandwidth / 1e6:.1f} MB/s, RTT {rtt * 1e3:.1f} ms, "
        f"{compute * 1e3:.0f} ms of compute to hide it"
    )


def interference_s(view: View, decode: NodeView, work: Work, now: float) -> tuple[float, str]:
    """Prefills queued at another decode node: next to a prefill, a decode nearly stands still."""
    seconds, detail = queue_s(view, decode, work.model, now)
    return seconds, f"prefills at the decode node: {detail}"
