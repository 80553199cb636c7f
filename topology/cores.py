"""How many threads an engine computes with where the operator does not say.

Native threads wait for each other between operations without leaving their core: more of them than
cores cost more than they bring, so engines that share a machine share its cores.
"""

from __future__ import annotations

import os
from pathlib import Path

from topology.model import Node

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def engine_threads(node: Node, cores: int, engines: int) -> int:
    """Threads of each engine of ``node``, on a machine with ``cores`` that ``engines`` share: what
    the operator says, else an equal share, at least one, and one where a device does the work."""
    if node.threads is not None:
        return node.threads
    return 1 if node.device != "cpu" else max(1, cores // max(1, engines))


def usable_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Cores that this process may use: those that it may run on, and no more than its quota pays.

    ``cgroups`` is where control groups of version 2 are mounted, ``own`` the file that says which
    is this process's; ``cpu.max`` of it and of those above is a quota of microseconds of processor
    time in a period (Linux, Documentation/admin-guide/cgroup-v2.rst). A part of a core is none.
    """
    cores = len(os.sched_getaffinity(0))
    for group in _groups(cgroups, own):
        quota, period = _cpu_max(group)
        if quota is not None:
            cores = min(cores, quota // period)
    return max(1, cores)


def _groups(cgroups: Path, own: Path) -> list[Path]:
    """The control group of this process and those above it; none without version 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if path is None:
        return []
    group = cgroups / path
    return [group, *(above for above in group.parents if above.is_relative_to(cgroups))]


def _cpu_max(group: Path) -> tuple[int | None, int]:
    """Microseconds of processor time (None: as many as it wants) per microseconds."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return (None if quota == "max" else int(quota)), int(period)
    except (OSError, ValueError):  # the root has none, and what is not understood bounds nothing
        return None, 1
