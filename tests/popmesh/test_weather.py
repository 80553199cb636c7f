"""What loss and jitter cost a connection, against the model's own formula."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.links.weather import (
    HANDSHAKE_RTO_S,
    MAX_STALL_S,
    PACKET_BYTES,
    RTO_MARGIN_S,
    Weather,
)

RTT_S = 0.08
TIMEOUT_S = RTT_S + RTO_MARGIN_S


class Dice(random.Random):
    """Fake: says what it is told, then 0.999."""

    def __init__(self, *rolls: float) -> None:
        super().__init__()
        self.rolls = list(rolls)

    def random(self) -> float:
        return self.rolls.pop(0) if self.rolls else 0.999


def test_clear_weather_takes_no_time_and_no_dice():
    clear = Weather(0.0, 0.0, RTT_S)
    dice = Dice(0.0, 0.0)
    assert clear.extra_s(PACKET_BYTES, 0, dice) == 0.0
    assert clear.handshake_s(dice) == 0.0
    assert len(dice.rolls) == 2


@pytest.mark.parametrize(
    ("behind", "rolls", "stall"),
    [
        (10 * PACKET_BYTES, (0.049,), RTT_S),  # lost, three duplicates tell of it
        (10 * PACKET_BYTES, (0.051,), 0.0),
        (2 * PACKET_BYTES, (0.0,), TIMEOUT_S),  # lost at the tail: only a timer tells
        (10 * PACKET_BYTES, (0.0, 0.0), RTT_S + TIMEOUT_S),  # the repair was lost too
        (0, (0.0, 0.0, 0.0), TIMEOUT_S + TIMEOUT_S + 2 * TIMEOUT_S),  # timeouts double
    ],
)
def test_a_lost_packet_is_a_stall(behind, rolls, stall):
    extra = Weather(0.05, 0.0, RTT_S).extra_s(PACKET_BYTES, behind, Dice(*rolls))
    assert extra == pytest.approx(stall)


def test_a_lost_syn_waits_a_second():
    weather = Weather(0.05, 0.0, RTT_S)
    assert weather.handshake_s(Dice(0.95**2 - 0.01)) == 0.0
    assert weather.handshake_s(Dice(0.95**2 + 0.01)) == HANDSHAKE_RTO_S
    assert weather.handshake_s(Dice(0.95**2 + 0.01, 0.01)) == 3 * HANDSHAKE_RTO_S


def test_a_piece_of_many_packets_is_hit_as_often_as_one_of_them():
    weather, rng, pieces, packets = Weather(0.05, 0.0, RTT_S), random.Random(5), 4000, 12
    hit = sum(weather.extra_s(packets * PACKET_BYTES, 10**6, rng) > 0 for _ in range(pieces))
    assert hit / pieces == pytest.approx(1 - 0.95**packets, abs=0.03)


@given(st.floats(0, 0.5), st.floats(0, 1), st.integers(0, 50_000), st.integers(0, 10**9))
def test_every_wait_has_an_end(loss, jitter, nbytes, seed):
    extra = Weather(loss, jitter, RTT_S).extra_s(nbytes, 0, random.Random(seed))
    assert 0.0 <= extra <= jitter + TIMEOUT_S + 3 * MAX_STALL_S
