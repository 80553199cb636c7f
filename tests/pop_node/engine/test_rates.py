"""Rates are told once there is evidence, and then follow what the engine does."""

import pytest

from pop_node.engine.messages import StepDone
from pop_node.engine.rates import MIN_DECODE_STEPS, MIN_PREFILL_TOKENS, StepRates
from pop_node.engine.scheduling.schedule import Load


def test_a_few_noisy_steps_say_nothing():
    rates = StepRates()
    rates.step(32, 0.5)
    rates.step(0, 0.3)
    assert (rates.prefill_tokens_per_s, rates.decode_step_ms) == (0.0, 0.0)


def test_rates_are_told_at_the_stated_evidence():
    rates = StepRates()
    for _ in range(MIN_DECODE_STEPS - 1):
        rates.step(0, 0.010)
    assert rates.decode_step_ms == 0.0
    rates.step(0, 0.010)
    assert rates.decode_step_ms == pytest.approx(10.0)
    rates.step(MIN_PREFILL_TOKENS, 0.1)
    assert rates.prefill_tokens_per_s == pytest.approx(MIN_PREFILL_TOKENS / 0.1)


def test_tiny_chunks_are_no_evidence_of_the_prefill_rate():
    rates = StepRates()
    for _ in range(100):
        rates.step(4, 0.01)
    assert rates.prefill_tokens_per_s == 0.0


def test_a_slow_start_is_forgotten():
    rates = StepRates()
    rates.step(0, 5.0)
    for _ in range(60):
        rates.step(0, 0.010)
    assert rates.decode_step_ms == pytest.approx(10.0, rel=0.01)


def test_the_agent_is_told_tokens_load_and_rates():
    rates = StepRates()
    for _ in range(MIN_DECODE_STEPS):
        rates.step(0, 0.010)
    rates.step(MIN_PREFILL_TOKENS, 0.5)
    load = Load(
        queued_prefill_tokens=1,
        running=2,
        waiting=3,
        free_blocks=4,
        cached_blocks=5,
        pinned=6,
        drafted=7,
        accepted=8,
    )
    assert rates.step_done([(1, 0, 5, "")], load) == StepDone(
        tokens=[(1, 0, 5, "")],
        queued_prefill_tokens=1,
        running=2,
        waiting=3,
        free_blocks=4,
        cached_blocks=5,
        prefill_tokens_per_s=pytest.approx(MIN_PREFILL_TOKENS / 0.5),
        decode_step_ms=pytest.approx(10.0),
        pinned=6,
        drafted=7,
        accepted=8,
    )
