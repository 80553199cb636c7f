"""File systems of a test's own, for disks that are full or may only be read."""

from __future__ import annotations

import subprocess
from pathlib import Path

DENIALS = ("permission denied", "must be superuser")


def mount(disk: Path, room: str) -> bool:
    """Mount an empty file system with ``room`` at ``disk``; False where this user may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        assert any(denial in done.stderr.lower() for denial in DENIALS), done.stderr
    return done.returncode == 0


def remount(disk: Path, options: str) -> None:
    """Change how a mounted ``disk`` may be used, as in ``ro``."""
    command = ["mount", "-o", f"remount,{options}", str(disk)]
    subprocess.run(command, check=True, timeout=10)


def unmount(disk: Path) -> None:
    """Take it away, even while files on it are open."""
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=20)
