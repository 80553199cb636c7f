"""Models that come and go in a real mesh: on demand, from peers, and before they are asked for.

One bundle under three names makes three models of 616 MB at 2,048 tokens of KV: Frankfurt has room
for two of them and Chicago, which starts with an empty disk, for one.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from pop_node.store.store import Store
from tests.e2e.hand_mesh import HandMesh, hand_mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

MODELS = ("red", "blue", "green")
GUESTS = ("blue", "green")
"""Of Frankfurt: one of them is in memory, ``red`` always is."""

CHICAGO = {"x-popmesh-client-geo": "41.9,-87.6"}
OFTEN = 12
"""Requests a minute that make a model stay: more than the tests of other things ask."""

ANSWER_S = 60.0
"""For an answer that a load precedes, on a machine that others use."""


class Origin:
    """A server that counts what it is asked for and gives nothing."""

    def __init__(self) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.asked = asked
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/bundle"
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    server = Origin()
    yield server
    server.close()


@pytest.fixture(scope="module")
def mesh(
    model_store: Store, origin: Origin, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HandMesh]:
    directory = tmp_path_factory.mktemp("models")
    near, far = Store(directory / "near"), Store(directory / "far")
    bundle = model_store.get("smollm2-135m").path.resolve()
    for name in MODELS:
        near.add(f"file://{bundle}", name, None, lambda *_: None)
    topology = {
        "mesh": "models",
        "models": {name: {"source": origin.url} for name in MODELS},
        "sites": {
            "fra": {"lat": 50.03, "lon": 8.57, "region": "eu"},
            "ord": {"lat": 41.98, "lon": -87.90, "region": "na"},
        },
        "nodes": {
            "fra-1": {
                "site": "fra",
                "models": list(MODELS),
                "pinned": ["red"],
                "memory_gb": 1.3,
                "kv_tokens": 2048,
            },
            "ord-1": {
                "site": "ord",
                "models": ["red", "blue"],
                "memory_gb": 0.7,
                "kv_tokens": 2048,
                "give_mbps": 4000,
            },
        },
        "routers": {"router-fra": {"site": "fra"}},
        "placement": {"warm_per_min": OFTEN, "cool_after_s": 60},
    }
    topology["nodes"]["fra-1"]["give_mbps"] = 4000
    with hand_mesh(directory, topology, {"fra-1": near.root, "ord-1": far.root}) as running:
        yield running


def body(model: str, prompt: str = "The capital of France is", tokens: int = 4) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def ask(
    mesh: HandMesh, model: str, at: str | None = None, headers: dict[str, str] | None = None
) -> httpx.Response:
    """One answer; ``at`` pins both legs to a node."""
    pin = {"x-popmesh-route": f"prefill={at},decode={at}"} if at else {}
    return httpx.post(
        f"{mesh.url}/v1/completions",
        json=body(model),
        headers={**pin, **(headers or {})},
        timeout=ANSWER_S,
    )


def ask_again(mesh: HandMesh, model: str, at: str) -> httpx.Response:
    """As a client does that is told when to come back."""
    for _ in range(5):
        answer = ask(mesh, model, at)
        if answer.status_code != 503:
            break
        time.sleep(float(answer.headers["Retry-After"]))
    return answer


def says_paris(answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["text"]


def nodes_that_loaded(mesh: HandMesh, answer: httpx.Response) -> set[str]:
    """Which nodes had to load the model for it, as the router's record says."""
    request = answer.headers["x-popmesh-request-id"]
    record = httpx.get(f"{mesh.url}/popmesh/requests/{request}", timeout=10).raise_for_status()
    return {node for attempt in record.json()["attempts"] for node in attempt["loads"]}


def wait_guests(mesh: HandMesh) -> tuple[str, str]:
    """(guest that is in Frankfurt's memory, guest that is on its disk), once it is so."""

    def settled() -> bool:
        found = mesh.warmth("fra-1")
        return found.get("red") == "warm" and sorted(found[g] for g in GUESTS) == ["disk", "warm"]

    mesh.wait_until(settled)
    found = mesh.warmth("fra-1")
    first, second = GUESTS
    return (first, second) if found[first] == "warm" else (second, first)


class Streaming:
    """A long answer of a model in Frankfurt, read on a thread."""

    def __init__(self, mesh: HandMesh, model: str, tokens: int) -> None:
        self._mesh, self._body = mesh, {**body(model, "Once", tokens), "stream": True}
        self.begun = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._result = self._pool.submit(self._read)

    def _read(self) -> tuple[int, str | None]:
        """(events with text, finish reason)."""
        pin = {"x-popmesh-route": "prefill=fra-1,decode=fra-1"}
        url, count, finish = f"{self._mesh.url}/v1/completions", 0, None
        try:
            with httpx.stream(
                "POST", url, json=self._body, headers=pin, timeout=ANSWER_S
            ) as answer:
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        count += 1
                        finish = choice["finish_reason"] or finish
                    self.begun.set()
        finally:
            self.begun.set()
        return count, finish

    def wait_begun(self) -> None:
        assert self.begun.wait(ANSWER_S)

    def result(self) -> tuple[int, str | None]:
        found = self._result.result(ANSWER_S * 2)
        self._pool.shutdown()
        return found


def engine_pid(mesh: HandMesh, node: str, model: str) -> int:
    status = json.loads((mesh.directory / f"{node}.json").read_text())
    return next(e["pid"] for e in status["engines"] if e["model"] == model)


# ---- on demand ---------------------------------------------------------------------------------


def test_the_first_request_waits_for_the_load_and_the_least_used_guest_goes(mesh):
    warm, cold = wait_guests(mesh)
    answer = ask(mesh, cold, "fra-1")
    says_paris(answer)
    assert nodes_that_loaded(mesh, answer) == {"fra-1"}
    assert wait_guests(mesh) == (cold, warm)
    assert nodes_that_loaded(mesh, ask(mesh, cold, "fra-1")) == set()
    says_paris(ask_again(mesh, warm, "fra-1"))
    assert wait_guests(mesh) == (warm, cold)
    says_paris(ask(mesh, "red", "fra-1"))


def test_a_model_whose_place_is_in_use_is_refused_with_a_time(mesh):
    warm, cold = wait_guests(mesh)
    long = Streaming(mesh, warm, 500)
    long.wait_begun()
    refused = ask(mesh, cold, "fra-1")
    assert refused.status_code == 503, refused.text
    assert int(refused.headers["Retry-After"]) >= 1
    count, finish = long.result()
    assert finish == "length"
    assert count > 1
    says_paris(ask_again(mesh, cold, "fra-1"))
    assert wait_guests(mesh) == (cold, warm)


def test_many_who_ask_for_a_cold_model_at_once_are_all_answered_after_one_load(mesh):
    warm, cold = wait_guests(mesh)
    loads = mesh.log("fra-1").count(f"{cold} is in memory")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(mesh, cold, "fra-1"), range(6)))
    for answer in answers:
        says_paris(answer)
    assert mesh.log("fra-1").count(f"{cold} is in memory") == loads + 1
    assert wait_guests(mesh) == (cold, warm)


def test_a_models_crash_leaves_the_others_serving(mesh):
    warm, _ = wait_guests(mesh)
    victim = engine_pid(mesh, "fra-1", warm)
    long = Streaming(mesh, "red", 600)
    long.wait_begun()
    os.kill(victim, signal.SIGKILL)
    _, finish = long.result()
    assert finish == "length"
    mesh.wait_until(lambda: mesh.warmth("fra-1")[warm] == "warm")
    says_paris(ask(mesh, warm, "fra-1"))
    assert engine_pid(mesh, "fra-1", warm) != victim


# ---- from peers --------------------------------------------------------------------------------


def test_an_empty_disk_is_filled_by_a_peer_and_never_by_the_origin(mesh, origin):
    mesh.wait_until(lambda: set(mesh.warmth("ord-1").values()) == {"warm", "disk"})
    store = Store(mesh.stores["ord-1"])
    rows = {row.name: row for row in store.rows()}
    assert {"red", "blue"} <= rows.keys()
    for name in ("red", "blue"):
        assert rows[name].manifest is not None
        says_paris(ask(mesh, name, "ord-1"))
    store.verify("red")
    assert origin.asked == []


# ---- before it is asked for --------------------------------------------------------------------


def near(mesh: HandMesh, model: str, state: str) -> Callable[[], bool]:
    return lambda: mesh.warmth("ord-1").get(model) == state


def test_what_a_region_keeps_asking_for_is_warmed_there(mesh):
    says_paris(ask(mesh, "red", "ord-1"))  # red is in Chicago's memory, so blue is not
    mesh.wait_until(near(mesh, "blue", "disk"))
    says_paris(ask_again(mesh, "blue", "fra-1"))
    for _ in range(OFTEN + 4):
        says_paris(ask(mesh, "blue", headers=CHICAGO))
    mesh.wait_until(near(mesh, "blue", "warm"))
    answer = ask(mesh, "blue", headers=CHICAGO)
    says_paris(answer)
    assert answer.headers["x-popmesh-decode"] == "ord-1"
    placement = httpx.get(f"{mesh.url}/popmesh/placement", timeout=10).raise_for_status().json()
    (decision,) = [d for d in placement["decisions"] if (d["model"], d["region"]) == ("blue", "na")]
    assert "ord-1" in decision["nodes"]
    assert decision["kept_s"] > 0
