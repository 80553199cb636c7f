"""What nodes tell of the bundles that they give, as operators see it."""

from __future__ import annotations

from router.giving_metrics import giving_metrics
from router.metrics import render
from router.routing.view_builder import ViewBuilder
from tests.fakes.fake_node import FakeMesh, FakeNode
from tests.router.router_mesh import MODEL
from tests.router.views import FOUR
from wire.messages import Giving, Load


def test_every_node_is_shown_with_what_it_last_told() -> None:
    builder = ViewBuilder(FOUR, "fra")
    builder.set_directory({"fra-1": False, "iad-1": False})
    fake = FakeNode("fra-1", "fra", FakeMesh(), model=MODEL)
    builder.link_up("fra-1", fake.hello())
    builder.set_load("fra-1", Load([], [], False, giving=Giving(7_000, 3, 2, 4.5)), 0.0)
    text = render(giving_metrics(builder)).splitlines()
    assert "# TYPE popmesh_node_given_bytes_total counter" in text
    assert "# TYPE popmesh_node_takers gauge" in text
    for line in (
        'popmesh_node_given_bytes_total{node="fra-1"} 7000',
        'popmesh_node_takes_turned_away_total{node="fra-1"} 3',
        'popmesh_node_takers{node="fra-1"} 2',
        'popmesh_node_giving_bytes_per_second{node="fra-1"} 4.5',
        'popmesh_node_given_bytes_total{node="iad-1"} 0',
    ):
        assert line in text
