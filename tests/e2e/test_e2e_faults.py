"""Links and processes that fail without dying: the client reads the same text, only later."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from popmesh.links.control import both_ways, cut, disturb, heal
from popmesh.links.plan import LinkFault
from registry.client import Registry
from tests.e2e.mesh import Mesh
from tests.e2e.streams import (
    KV_SLOW,
    Answer,
    ask,
    at,
    plan_of,
    wait_planned,
    wait_whole,
    whole_text,
    words,
)
from wire.errors import PeerError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

DETECTION_S = 2.0
"""As the mesh of these tests has it."""

MARGIN_S = 10.0
"""What a pause may take beyond the detection time: another prefill on a machine that others use."""

LEASE_S = 5.0
"""Least time without progress after which a transfer is given up."""

DIAL_S = 1.0
"""Least time for a last attempt to take it up over another connection."""

BETWEEN = ("ams", "lhr")
"""Prefill to decode."""


@pytest_asyncio.fixture
async def mesh(fault_mesh: Mesh) -> AsyncIterator[Mesh]:
    """The mesh, healed and at rest after each test."""
    yield fault_mesh
    heal(plan_of(fault_mesh))
    await wait_whole(fault_mesh, 3)
    await wait_planned(fault_mesh, "ams-1", "lhr-1")


@pytest.mark.parametrize(
    ("number", "faults"),
    [
        (10, both_ways(*BETWEEN, down=True)),
        (11, [LinkFault("ams", "lhr", down=True)]),
        (12, [LinkFault("lhr", "ams", down=True)]),
    ],
    ids=["both ways", "only kv vanishes", "only grants vanish"],
)
async def test_partition_between_prefill_and_decode_with_kv_in_flight(mesh, number, faults):
    plan, prompt = plan_of(mesh), words(number, 60)
    disturb(plan, KV_SLOW)
    answer = await ask(mesh, prompt, on_event=at(1, lambda _: disturb(plan, *faults)))
    assert (answer.prefill, answer.decode) == ("ams-1", "lhr-1")
    await whole_text(mesh, answer, prompt)
    record = mesh.request_record(answer.request_id)
    routes = [(a["route"]["prefill"], a["route"]["decode"]) for a in record["attempts"]]
    assert routes[0] == ("ams-1", "lhr-1")
    kv_passes = all(fault.from_site == "lhr" for fault in faults)
    if len(routes) > 1 or not kv_passes:  # what was granted before may have been all of it
        assert routes[-1] != routes[0]
    assert answer.longest_gap_s <= LEASE_S + DIAL_S + MARGIN_S


async def test_a_kv_connection_that_breaks_is_made_again_and_the_transfer_goes_on(mesh):
    plan, prompt = plan_of(mesh), words(20, 60)
    disturb(plan, KV_SLOW)

    def break_it(_: Answer) -> None:
        cut(plan, *BETWEEN)
        heal(plan)

    answer = await ask(mesh, prompt, on_event=at(1, break_it))
    assert (answer.prefill, answer.decode) == ("ams-1", "lhr-1")
    await whole_text(mesh, answer, prompt)
    assert len(mesh.request_record(answer.request_id)["attempts"]) == 1


async def test_a_kv_link_at_a_hundredth_of_its_rate_lives_while_it_moves(mesh):
    prompt = words(30, 100)
    disturb(plan_of(mesh), KV_SLOW)
    answer = await ask(mesh, prompt, route="prefill=ams-1,decode=lhr-1")
    assert answer.longest_gap_s > LEASE_S, "the transfer was too quick to show anything"
    await whole_text(mesh, answer, prompt)
    record = mesh.request_record(answer.request_id)
    assert len(record["attempts"]) == 1
    assert record["transfer"]["kv_bytes"] > 0


@pytest.mark.parametrize(
    ("number", "faults"),
    [(40, both_ways("fra", "lhr", down=True)), (41, [LinkFault("lhr", "fra", down=True)])],
    ids=["both ways", "only what the node says"],
)
async def test_a_half_open_link_to_the_decode_node(mesh, number, faults):
    plan, prompt = plan_of(mesh), words(number, 40)
    answer = await ask(mesh, prompt, 60, on_event=at(10, lambda _: disturb(plan, *faults)))
    assert answer.decode == "lhr-1"
    await whole_text(mesh, answer, prompt, 60)
    assert len(mesh.request_record(answer.request_id)["attempts"]) == 2
    assert answer.longest_gap_s <= DETECTION_S + MARGIN_S


async def test_a_link_that_is_deaf_one_way_cuts_no_stream(mesh):
    """What the router says vanishes, what the node says does not: the answer is whole anyhow."""
    plan, prompt = plan_of(mesh), words(50, 40)
    deaf = LinkFault("fra", "lhr", down=True)
    answer = await ask(mesh, prompt, 60, on_event=at(10, lambda _: disturb(plan, deaf)))
    await whole_text(mesh, answer, prompt, 60)
    assert answer.longest_gap_s <= DETECTION_S + MARGIN_S


async def test_resets_of_the_routers_links_cost_a_pause(mesh):
    plan, prompt = plan_of(mesh), words(60, 40)

    def reset(_: Answer) -> None:
        for site in ("ams", "lhr", "ord"):
            cut(plan, "fra", site)

    answer = await ask(mesh, prompt, 60, on_event=at(10, reset))
    await whole_text(mesh, answer, prompt, 60)
    assert len(mesh.request_record(answer.request_id)["attempts"]) > 1, "no link was reset"


async def test_a_link_that_flaps_faster_than_it_is_noticed_costs_nothing_but_waiting(mesh):
    plan, prompt = plan_of(mesh), words(70, 40)
    down = both_ways("fra", "lhr", down=True)

    def flap(number: int, _: Answer) -> None:
        if number in (5, 15, 25):
            disturb(plan, *down)
            asyncio.get_running_loop().call_later(0.5, heal, plan)

    answer = await ask(mesh, prompt, 40, on_event=flap)
    await whole_text(mesh, answer, prompt)
    assert len(mesh.request_record(answer.request_id)["attempts"]) == 1


async def test_bad_weather_everywhere(mesh):
    plan = plan_of(mesh)
    pairs = [("fra", "ams"), ("fra", "lhr"), ("ams", "lhr")]
    faults = [f for pair in pairs for f in both_ways(*pair, loss=0.05, jitter_ms=10.0)]
    disturb(plan, *faults)
    prompts = [words(80 + n, 30) for n in range(4)]
    answers = await asyncio.gather(*(ask(mesh, prompt, 24) for prompt in prompts))
    for answer, prompt in zip(answers, prompts, strict=True):
        await whole_text(mesh, answer, prompt, 24)


async def test_a_frozen_decode_node_holds_up_its_own_streams_only_and_not_for_long(mesh):
    """All answers end while it is still frozen; afterwards it serves again as if nothing was."""
    agent, _ = mesh.pids("lhr-1")
    frozen = asyncio.Event()

    def freeze(_: Answer) -> None:
        os.kill(agent, signal.SIGSTOP)
        frozen.set()

    prompts = [words(90 + n, 30) for n in range(4)]
    try:
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            others = [
                tasks.create_task(ask(mesh, prompt, 60, "prefill=ord-1,decode=ord-1"))
                for prompt in prompts[1:]
            ]
            own = tasks.create_task(ask(mesh, prompts[0], 60, on_event=at(10, freeze)))
        assert frozen.is_set()
        assert own.result().decode == "lhr-1"
        assert own.result().longest_gap_s <= DETECTION_S + MARGIN_S
        record = mesh.request_record(own.result().request_id)
        assert record["attempts"][-1]["route"]["decode"] != "lhr-1"
    finally:
        os.kill(agent, signal.SIGCONT)
    await wait_whole(mesh, 3)
    for task, prompt in zip([own, *others], prompts, strict=True):
        await whole_text(mesh, task.result(), prompt, 60)
    for other in others:
        assert len(mesh.request_record(other.result().request_id)["attempts"]) == 1
    again = await ask(mesh, words(99, 30), 8, "prefill=ams-1,decode=lhr-1")
    assert again.finish == "length"


async def test_a_frozen_engine_is_replaced_and_its_streams_go_on_elsewhere(mesh):
    """Its agent lives and answers pings; nobody thaws the engine."""
    agent, engine = mesh.pids("lhr-1")

    def freeze(_: Answer) -> None:
        os.kill(engine, signal.SIGSTOP)

    prompts = [words(100 + n, 30) for n in range(3)]
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        others = [
            tasks.create_task(ask(mesh, prompt, 60, "prefill=ord-1,decode=ord-1"))
            for prompt in prompts[1:]
        ]
        own = tasks.create_task(ask(mesh, prompts[0], 60, on_event=at(10, freeze)))
    assert own.result().decode == "lhr-1"
    assert own.result().longest_gap_s <= DETECTION_S + MARGIN_S
    assert not psutil.pid_exists(engine)
    await mesh.wait_reborn("lhr-1", engine)
    assert mesh.pids("lhr-1")[0] == agent
    for task, prompt in zip([own, *others], prompts, strict=True):
        await whole_text(mesh, task.result(), prompt, 60)
    for other in others:
        assert len(mesh.request_record(other.result().request_id)["attempts"]) == 1
    again = await ask(mesh, words(109, 30), 8, "prefill=ams-1,decode=lhr-1")
    assert again.finish == "length"


def registry_pid(mesh: Mesh) -> int:
    """The process of the embedded registry."""
    children = psutil.Process(mesh.process.pid).children()
    return next(child.pid for child in children if "registry" in child.cmdline()[:4])


async def test_a_frozen_registry_is_missed_by_no_request_and_no_recovery(mesh):
    """With nobody to ask, a killed decode node's stream goes on elsewhere and the node returns."""
    _, engine = mesh.pids("lhr-1")
    registry, prompt = registry_pid(mesh), words(170, 40)
    os.kill(registry, signal.SIGSTOP)
    try:
        answer = await ask(
            mesh, prompt, 60, on_event=at(10, lambda _: os.kill(engine, signal.SIGKILL))
        )
        assert answer.decode == "lhr-1"
        await mesh.wait_reborn("lhr-1", engine)
        again = await ask(mesh, words(171, 30), 8, "prefill=ams-1,decode=lhr-1")
        assert again.finish == "length"
    finally:
        os.kill(registry, signal.SIGCONT)
    await whole_text(mesh, answer, prompt, 60)


async def test_a_registry_that_dies_is_filled_again_while_streams_go_on(mesh):
    """It comes back at the same address with nothing in it; every node tells it of itself."""
    old = registry_pid(mesh)
    prompt = words(180, 30)
    answer = await ask(mesh, prompt, 40, on_event=at(5, lambda _: os.kill(old, signal.SIGKILL)))
    async with asyncio.timeout(30), Registry.connect(mesh.ready["registry_url"]) as registry:
        known: set[str] = set()
        while known != {"ams-1", "lhr-1", "ord-1"}:
            try:
                entries = (await registry.services("popmesh-node")).entries
            except PeerError:  # it is not there yet
                entries = ()
            known = {entry.meta["name"] for entry in entries if entry.status == "passing"}
            await asyncio.sleep(0.1)
    await whole_text(mesh, answer, prompt)
    assert len(mesh.request_record(answer.request_id)["attempts"]) == 1
