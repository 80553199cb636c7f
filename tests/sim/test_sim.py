"""The whole mesh under a virtual clock: ten thousand seeds, and runs that repeat themselves."""

import os
import subprocess
import sys

import pytest

from tests.sim.runner import ROOT, run_many
from tests.sim.world import play

SCHEDULES = 10_000
COMMAND = (sys.executable, "-m", "tests.sim")
FIRST_SEED = 1_000_000


@pytest.mark.timeout(900)  # a minute on two idle cores
def test_whatever_breaks_every_request_ends_once_with_the_right_text_and_everything_comes_to_rest():
    failures = run_many(FIRST_SEED, SCHEDULES, jobs=2)
    assert not failures, "\n".join(failures[:20])


def test_a_seed_replays_exactly_also_in_another_process():
    seeds = [3, 57, 211]
    here = [play(seed, hashed=True).crc for seed in seeds]
    assert here == [play(seed, hashed=True).crc for seed in seeds]
    assert len(set(here)) == len(seeds)
    for seed, crc in zip(seeds, here, strict=True):
        traced = subprocess.run(
            [*COMMAND, "--seed", str(seed), "--trace"],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"crc {crc:08x}" in traced.stdout


def test_a_failing_seed_says_how_to_replay_it():
    found = subprocess.run(
        [
            *COMMAND,
            "--seed",
            "0",
            "--schedules",
            "30",
            "--mutation",
            "a_block_is_lost",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert "replay: python -m tests.sim --seed " in found.stdout
    assert "--trace --mutation a_block_is_lost" in found.stdout
