"""A whole model on Triton's invariant operations, in the interpreter: bits of an answer alone,
beside others, in chunks, after a prefix hit and continued.

The interpreter's tiles are numpy's, whose matrix product is replaced by one in a fixed order; what
is tested is which tiles, masks and splits a row meets, not the order inside a tensor core.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted_cases import matmul_in_one_order
from test_interpreted_model import CONFIG, interpreted_ops, weights

from pop_node.models.llama import Llama, LlamaConfig
from tests.pop_node.engine.recording import Answer, RecordingEngine, assert_same

OUTPUT_TOKENS = 3
PROMPT = [(7 * at * at + 3) % 97 for at in range(21)]
STRANGERS = [[(5 * at + 1) % 97 for at in range(count)] for count in (9, 18)]


@pytest.fixture
def model(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Llama:
    monkeypatch.setattr(np, "matmul", matmul_in_one_order)
    return Llama(LlamaConfig.from_hf(CONFIG), weights(rng), interpreted_ops(True), "float32")


def whole(engine: RecordingEngine, forced: list[int] | None = None) -> Answer:
    seq = engine.add(PROMPT, forced, max_tokens=OUTPUT_TOKENS)
    engine.run()
    answer = engine.answers[seq]
    assert not answer.kv.isnan().any()
    return answer


def test_an_answer_has_the_same_bits_under_any_schedule(model: Llama) -> None:
    alone = whole(RecordingEngine(model, num_blocks=8))
    assert len(alone.ids) == OUTPUT_TOKENS

    assert_same(whole(RecordingEngine(model, num_blocks=8, budget=5)), alone)

    engine = RecordingEngine(model, num_blocks=8, budget=13)
    for stranger in STRANGERS:
        engine.add(stranger, max_tokens=5)
    engine.step()
    assert_same(whole(engine), alone)

    engine = RecordingEngine(model, num_blocks=8)
    engine.add(PROMPT[:17] + STRANGERS[0], max_tokens=1)
    engine.run()
    assert_same(whole(engine), alone)
    assert engine.cached_tokens[2] == 16

    continued = whole(RecordingEngine(model, num_blocks=8), [alone.ids[0]])
    assert sorted(continued.ids) == [1, 2]
    assert_same(continued, alone)
