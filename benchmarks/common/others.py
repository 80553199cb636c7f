"""What else runs while something is measured: processor time that is not the benchmark's.

On a machine that others use, a sample says by this how much it is worth.
"""

from __future__ import annotations

import resource

import psutil


def others_cpu_s() -> float:
    """CPU seconds since the machine started of all but this process and those that it started.

    To be looked at as a difference, and only roughly: clocks tick 100 times a second, and what the
    kernel's own threads do for the benchmark (writing to the disk, say) counts too.
    """
    whole = psutil.cpu_times()
    ours = sum(_cpu_s(process) for process in psutil.Process().children(recursive=True))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        ours += used.ru_utime + used.ru_stime
    return float(whole.user + whole.nice + whole.system) - ours


def _cpu_s(process: psutil.Process) -> float:
    """With the children that it has waited for; 0 if it is gone."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.NoSuchProcess:
        return 0.0
