"""Guessing changes the number of steps of an engine and no bit of its answers.

Each answer is computed without guesses and with them, of texts that are copied, that repeat
themselves and that do neither, and compared logit by logit. The guesses are those of the engine, or
made to be wrong or right at random, so that every kind of draft is rolled back.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from recording import Answer, RecordingEngine, assert_same
from tiny_llama import VOCABULARY, write_tiny_llama
from tokenizers import Tokenizer

from pop_node.engine.scheduling.drafter import Drafter
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.models.llama import Llama
from pop_node.models.registry import load_backend, load_model

OUTPUT_TOKENS = 40
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.95, "seed": 1234},
}
TEXTS = {
    "copy": (
        "<|im_start|>user\nRepeat this exactly: The clockmaker from the north asked for the road "
        "to the lighthouse, and nobody answered.<|im_end|>\n<|im_start|>assistant\nThe clockmaker "
        "from the"
    ),
    "code": (
        "def first(items):\n    if not items:\n        return None\n    return items[0]\n\n\n"
        "def last(items):\n    if not items:\n        return None\n    return items[-1]\n\n\n"
        "def middle(items):\n    if not"
    ),
    "new": "Seven green umbrellas drifted over the harbour while",
}


class Oracle(Speculation):
    """Guesses from the true answer, each token altered with a chance of one third."""

    def __init__(self, truth: list[int], seed: int) -> None:
        super().__init__()
        self._truth, self._rng = truth, random.Random(seed)

    def drafts(self, sequences: list[Sequence], budget: int) -> list[tuple[int, ...]]:
        found = []
        for sequence in sequences:
            sequence.drafter = sequence.drafter or Drafter()
            at, left = len(sequence.ids), sequence.max_tokens - sequence.output_tokens - 1
            known = self._truth[at : at + min(budget, left, self._rng.randint(0, 6))]
            altered = [(t + (self._rng.random() < 0.33)) % VOCABULARY for t in known]
            found.append(tuple(altered))
            budget -= len(altered)
        return found


def answered(model: Llama, speculation: Speculation | None, prompts: list[list[int]], **how: Any):
    """Answers to ``prompts`` at once, and the number of steps they took."""
    engine = RecordingEngine(model, speculation=speculation)
    for prompt in prompts:
        engine.add(prompt, max_tokens=OUTPUT_TOKENS, **how)
    engine.run()
    return list(engine.answers.values()), engine.num_steps


def tokens(answer: Answer) -> list[int]:
    return [answer.ids[index] for index in range(OUTPUT_TOKENS)]


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> tuple[Llama, list[list[int]]]:
    model = load_model(smollm2_dir, "bfloat16", load_backend("native", 1))
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return model, [tokenizer.encode(text).ids for text in TEXTS.values()]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_logit_of_a_real_model_is_the_same(
    smollm2: tuple[Llama, list[list[int]]], sampling: str
) -> None:
    model, prompts = smollm2
    how = SAMPLINGS[sampling]
    plain = [answered(model, None, [prompt], **how)[0][0] for prompt in prompts]
    for prompt, expected in zip(prompts, plain, strict=True):
        speculation = Speculation()
        (alone,), steps = answered(model, speculation, [prompt], **how)
        assert len(alone.ids) == OUTPUT_TOKENS
        assert_same(alone, expected)
        assert steps == OUTPUT_TOKENS - speculation.accepted
    speculation = Speculation()
    together, _ = answered(model, speculation, prompts, **how)
    for mine, expected in zip(together, plain, strict=True):
        assert_same(mine, expected)
    if sampling == "greedy":
        assert speculation.accepted > OUTPUT_TOKENS // 2, "nothing was copied"


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_wrong_and_right_guesses_of_any_length(tmp_path: Path, backend: Any, sampling: str) -> None:
    ops = load_backend(backend, 1, batch_invariant=True)
    model = load_model(write_tiny_llama(tmp_path), "bfloat16", ops)
    rng = random.Random(5)
    prompt = [rng.randrange(VOCABULARY) for _ in range(37)]
    how = SAMPLINGS[sampling]
    (expected,), _ = answered(model, None, [prompt], **how)
    for seed in range(6):
        speculation = Oracle(prompt + tokens(expected), seed)
        (mine,), steps = answered(model, speculation, [prompt], **how)
        assert tokens(mine) == tokens(expected)
        assert_same(mine, expected)
        assert 0 < speculation.accepted < speculation.drafted
        assert steps == OUTPUT_TOKENS - speculation.accepted
