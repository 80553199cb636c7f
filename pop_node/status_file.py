"""The file that tells a local launcher how a node is doing."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from pop_node.residency.residents import Residents

log = logging.getLogger(__name__)


def write_status(path: Path, state: str, mesh_address: str, residents: Residents) -> None:
    """Replace the file at once. A node that cannot write it serves on: only the launcher reads it.

    ``ready``: routers are served, at ``mesh_address``.
    """
    status = {
        "agent_pid": os.getpid(),
        "state": state,
        "ready": state == "serving" and mesh_address != "",
        "engines": [
            {
                "model": name,
                "rank": 0,
                "pid": residents.standing.engine_pid(name),
                "last_words": residents.hosts[name].last_words if name in residents.hosts else "",
                "problem": state.problem,
                "ready": residents.standing.serves(name),
                "warmth": residents.standing.warmth(name),
                "memory_bytes": state.memory_bytes,
                "last_load_ms": round(state.last_load_s * 1000),
            }
            for name, state in residents.standing.states().items()
        ],
        "addresses": {
            "mesh": mesh_address,
            "kv": {name: host.kv_address for name, host in residents.hosts.items()},
        },
    }
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(json.dumps(status, indent=1))
        temporary.replace(path)
    except OSError as exc:
        log.warning("the status file cannot be written: %s", exc)
