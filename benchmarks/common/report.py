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


def subject(doc: str | None) -> str:
    """The first line of a benchmark's docstring."""
    return (doc or "").splitlines()[0]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes the benchmark by the first line of its docstring ``doc``."""
    return argparse.ArgumentParser(description=subject(doc))


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
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def save(report: dict[str, Any], out: Path) -> None:
    """Write a report as JSON, its folder included."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
