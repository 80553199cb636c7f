"""scripts/test.sh: Ctrl-C ends every lane, not only the one in the foreground."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "test.sh"
LANES = 4

PYTEST = f"""#!{sys.executable}
# Stands for pytest: waits until it is interrupted, as far as it listens to that.
import os, signal
with open(os.environ["TOLD"], "w", buffering=1) as told:
    try:
        print("deaf" if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else "ready", file=told)
        signal.pause()
    except KeyboardInterrupt:
        print("interrupted", file=told)
"""


@pytest.fixture
def listening() -> Iterator[None]:
    """What this process starts does not ignore interrupts, even if it does so itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_an_interrupt_ends_all_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "a clone"  # a path with a space will do
    stub, script = clone / ".venv" / "bin" / "pytest", clone / "scripts" / "test.sh"
    for path in (stub, script):
        path.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    stub.write_text(PYTEST)
    stub.chmod(0o755)
    os.mkfifo(tmp_path / "told")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    with subprocess.Popen([script], start_new_session=True) as running:
        try:
            with (tmp_path / "told").open() as told:
                assert [told.readline() for _ in range(LANES)] == ["ready\n"] * LANES
                os.killpg(running.pid, signal.SIGINT)  # as a terminal does
                assert told.read() == "interrupted\n" * LANES
            assert running.wait() == 128 + signal.SIGINT
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
