"""``POST /popmesh/drill`` against fake nodes: what reaches the node, and every refusal."""

from __future__ import annotations

import pytest

from tests.router.router_mesh import running_mesh
from wire.messages import Drill


async def drill(mesh, **body):
    async with mesh.http.post("/popmesh/drill", json=body) as response:
        return response.status, await response.json()


async def test_a_drill_reaches_its_node_and_is_accepted(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        status, answer = await drill(mesh, node="lhr-1", fault="freeze-engine", duration_s=2.5)
        assert (status, answer) == (202, {"started": True})
        (said,) = mesh.nodes["lhr-1"].drills
        assert said == Drill(said.number, "freeze-engine", "", 2500)
        assert not mesh.nodes["fra-1"].drills
        assert await drill(mesh, node="lhr-1", fault="kill-agent", model="fake-model") == (
            202,
            {"started": True},
        )
        assert mesh.nodes["lhr-1"].drills[-1].model == "fake-model"


async def test_a_node_that_was_not_started_for_drills_refuses(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        mesh.nodes["lhr-1"].drill_error = "this node was not started with --drills"
        status, answer = await drill(mesh, node="lhr-1", fault="kill-agent")
        assert status == 409
        assert answer["error"]["code"] == "drill_refused"
        assert "--drills" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"node": "nowhere", "fault": "kill-agent"}, 404, "fra-1"),
        ({"node": "lhr-1", "fault": "explode"}, 400, "kill-engine"),
        ({"node": "lhr-1", "fault": "freeze-agent", "duration_s": 61}, 400, "duration_s"),
        ({"node": "lhr-1", "fault": "freeze-agent", "duration_s": 0}, 400, "duration_s"),
        ({"node": "lhr-1"}, 400, "fault"),
        ({"node": "lhr-1", "fault": "kill-agent", "when": "now"}, 400, "when"),
    ],
)
async def test_bad_drills_are_refused_by_name(monkeypatch, body, status, words):
    async with running_mesh(monkeypatch) as mesh:
        got, answer = await drill(mesh, **body)
        assert got == status
        assert words in answer["error"]["message"]
        assert not any(node.drills for node in mesh.nodes.values())


async def test_a_node_of_version_1_is_not_asked(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        node = mesh.nodes["lhr-1"]
        node.max_version = 1
        node.connections[0].drop()
        await node.wait_until(lambda: not node.connections)
        await mesh.wait_ready()
        status, answer = await drill(mesh, node="lhr-1", fault="kill-agent")
        assert status == 502
        assert answer["error"]["code"] == "version_mismatch"


async def test_a_node_that_dies_before_it_answers_is_reported(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        node = mesh.nodes["lhr-1"]
        connection = node.connections[0]
        monkeypatch.setattr(type(connection), "say", lambda self, message: self.drop())
        status, answer = await drill(mesh, node="lhr-1", fault="kill-agent")
        assert (status, answer["error"]["code"]) == (502, "link_lost")
        assert answer["error"]["message"] == "lhr-1 did not answer: the node closed the link"
