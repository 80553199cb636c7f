"""Routes and their reasons in a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from popmesh.client import Plan, Record, Route, Transfer
from popmesh.render.words import name_column

TERMS = {
    "to_prefill": "client to prefill site",
    "load": "model into memory",
    "queue": "queue there",
    "prefill": "prefill",
    "kv_tail": "KV the link cannot hide",
    "interference": "interference at decode",
    "decode": "decode",
    "to_client": "decode site to client",
}
"""The router's cost terms in words; a term that is not here is shown as it is."""

MAX_CANDIDATES = 4
"""Candidates shown side by side: as many as fit 80 columns. ``--json`` has them all."""


def pair_text(route: Route) -> str:
    """``fra-1 (fra) -> lhr-1 (lhr)``."""
    return f"{route.prefill} ({route.prefill_site}) -> {route.decode} ({route.decode_site})"


def plan_view(plan: Plan) -> Group:
    """Candidates side by side, term by term in ms, then why the best one is the best."""
    routes = [plan.route, *plan.fallbacks][:MAX_CANDIDATES]
    heads = [f"{r.prefill} -> {r.decode}" for r in routes]
    columns = [Column(head, justify="right", overflow="fold") for head in heads]
    table = Table("ms", *columns, title="Candidates, the cheapest first", title_justify="left")
    for term in dict.fromkeys(reason.term for route in routes for reason in route.reasons):
        table.add_row(TERMS.get(term, term), *(_term_ms(route, term) for route in routes))
    table.add_section()
    table.add_row("cost: the sum", *(f"{route.cost_s * 1e3:.1f}" for route in routes))
    client = plan.client
    head = (
        f"Client at {client.lat:.2f},{client.lon:.2f} ({client.source}); "
        f"about {plan.prompt_tokens_estimate} prompt tokens"
    )
    parts: list[Text | Table] = [Text(head), table, reason_table(plan.route)]
    if plan.rejected:
        out = Table(name_column("Left out"), "Why")
        for rejected in plan.rejected:
            out.add_row(rejected.node, rejected.reason)
        parts.append(out)
    return Group(*parts)


def _term_ms(route: Route, term: str) -> str:
    return next((f"{r.seconds * 1e3:.1f}" for r in route.reasons if r.term == term), "")


def reason_table(route: Route) -> Table:
    """Every term of one route's cost, with its reason."""
    table = Table("Term", "ms", "Because", title=pair_text(route), title_justify="left")
    table.columns[1].justify = "right"
    for reason in route.reasons:
        ms = f"{reason.seconds * 1e3:.1f}"
        table.add_row(TERMS.get(reason.term, reason.term), ms, reason.detail)
    return table


def record_view(record: Record) -> Group:
    """What a finished request's route was, why, and what its transfer did."""
    route = record.attempts[-1].route
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "Time to first token", _ms(record.ttft_ms), "at the router: request read -> token"
    )
    facts.add_row("Whole answer", _ms(record.total_ms), "")
    for attempt in record.attempts:
        for node, load in attempt.loads.items():
            said = f"{node} had to load the model; it said {_ms(load.eta_ms)}"
            facts.add_row("Waited for the model", _ms(load.waited_ms), said)
    facts.add_row("Queue at prefill", _ms(record.node_queue_ms), "measured by the node")
    facts.add_row("Prefill", _ms(record.node_prefill_ms), "measured by the node")
    if len(record.attempts) > 1:
        outcomes = ", ".join(attempt.outcome for attempt in record.attempts)
        facts.add_row("Attempts", str(len(record.attempts)), outcomes)
    if record.transfer is not None:
        _transfer_rows(facts, record.transfer)
    return Group(reason_table(route), facts)


def summary_line(record: Record) -> str:
    """The route of an answer in one line."""
    parts = [pair_text(record.attempts[-1].route), f"first token {_ms(record.ttft_ms)}"]
    if record.transfer is not None and record.transfer.kv_bytes:
        parts.append(f"KV {_bytes(record.transfer.kv_bytes)}, {_hidden(record.transfer)} hidden")
    return " | ".join(parts)


def _transfer_rows(facts: Table, transfer: Transfer) -> None:
    rate = f"link RTT {transfer.rtt_ms:.1f} ms"
    sent = f"in {_ms(transfer.transfer_ms)}, {rate}"
    if transfer.wire_bytes < transfer.kv_bytes:
        sent += f", packed into {_bytes(transfer.wire_bytes)}"
    facts.add_row("KV cache sent", _bytes(transfer.kv_bytes), sent)
    facts.add_row(
        "Hidden behind compute",
        _hidden(transfer),
        f"{_bytes(transfer.hidden_bytes)} had arrived when the last layer was computed",
    )
    facts.add_row("KV tail", _ms(transfer.tail_ms), "last layer computed -> last byte received")


def _hidden(transfer: Transfer) -> str:
    return f"{100 * transfer.hidden_bytes / max(transfer.kv_bytes, 1):.0f} %"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
