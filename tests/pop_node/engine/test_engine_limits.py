"""Top-k, min-p and penalties in an engine: asked for, obeyed, and the same after a failover."""

from __future__ import annotations

from typing import Any

import pytest
from engine_builders import an_add
from recording import Answer, RecordingEngine
from tiny_llama import VOCABULARY, write_tiny_llama

from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.validate import Limits, problem_with_add
from pop_node.models.llama import Llama
from pop_node.models.registry import load_backend, load_model

PROMPT = [5, 9, 13, 9, 5, 101, 7, 9, 13]
OUTPUT_TOKENS = 30
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 1.5},
    {"temperature": 0.9, "top_k": 20, "min_p": 0.02, "seed": 3},
    {
        **{"temperature": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 4},
        **{"repetition_penalty": 1.2, "frequency_penalty": -0.3, "presence_penalty": 0.4},
    },
]


@pytest.fixture(scope="module", params=["native", "reference"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    directory = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    ops = load_backend(request.param, 1, batch_invariant=True)
    return load_model(directory, "float32", ops)


def answered(model: Llama, forced: list[int] | None = None, **asked: Any) -> Answer:
    engine = RecordingEngine(model, speculation=Speculation())
    seq = engine.add(PROMPT, forced, max_tokens=OUTPUT_TOKENS, **asked)
    engine.add([1, 2, 3], max_tokens=9)  # beside one that asks for nothing
    engine.run()
    return engine.answers[seq]


@pytest.mark.parametrize("asked", ASKED, ids=["repetition", "said", "limits", "all"])
@pytest.mark.parametrize("emitted", [1, 11, 29])
def test_who_continues_an_answer_says_the_same(
    model: Llama, asked: dict[str, Any], emitted: int
) -> None:
    """Penalties count the forced ids as what was said, and the prompt only for repetition."""
    whole = answered(model, **asked)
    told = [whole.ids[index] for index in range(emitted)]
    rest = answered(model, told, **asked)
    assert rest.ids == {i: whole.ids[i] for i in range(emitted, OUTPUT_TOKENS)}


def test_a_strong_presence_penalty_says_no_token_twice(model: Llama) -> None:
    ids = list(answered(model, temperature=0.0, presence_penalty=1e6).ids.values())
    assert len(set(ids)) == len(ids) == OUTPUT_TOKENS


def test_a_strong_repetition_penalty_keeps_to_what_is_new(model: Llama) -> None:
    ids = list(answered(model, temperature=0.0, repetition_penalty=1e6).ids.values())
    # A logit that becomes nearly 0 loses while any other is above it.
    assert not set(ids) & set(PROMPT)
    assert len(set(ids)) == len(ids)


def test_top_k_of_one_is_greedy(model: Llama) -> None:
    greedy = answered(model, temperature=0.0)
    assert answered(model, temperature=1.5, top_k=1).ids == greedy.ids
    assert answered(model, temperature=1.5, min_p=1.0).ids == greedy.ids


LIMITS = Limits(VOCABULARY, 1000, 16, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": -1},
        {"top_k": 2**31},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 1e-38},  # logits divided by it have no maximum in float32
        {"repetition_penalty": 1e-300},
        {"presence_penalty": float("nan")},
        {"presence_penalty": 1e300},
        {"frequency_penalty": -1e300},
    ],
)
def test_what_cannot_be_is_declined(changes: dict[str, Any]) -> None:
    problem = problem_with_add(an_add(**changes), LIMITS)
    assert problem is not None
    assert problem[0] == "invalid_request"
