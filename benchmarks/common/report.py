"""What each benchmark's report says of where it ran, and how it is written.

Used by the scripts above it (``python benchmarks/NAME.py`` puts their folder on the path). It knows
nothing of what they measure; standard library only, because some of them start bare processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TELLING = ("sse4_1", "avx2", "avx512f", "avx512vl", "avx512_bf16", "amx_bf16")
"""What the native kernels, and those of peers, choose by; in the words of /proc/cpuinfo."""


def subject(doc: str | None) -> str:
    """The first line of a benchmark's docstring."""
    return (doc or "").splitlines()[0]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's docstring ``doc``: what it compares and needs."""
    whole = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=(doc or "").strip(), formatter_class=whole)


def commit(checkout: Path = ROOT) -> str:
    """The commit that ``checkout`` is at; empty outside git, and where there is none."""
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def facts(doc: str | None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What was measured, at which commit, when and on what; versions of the named ``packages``."""
    return {
        "what": subject(doc),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": _processor(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _processor() -> str:
    """Its name, as far as it tells one."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Those of ``TELLING`` that the processor has."""
    flags = _cpuinfo().get("flags", "").split()
    return [name for name in TELLING if name in flags]


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere. Source: proc_cpuinfo(5)."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    rows = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}


def save(report: dict[str, Any], out: Path) -> None:
    """Write a report as JSON, its folder included."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
