"""Whole nodes under load and under attack: whatever happens, a node answers and comes to rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pop_node.store.store import Store
from tests.pop_node.node_mesh import MODEL, tiny_mesh, write_store
from wire.messages import Finished


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("tiny-store"))


async def test_a_split_answer_is_the_whole_answer(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        whole = mesh.whole("a")
        assert (await a.ending(whole)).reason == "length"
        answer = mesh.answer(whole)
        assert len(answer) == 8

        split = mesh.split("a", "b")
        handed_over = await a.ending(split)
        assert isinstance(handed_over, Finished)
        assert handed_over.reason == "handoff"
        assert (await b.ending(split)).reason == "length"
        assert mesh.answer(split) == answer
        assert sorted(a.tokens[split]) == [0]

        # The request goes on elsewhere after three tokens that the client has read.
        again = mesh.split("b", "a", forced_ids=answer[:3], attempt=2)
        ends = [await mesh.routers["b"].ending(again, 20.0), await a.ending(again, 20.0)]
        assert [end.reason for end in ends] == ["handoff", "length"]
        assert mesh.answer(again) == answer[3:]
        await mesh.at_rest()
        assert a.load.engines[0].prefill_tokens_per_s > 0
        assert a.load.engines[0].decode_step_ms > 0
        assert MODEL == a.load.engines[0].model
