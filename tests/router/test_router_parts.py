"""Small parts of the router: geography, prefixes, view, budgets, metrics, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import metrics
from router.request.admission import Admission, Limits, RetryBudget
from router.request.record import MAX_RECORDS, RequestLog, RequestRecord
from router.routing.geo import ClientLocator
from router.routing.prefix_index import MAX_VALUES_PER_NODE, PrefixIndex, TokenRatio
from router.routing.view_builder import Reservation, ViewBuilder
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode, idle_engine
from tests.router.router_mesh import MODEL, make_topology
from topology.model import TRUSTED_BY_DEFAULT, Position
from wire.errors import ConfigError, OverloadError, RequestError
from wire.messages import CacheDelta, Load

HOME = Position(50.0, 8.6)


def value(i: int) -> bytes:
    return i.to_bytes(16, "big")


# ---- geography ---------------------------------------------------------------------------------


def test_unknown_is_the_routers_place() -> None:
    locator = ClientLocator(HOME, TRUSTED_BY_DEFAULT, None)
    assert locator.place("203.0.113.9", None).position == HOME
    assert locator.place("", None).source == "router"


def test_headers_count_from_trusted_networks_only() -> None:
    locator = ClientLocator(HOME, ("10.0.0.0/8",), None)
    assert locator.place("10.1.2.3", "1,2").position == Position(1, 2)
    assert locator.place("::ffff:10.1.2.3", "1,2").source == "header"
    stranger = locator.place("11.1.2.3", "1,2")
    assert (stranger.position, stranger.ignored_header) == (HOME, True)


@given(st.text(max_size=20))
def test_any_header_is_a_position_or_a_refusal(text: str) -> None:
    locator = ClientLocator(HOME, TRUSTED_BY_DEFAULT, None)
    try:
        found = locator.place("127.0.0.1", text).position
    except RequestError:
        return
    assert -90 <= found.lat <= 90
    assert -180 <= found.lon <= 180


def test_a_database_that_is_none_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "geo.mmdb"
    with pytest.raises(ConfigError, match=r"geo\.mmdb"):
        ClientLocator(HOME, (), path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"geo\.mmdb"):
        ClientLocator(HOME, (), path)


# ---- prefixes ----------------------------------------------------------------------------------


def test_the_longest_held_beginning_counts() -> None:
    index = PrefixIndex()
    index.apply("a", CacheDelta("m", False, [(value(1), 50), (value(2), 110)], []))
    index.apply("b", CacheDelta("m", False, [(value(1), 50)], []))
    chain = [value(1), value(2), value(3)]
    assert index.cached_tokens("m", chain) == {"a": 110, "b": 50}
    index.apply("a", CacheDelta("m", False, [], [value(2)]))
    assert index.cached_tokens("m", chain) == {"a": 50, "b": 50}
    index.apply("a", CacheDelta("m", True, [], []))
    index.forget("b")
    assert index.cached_tokens("m", chain) == {}
    assert index.cached_tokens("other", chain) == {}


def test_digests_are_bounded() -> None:
    index = PrefixIndex()
    over = MAX_VALUES_PER_NODE + 1
    index.apply("a", CacheDelta("m", False, [(value(i), 1) for i in range(over)], []))
    assert index.cached_tokens("m", [value(over - 1)]) == {}
    assert index.cached_tokens("m", [value(over - 2)]) == {"a": 1}


def test_the_token_ratio_is_learned() -> None:
    ratio = TokenRatio()
    assert ratio.estimate("m", 4000) == 1000
    for _ in range(50):
        ratio.learn("m", 4000, 2000)
    ratio.learn("m", 10, 10)  # too short to tell
    assert ratio.estimate("m", 4000) == 2000
    assert ratio.estimate("m", 0) == 1


# ---- the view ----------------------------------------------------------------------------------


def built() -> tuple[ViewBuilder, FakeNode]:
    builder = ViewBuilder(make_topology(), "fra")
    builder.set_directory({"fra-1": False, "iad-1": False})
    node = FakeNode("fra-1", "fra", FakeMesh(), roles=("prefill", "decode"))
    builder.link_up("fra-1", node.hello())
    return builder, node


def test_snapshots_are_shared_until_something_changes() -> None:
    builder, _ = built()
    first = builder.snapshot()
    assert builder.snapshot() is first
    builder.set_rtt("fra-1", 3.0)
    second = builder.snapshot()
    assert second.nodes["fra-1"].rtt_ms == 3.0
    assert first.nodes["fra-1"].rtt_ms != 3.0
    assert second.nodes["iad-1"] is first.nodes["iad-1"]


def test_roles_come_from_the_topology_whatever_a_node_says() -> None:
    builder, _ = built()
    assert builder.snapshot().nodes["fra-1"].roles == {"prefill"}


def test_a_load_replaces_what_was_reserved_before_it() -> None:
    builder, _ = built()
    builder.set_rtt("fra-1", 100.0)
    builder.reserve("fra-1", 1, Reservation(MODEL, 500, 1, at=1.0))
    builder.reserve("fra-1", 2, Reservation(MODEL, 300, 0, at=2.0))
    pending = builder.snapshot().nodes["fra-1"].pending[MODEL]
    assert (pending.prefill_tokens, pending.streams) == (800, 1)
    builder.set_load("fra-1", Load([idle_engine(MODEL)], [], False), now=2.05)
    pending = builder.snapshot().nodes["fra-1"].pending[MODEL]
    assert (pending.prefill_tokens, pending.streams) == (300, 0)
    builder.release("fra-1", 2)
    builder.release("fra-1", 2)
    assert builder.snapshot().nodes["fra-1"].pending == {}


def test_a_lost_link_takes_everything_with_it() -> None:
    builder, _ = built()
    builder.apply_cache("fra-1", CacheDelta(MODEL, False, [(value(1), 9)], []))
    builder.reserve("fra-1", 1, Reservation(MODEL, 500, 1, at=1.0))
    assert builder.snapshot().offered == {MODEL: ("fra-1",)}
    builder.link_down("fra-1")
    view = builder.snapshot()
    assert view.offered == {}
    assert view.nodes["fra-1"].phase == "connecting"
    assert builder.reservations() == 0
    assert builder.prefixes.cached_tokens(MODEL, [value(1)]) == {}


# ---- bounds ------------------------------------------------------------------------------------


def test_admission_counts_in_and_out() -> None:
    admission = Admission(Limits(in_flight=2, per_tenant=1))
    admission.enter("a")
    with pytest.raises(OverloadError) as caught:
        admission.enter("a")
    assert caught.value.code == "too_many_requests"
    admission.enter("b")
    with pytest.raises(OverloadError) as caught:
        admission.enter("c")
    assert caught.value.code == "overloaded"
    admission.leave("a")
    admission.enter("a")
    assert admission.in_flight == 2


def test_retries_are_a_fraction_of_requests() -> None:
    budget = RetryBudget()
    assert sum(budget.withdraw(0.0) for _ in range(500)) == 100
    for _ in range(50):
        budget.deposit()
    assert sum(budget.withdraw(0.0) for _ in range(50)) in (9, 10)


def test_some_retries_are_always_allowed() -> None:
    budget = RetryBudget()
    assert sum(budget.withdraw(5.0) for _ in range(500)) == 100
    assert sum(budget.withdraw(6.0) for _ in range(500)) == 10
    assert sum(budget.withdraw(3600.0) for _ in range(500)) == 100
    for _ in range(10_000):
        budget.deposit()
    assert sum(budget.withdraw(3600.0) for _ in range(2000)) in (999, 1000)


def test_the_request_log_is_bounded() -> None:
    log = RequestLog()
    for i in range(MAX_RECORDS + 1):
        log.add(RequestRecord(str(i), "m", "", "router"))
    assert log.get("0") is None
    assert log.get("1") is not None


# ---- metrics -----------------------------------------------------------------------------------


def test_exposition() -> None:
    counter = metrics.Counter("c_total", "Count.", ("who",))
    counter.add('a"\\\n')
    counter.add("b", amount=2)
    histogram = metrics.Histogram("h_seconds", "Time.", (0.1, 1.0))
    for seconds in (0.1, 0.5, 7.0):
        histogram.observe(seconds)
    gauge = metrics.Gauge("g", "Now.", lambda: {(): 1.5})
    text = metrics.render([counter, histogram, gauge])
    assert 'c_total{who="a\\"\\\\\\n"} 1\n' in text
    assert 'c_total{who="b"} 2\n' in text
    assert 'h_seconds_bucket{le="0.1"} 1\n' in text
    assert 'h_seconds_bucket{le="1"} 2\n' in text
    assert 'h_seconds_bucket{le="+Inf"} 3\n' in text
    assert "h_seconds_count 3\n" in text
    assert "g 1.5\n" in text


def test_series_are_bounded() -> None:
    counter = metrics.Counter("c_total", "Count.", ("who",))
    for i in range(metrics.MAX_SERIES + 5):
        counter.add(str(i))
    assert counter.value("other") == 5


# ---- imports -----------------------------------------------------------------------------------


def test_the_router_never_imports_torch() -> None:
    code = (
        "import sys, router.main, router.app\n"
        "bad = {'torch', 'tokenizers', 'transformers', 'pop_node', 'kernels'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
