"""A client leaves, its request goes on, and the next one waits behind it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pop_node.engine.messages import Drop, Ended
from pop_node.store.store import Store
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_model import FakeModel
from tests.pains.pain_parts import HELLO
from tests.pop_node.engine.engine_builders import a_scheduler, an_add
from tests.pop_node.node_mesh import tiny_mesh
from tests.router.router_mesh import RouterMesh
from wire.messages import Finished, TextInput


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("leg", ["prefill", "both"])
def test_dynamo_13691_a_cancelled_prefill_costs_not_one_step_more(leg: str, steps: int) -> None:
    """ai-dynamo/dynamo 13691: a client closed its connection during the prefill of a long prompt;
    the worker went on to the last chunk, and a short request waited 11 to 54 s behind it. Here
    the step after the cancel computes the short one only."""
    scheduler, pool = a_scheduler(num_blocks=128, token_budget=16)
    model = FakeModel(128, pool.block_tokens)
    scheduler.handle(an_add(1, leg=leg, prompt_ids=[3] * 400), 0.0)

    def step() -> dict[int, int]:
        schedule, _ = scheduler.schedule(0.0)
        scheduler.complete(schedule, model.run(schedule), 0.0)
        scheduler.check()
        return {row.sequence.seq: row.count for row in schedule.rows}

    for _ in range(steps):
        assert step() == {1: 16}
    scheduler.handle(an_add(2, prompt_ids=[5] * 10), 0.0)
    assert scheduler.handle(Drop(1), 0.0)[-1] == Ended(1)
    assert scheduler.load().queued_prefill_tokens == 10
    assert step() == {2: 10}


@pytest.mark.parametrize("stream", [True, False])
async def test_dynamo_13691_clients_that_leave_before_the_first_token_free_both_nodes(
    one_pair: RouterMesh, stream: bool
) -> None:
    """ai-dynamo/dynamo 13691: the front end saw the client go, and no abort ever reached the
    engines, because nothing had come back from them yet. sgl-project/sglang 10613 found it worse
    without streaming: there the decode node worked through the dead requests too."""
    mesh = one_pair
    fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
    fra.go.clear()  # no token for anybody
    asking = [asyncio.ensure_future(mesh.chat(stream=stream)) for _ in range(20)]
    await fra.wait_until(lambda: fra.active == 20)
    await lhr.wait_until(lambda: lhr.active == 20)
    for each in asking:
        each.cancel()
    await fra.wait_until(lambda: fra.active == 0)
    await lhr.wait_until(lambda: lhr.active == 0)
    for node in (fra, lhr):
        assert set(node.cancels) == {submit.stream for submit in node.submits}
    fra.go.set()
    body = await (await mesh.chat()).json()
    assert body["choices"][0]["message"]["content"] == answer_text(HELLO, 8)
    await mesh.wait_idle()


async def test_sglang_10613_a_queue_of_cancelled_prompts_stands_in_nobodys_way(
    tiny_store: Store, tmp_path: Path
) -> None:
    """sgl-project/sglang 10613: dozens of long requests were stopped with Ctrl+C; those that still
    queued for their prefill, or had not met their decode node, stayed and blocked what came
    after."""
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        queued = [
            mesh.split("a", "b", input=TextInput(f"{n:03}" + "long " * 40), max_tokens=60)
            for n in range(30)
        ]
        await a.until(lambda: a.accepted)  # the first is being computed, the others wait
        for stream in queued:
            mesh.cancel(stream, "a", "b")
        short = mesh.split("a", "b", input=TextInput("short"))
        assert (await b.ending(short)).reason == "length"
        for router in (a, b):
            for stream in queued:
                assert stream in router.endings, "it outlived the request behind it"
        done = [e for e in (*a.said, *b.said) if isinstance(e, Finished) and e.reason == "length"]
        assert [e.stream for e in done] == [short]
        await mesh.at_rest()
