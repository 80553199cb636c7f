"""Everything that is measured on a GPU, in one command of at most nine minutes.

    python benchmarks/gpu/all.py --out build/gpu          # --dry: tiny, interpreted, without a GPU

Each part is a process of its own with its own time, so one that fails or hangs costs the others
nothing. Writes DIR/NAME.json and DIR/NAME.log per part, and DIR/all.json: how each ended and how
long it took. Ends with 1 if one did not end well.

Needs torch, triton, numpy, safetensors and tokenizers; transformers, where it is installed, is
compared with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import report  # noqa: E402

PARTS = (("engine_checks", 110), ("decode_rates", 220), ("kernel_rates", 130), ("load_rates", 60))
"""Scripts beside this one, what matters most first, and seconds that each may take."""


def run_part(name: str, limit_s: float, out: Path, dry: bool) -> dict[str, Any]:
    """How it went: ``ended`` is its exit code, or says why there is none."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
    command += ["--out", str(out / f"{name}.json"), *(["--dry"] if dry else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    began = time.monotonic()
    with (out / f"{name}.log").open("wb") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=log, env=environment, timeout=limit_s, check=False
            )
            ended: int | str = done.returncode
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit_s} s"
    return {"part": name, "ended": ended, "seconds": time.monotonic() - began}


def main() -> int:
    parser = report.command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted, no GPU")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, limit_s in PARTS:
        parts.append(run_part(name, limit_s, given.out, given.dry))
        tail = (given.out / f"{name}.log").read_text(errors="replace")[-1500:]
        print(f"== {parts[-1]}\n{tail}", flush=True)
        content = report.facts(__doc__, ["torch", "triton", "numpy"]) | {"dry": given.dry}
        report.save(content | {"parts": parts}, given.out / "all.json")
    return 0 if all(part["ended"] == 0 for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
