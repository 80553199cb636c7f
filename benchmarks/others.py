"""What else runs while something is measured: processor time that is not the benchmark's.

On a machine that others use, a sample says by this how much it is worth.
"""

from __future__ import annotations

import os
import resource

import psutil

KTHREADD = 2
"""The kernel's own threads are its children; they work for the benchmark as well."""


def others_cpu_s() -> float:
    """CPU seconds since the machine started of all processes but this one, those that it started
    and the kernel's; to be looked at as a difference. Clocks tick 100 times a second."""
    whole = psutil.cpu_times()
    kernel = sum(_cpu_s(process) for process in _children(KTHREADD))
    ours = sum(_cpu_s(process) for process in psutil.Process().children(recursive=True))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        ours += used.ru_utime + used.ru_stime
    return float(whole.user + whole.nice + whole.system) - kernel - ours


def _children(parent: int) -> list[psutil.Process]:
    return psutil.Process(parent).children() if os.path.exists(f"/proc/{parent}") else []


def _cpu_s(process: psutil.Process) -> float:
    """With the children that it has waited for; 0 if it is gone."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.NoSuchProcess:
        return 0.0
