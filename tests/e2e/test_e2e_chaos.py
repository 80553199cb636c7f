"""Ten kills of agents, engines and routers under 16 streams: no client sees more than a pause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pop_node.store.store import Store
from popmesh.drill.faults import parse_faults
from popmesh.drill.report import Report
from tests.e2e.mesh import Mesh, start_mesh
from tests.e2e.soak import FAULTS, TOPOLOGY, hold_drill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KILLS = 9


@pytest.fixture(scope="module")
def soak_mesh(model_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The mesh of ``make soak``."""
    directory = tmp_path_factory.mktemp("soak")
    mesh = start_mesh(TOPOLOGY, model_store.root, directory, "--drills")
    yield mesh
    mesh.stop()


def test_no_client_sees_a_process_die(soak_mesh: Mesh, tmp_path: Path):
    options = ("--faults", ",".join(FAULTS), "--streams", "16", "--every", "1s", "--exact")
    code = hold_drill(soak_mesh, tmp_path, KILLS, *options)
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report)
    assert report.problems == []
    assert code == 0
    assert report.verdicts.keys() == {"right"}
    done = Counter(fault.fault for fault in report.faults if fault.done)
    assert done == {fault.name: KILLS // len(FAULTS) for fault in parse_faults(",".join(FAULTS))}
    assert any(row.attempts > 1 for row in report.answers), "no fault hit an answer"
    assert report.resumed, "no client lost its router"
    assert sum(report.recoveries.values()) > 0
    assert report.after.busy == []
