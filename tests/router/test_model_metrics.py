"""What nodes tell of their models, as operators see it."""

from __future__ import annotations

from router.metrics import render
from router.model_metrics import model_metrics
from router.routing.view_builder import ViewBuilder
from tests.fakes.fake_node import FakeMesh, FakeNode, idle_engine
from tests.router.router_mesh import MODEL
from tests.router.views import FOUR
from wire.messages import Load


def test_what_an_engine_guessed_is_counted_by_node_and_model() -> None:
    builder = ViewBuilder(FOUR, "fra")
    builder.set_directory({"fra-1": False, "iad-1": False})
    fake = FakeNode("fra-1", "fra", FakeMesh(), model=MODEL)
    builder.link_up("fra-1", fake.hello())
    guessing = idle_engine(MODEL, drafted_tokens=700, accepted_tokens=420)
    builder.set_load("fra-1", Load([guessing], [], False), 0.0)
    text = render(model_metrics(builder)).splitlines()
    for name, count in (("drafted", 700), ("accepted", 420)):
        metric = f"popmesh_model_{name}_tokens_total"
        assert f"# TYPE {metric} counter" in text
        samples = [line for line in text if line.startswith(metric)]
        assert samples == [f'{metric}{{node="fra-1",model="{MODEL}"}} {count}']
