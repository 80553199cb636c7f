"""What nodes tell of their models, as operators see it."""

from __future__ import annotations

from router.metrics import render
from router.model_metrics import model_metrics
from router.routing.view_builder import ViewBuilder
from tests.fakes.fake_node import FakeMesh, FakeNode, idle_engine
from tests.router.router_mesh import MODEL
from tests.router.views import FOUR
from wire.messages import Load


def rendered(**told: int) -> list[str]:
    """The metrics of a mesh in which one node tells this of its engine."""
    builder = ViewBuilder(FOUR, "fra")
    builder.set_directory({"fra-1": False, "iad-1": False})
    fake = FakeNode("fra-1", "fra", FakeMesh(), model=MODEL)
    builder.link_up("fra-1", fake.hello())
    builder.set_load("fra-1", Load([idle_engine(MODEL, **told)], [], False), 0.0)
    return render(model_metrics(builder)).splitlines()


def test_what_an_engine_guessed_is_counted_by_node_and_model() -> None:
    text = rendered(drafted_tokens=700, accepted_tokens=420)
    for name, count in (("drafted", 700), ("accepted", 420)):
        metric = f"popmesh_model_{name}_tokens_total"
        assert f"# TYPE {metric} counter" in text
        samples = [line for line in text if line.startswith(metric)]
        assert samples == [f'{metric}{{node="fra-1",model="{MODEL}"}} {count}']


def test_kv_is_counted_before_and_after_packing() -> None:
    text = rendered(kv_sent_bytes=3000, kv_wire_bytes=2010, kv_packed_pieces=5, kv_raw_pieces=1)
    at = f'node="fra-1",model="{MODEL}"'
    assert f"popmesh_model_kv_sent_bytes_total{{{at}}} 3000" in text
    assert f"popmesh_model_kv_wire_bytes_total{{{at}}} 2010" in text
    assert f'popmesh_model_kv_pieces_total{{{at},as="packed"}} 5' in text
    assert f'popmesh_model_kv_pieces_total{{{at},as="raw"}} 1' in text
