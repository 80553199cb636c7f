"""A drill of a mesh that is made for it: real processes, the real model, hundreds of kills.

``make soak`` runs it as ``python -m tests.e2e.soak --kills N --report DIR --store DIR``; its exit
code is the drill's, and the logs of all processes stay in DIR/mesh/logs. ``test_e2e_chaos.py``
holds a short one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.mesh import Mesh, start_mesh

TOPOLOGY = Path(__file__).with_name("soak.yaml")

FAULTS = ("kill-agent", "kill-engine", "kill-router")


def hold_drill(mesh: Mesh, report: Path, kills: int, *options: str) -> int:
    """``popmesh drill chaos`` against ``mesh``; returns its exit code."""
    command = [sys.executable, "-m", "popmesh", "drill", "chaos", "--local", str(mesh.ready_file)]
    command += ["--kills", str(kills), "--report", str(report), *options]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Start the mesh, hold the drill, end the mesh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    told = parser.parse_args()
    directory = told.report / "mesh"
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier run: logs are appended to
    mesh = start_mesh(TOPOLOGY, told.store, directory, "--drills")
    try:
        options = ["--faults", ",".join(FAULTS), "--streams", "16", "--every", "1s"]
        options += ["--max-down", "2", "--exact"]  # two at once: half the time, twice the trouble
        return hold_drill(mesh, told.report, told.kills, *options)
    finally:
        mesh.stop()


if __name__ == "__main__":
    raise SystemExit(main())
