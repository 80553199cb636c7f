"""What a terminal shows of models that come and go."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from popmesh.client import Attempt, ClientPlace, LoadWaited, Plan, Reason, Record, Route
from popmesh.render.routes import plan_view, record_view
from popmesh.render.status import status_view

ROUTE = Route(
    "fra-1", "fra-1", "fra", "fra", 2.5, [Reason("load", 2.0, "fra-1: on its disk, 2.0 s to go")]
)


def text_of(view: Any, width: int = 80) -> str:
    screen = io.StringIO()
    Console(file=screen, width=width).print(view)
    return screen.getvalue()


def engine(**changes: Any) -> dict[str, Any]:
    load = {"model": "qwen3-0.6b", "ready": False, "running": 0, "waiting": 0, "free_blocks": 0}
    load |= {"cached_blocks": 0, "total_blocks": 0, "prefill_tokens_per_s": 0.0}
    load |= {"decode_step_ms": 0.0, "warmth": "disk", "eta_ms": 2400, "warm_refused": ""}
    return load | changes


def status_of(*engines: dict[str, Any], **changes: Any) -> str:
    node = {"name": "fra-1", "site": "fra", "roles": ["prefill"], "link": "up", "draining": False}
    node |= {"rtt_ms": 0.4, "rtt_measured": True, "link_error": None, "engines": list(engines)}
    node |= {"memory_bytes": 8_000_000_000, "memory_used_bytes": 3_250_000_000}
    status = {"router": "r", "site": "fra", "mesh": "m", "running": 0, "registry_age_s": 1.0}
    status |= {"routable": [], "nodes": [node], "placement": []}
    return text_of(status_view(status | changes))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"ready": True, "warmth": "warm", "eta_ms": 0}, "ready"),
        ({}, "disk, 2.4 s"),
        ({"warmth": "loading", "eta_ms": 900}, "loading, 0.9 s"),
        ({"warmth": "absent", "eta_ms": 0}, "absent"),
        ({"warm_refused": "two others are answering"}, "disk, cannot load"),
        ({"warmth": ""}, "not ready"),
    ],
)
def test_a_model_says_where_it_is_and_how_long_it_takes(
    changes: dict[str, Any], shown: str
) -> None:
    assert f" {shown} " in status_of(engine(**changes))


def test_why_a_model_cannot_be_loaded_is_said_in_full() -> None:
    why = "the engine of qwen3-0.6b does not come up: chunk 23 does not match its digest"
    shown = status_of(engine(warmth="loading", warm_refused=why))
    assert "loading, cannot load" in shown
    assert f"fra-1 cannot load qwen3-0.6b: {why}" in " ".join(shown.split())
    assert "cannot load" not in status_of(engine())


def test_a_node_shows_its_memory_for_models() -> None:
    assert "3.2/8.0" in status_of(engine())


def test_acceptance_is_shown_where_tokens_are_guessed() -> None:
    quiet = engine(model="other", drafted_tokens=0, accepted_tokens=0)
    shown = status_of(engine(drafted_tokens=700, accepted_tokens=420), quiet)
    assert "Tokens guessed ahead: fra-1 qwen3-0.6b 60% of 700 right\n" in shown
    for nobody in (status_of(quiet), status_of(engine())):  # the latter of an older version
        assert "guessed" not in nobody


def test_placement_is_shown_where_it_keeps_something() -> None:
    kept = {"model": "qwen3-0.6b", "region": "eu", "per_min": 4.21, "nodes": ["fra-1", "lhr-1"]}
    idle = {"model": "other", "region": "na", "per_min": 0.3, "nodes": [], "kept_s": 0.0}
    shown = status_of(engine(), placement=[kept | {"kept_s": 281.4}, idle])
    for expected in ("4.2", "fra-1, lhr-1", "281", "eu"):
        assert expected in shown
    assert "other" not in shown


def test_a_plan_names_the_wait_for_a_model() -> None:
    plan = Plan(ClientPlace(50.0, 8.6, "header"), 10, ROUTE, [], [])
    shown = text_of(plan_view(plan))
    assert "model into memory" in shown
    assert "on its disk" in shown


def test_a_record_says_that_it_waited_for_a_load() -> None:
    loads = {"fra-1": LoadWaited(2400, 2512.0)}
    record = Record("r", "m", "stop", [Attempt(1, ROUTE, "stop", loads)])
    shown = text_of(record_view(record), width=120)
    assert "Waited for the model" in shown
    assert "2512 ms" in shown
    assert "it said 2400 ms" in shown
