"""What an engine said last is what routers are told, until it is gone."""

from __future__ import annotations

from dataclasses import fields

import msgspec

from pop_node.engine.messages import StepDone
from pop_node.hosting.model_facts import QUEUED_TOKENS_STEP, ModelFacts

STEP = StepDone(
    tokens=[],
    queued_prefill_tokens=QUEUED_TOKENS_STEP,
    running=2,
    waiting=3,
    free_blocks=4,
    cached_blocks=5,
    prefill_tokens_per_s=6.0,
    decode_step_ms=7.0,
    pinned=8,
    drafted=9,
    accepted=10,
)

TOLD_AS = {"drafted": "drafted_tokens", "accepted": "accepted_tokens"}
NOT_TOLD = {"tokens", "pinned"}


def told(facts: ModelFacts) -> dict[str, object]:
    load = msgspec.structs.asdict(facts.load(None, None, streams=0))
    names = [field.name for field in fields(StepDone) if field.name not in NOT_TOLD]
    return {name: load[TOLD_AS.get(name, name)] for name in names}


def test_the_load_is_what_the_engine_said_last() -> None:
    facts = ModelFacts("model", kv_tokens=1024)
    assert facts.step_done(STEP), "worth telling at once"
    assert told(facts) == {name: getattr(STEP, name) for name in told(facts)}
    assert not facts.step_done(STEP), "told already"
    facts.engine_gone()
    assert not any(told(facts).values())
