"""One disaggregated request: its n-th delivery fails, for every n, in every way."""

import pytest

from tests.sim.sweep import HARMS, strike


@pytest.mark.parametrize("harm", HARMS)
def test_whichever_delivery_fails_the_request_ends_well_and_nothing_is_left(harm):
    nth = 1
    while True:
        struck, violations = strike(nth, harm)
        assert not violations, f"{nth}: {struck}: {violations}"
        if struck is None:
            break
        nth += 1
    assert nth > (10 if harm == "corrupt" else 80)
