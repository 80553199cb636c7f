"""The request machine under random faults in random order: exactly once, right text, one end."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.routing.avoidance import NodeStart
from tests.router.recovery_legs import ANSWER, wanted
from tests.router.recovery_simulation import Simulation


def simulate(seed: int, answer: int, trouble: float, leave: float) -> Simulation:
    run = Simulation(seed, answer, trouble, leave)
    run.run()
    assert run.done == 1
    assert run.ends == 1 or run.gone
    assert run.machine.record.attempts[-1].outcome != "running"
    return run


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    answer=st.integers(1, len(ANSWER)),
    trouble=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    leave=st.sampled_from([0.0, 0.03]),
)
def test_every_run_ends_once_and_relays_each_index_once(
    seed: int, answer: int, trouble: float, leave: float
) -> None:
    simulate(seed, answer, trouble, leave)


def test_the_simulation_reaches_what_it_is_for() -> None:
    """Otherwise the property above says little."""
    runs = [simulate(seed, 8, 0.5, 0.0) for seed in range(300)]
    assert sum("retarget" in run.kinds for run in runs) > 20
    assert sum(bool(run.kept) for run in runs) > 20
    assert sum("held" in run.kinds for run in runs) > 20
    assert sum("warm" in run.kinds for run in runs) > 5
    outcomes = [attempt.outcome for run in runs for attempt in run.machine.record.attempts]
    assert outcomes.count("not_loaded") > 5
    assert sum(run.text == wanted(8) for run in runs) > 200
    assert NodeStart("a", "1") in {start for run in runs for start in run.machine._setbacks._kept}
