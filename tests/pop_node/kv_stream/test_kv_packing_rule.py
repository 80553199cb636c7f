"""When packing pays: links and codecs of any speed, values that pack and values that do not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pop_node.kv_stream.packing import (
    FIRST_PACKED_BYTES_PER_S,
    HEADROOM,
    MAX_SHARE,
    RETRY_PIECES,
    PackingRule,
)
from pop_node.kv_stream.rates import MEMORY_S, MIN_SAMPLE_BYTES, RateMeter

PIECE = 256 * 1024
SLOW = 12.5e6  # 100 Mbit/s
T = bytes(16)


def run(rule: PackingRule, link: float, codec: float, share: float, pieces: int) -> list[bool]:
    """What the rule says of each piece, on a link of ``link`` wire bytes a second, whose rate is
    measured over a dozen pieces."""
    said, measured = [], link
    for _ in range(pieces):
        packs = rule.wants(measured)
        said.append(packs)
        if packs:
            rule.packed(PIECE, round(PIECE * share), PIECE / codec)
        wire_share = min(share, 1.0) if packs else 1.0
        rule.sent(PIECE, round(PIECE * wire_share))
        measured += 0.1 * (link / wire_share - measured)
    return said


def test_slow_link_packs_and_goes_on() -> None:
    assert all(run(PackingRule(), SLOW, 1.7e9, 0.7, 300))


def test_what_packing_gains_does_not_make_a_link_too_fast_for_it() -> None:
    link = 0.9 * FIRST_PACKED_BYTES_PER_S / HEADROOM
    assert all(run(PackingRule(), link, 1.2 * FIRST_PACKED_BYTES_PER_S, 0.5, 300))


def test_unknown_link_does_not_pack() -> None:
    assert not PackingRule().wants(0.0)


def test_fast_link_never_tries() -> None:
    link = FIRST_PACKED_BYTES_PER_S / HEADROOM * 1.01
    assert not any(run(PackingRule(), link, 1.7e9, 0.7, 10 * RETRY_PIECES))


def test_values_that_do_not_pack_are_tried_now_and_then() -> None:
    said = run(PackingRule(), SLOW, 1.7e9, 1.001, 10 * RETRY_PIECES)
    assert said[0]
    assert sum(said) == 10
    rule = PackingRule()
    run(rule, SLOW, 1.7e9, 1.0, 10)
    later = run(rule, SLOW, 1.7e9, 0.7, 4 * RETRY_PIECES)
    assert all(later[-RETRY_PIECES:]), "it goes on once they do"


def test_slow_codec_is_tried_now_and_then() -> None:
    rule = PackingRule()
    said = run(rule, SLOW, 5e6, 0.7, 20 * RETRY_PIECES)
    assert 20 <= sum(said) <= 40
    later = run(rule, SLOW, 1.7e9, 0.7, 4 * RETRY_PIECES)
    assert all(later[-RETRY_PIECES:])


@given(
    st.floats(1e4, 1e11),
    st.floats(1e6, 1e11),
    st.floats(0.1, 1.1),
)
def test_packing_lasts_just_where_it_pays(link: float, codec: float, share: float) -> None:
    rule = PackingRule()
    run(rule, link, codec, share, 40)
    said = run(rule, link, codec, share, 2 * RETRY_PIECES)
    if all(said):
        assert codec > link * 0.99
        assert share <= MAX_SHARE * 1.01
    elif link * HEADROOM < min(codec, FIRST_PACKED_BYTES_PER_S) * 0.9 and share < MAX_SHARE * 0.99:
        raise AssertionError("packing would pay")
    else:
        assert sum(said) <= 4


def test_meter_knows_a_limit_only_where_the_link_set_the_pace() -> None:
    meter = RateMeter()
    meter.sent(T, 4 * MIN_SAMPLE_BYTES)
    meter.acked(T, 1, 0.0)
    meter.acked(T, 2 * MIN_SAMPLE_BYTES, 0.5)
    assert meter.limit(0.5) == 0.0, "the prefill may be what is slow"
    meter.waited()
    assert meter.limit(0.5) == (2 * MIN_SAMPLE_BYTES - 1) / 0.5
    meter.acked(T, 4 * MIN_SAMPLE_BYTES, 1.0)
    assert meter.limit(1.0) == meter.current(1.0) > 0
    assert meter.limit(1.1 + MEMORY_S) == 0.0
