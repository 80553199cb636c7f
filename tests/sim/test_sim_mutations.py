"""The simulation can fail: machines broken on purpose are noticed within a few hundred seeds."""

import pytest

from tests.sim.mutations import MUTATIONS
from tests.sim.world import play

MAX_SEEDS = 400


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_machine_is_noticed(name):
    with MUTATIONS[name]():
        found = next((v for seed in range(MAX_SEEDS) if (v := play(seed).violations)), ())
    assert found
    broken = ("TypeError", "AttributeError", "KeyError")
    assert not any(v.startswith(broken) for v in found), f"the mutation itself is wrong: {found}"
