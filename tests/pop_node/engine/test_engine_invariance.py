"""In the batch-invariant mode an answer's bits depend on its own tokens alone.

Each test computes one sequence alone, its prompt in one chunk and then token by token, and asks
for the same logits, KV bytes and tokens under another schedule. The continuation after a failure
is one of them: what was decoded elsewhere is prefilled here, with the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Answer, RecordingEngine, assert_same
from tiny_llama import VOCABULARY, write_tiny_llama
from tokenizers import Tokenizer

from pop_node.models.llama import Llama
from pop_node.models.registry import load_backend, load_model

OUTPUT_TOKENS = 24
TEXT = (
    "The harbour was quiet when the ferry came in. Seven passengers stepped ashore, each with a "
    "suitcase and a reason not to look back. The first of them, a clockmaker from the north, asked "
    "for the road to the lighthouse; nobody answered. By nine the square was empty but for a dog "
    "and the man who feeds it. Later that evening the lamps"
)


@dataclass(frozen=True)
class Case:
    """A model on one thread and on two, a prompt, and what is computed alone."""

    model: Llama
    threaded: Llama
    prompt: list[int]
    strangers: list[list[int]]

    def alone(self, **sampling: Any) -> Answer:
        """The answer computed by itself."""
        engine = RecordingEngine(self.model)
        seq = engine.add(self.prompt, max_tokens=OUTPUT_TOKENS, **sampling)
        engine.run()
        return engine.answers[seq]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def load(directory: Path, backend: str, dtype: str) -> tuple[Llama, Llama]:
    """The model on one thread and on two; torch stays on one."""
    models = [
        load_model(directory, dtype, load_backend(backend, n, batch_invariant=True))  # type: ignore[arg-type]
        for n in (2, 1)
    ]
    assert all(model._ops.name.endswith("+batch_invariant") for model in models)
    return models[1], models[0]


def tiny_case(directory: Path, backend: str, dtype: str) -> Case:
    generator = torch.Generator().manual_seed(8)

    def prompt(tokens: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (tokens,), generator=generator).tolist()

    return Case(*load(directory, backend, dtype), prompt(75), [prompt(n) for n in (40, 7, 130)])


KINDS = [
    *(
        f"tiny-{backend}-{dtype}"
        for backend in ("reference", "native")
        for dtype in ("bfloat16", "float32")
    ),
    "smollm2-native-bfloat16",
    "smollm2-native-float32",
]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tiny_dir: Path) -> Case:
    """Every backend and dtype on the tiny model; the real one where it is fast enough."""
    model, backend, dtype = request.param.split("-")
    if model == "tiny":
        return tiny_case(tiny_dir, backend, dtype)
    name = "smollm2_dir" if dtype == "bfloat16" else "smollm2_f32_dir"
    directory = request.getfixturevalue(name)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids
    return Case(*load(directory, backend, dtype), ids, [ids[20:50], ids[3:9], ids[5:] + ids])


GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 1234}


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def sampling(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def expected(case: Case, sampling: dict[str, Any]) -> Answer:
    """What every other schedule must reproduce."""
    answer = case.alone(**sampling)
    assert len(answer.ids) == OUTPUT_TOKENS
    assert answer.kv.shape[1] == len(case.prompt) + OUTPUT_TOKENS - 1
    assert not answer.kv.isnan().any()
    return answer


@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_prefill_in_chunks(
    case: Case, sampling: dict[str, Any], expected: Answer, size: int
) -> None:
    engine = RecordingEngine(case.threaded, budget=size)
    seq = engine.add(case.prompt, max_tokens=OUTPUT_TOKENS, **sampling)
    engine.run()
    assert_same(engine.answers[seq], expected)


def test_in_a_batch_of_prefills_and_decodes(
    case: Case, sampling: dict[str, Any], expected: Answer
) -> None:
    engine = RecordingEngine(case.threaded, budget=48)
    engine.add(case.strangers[0], max_tokens=30)
    engine.step()
    engine.step()
    ours = [engine.add(case.prompt, max_tokens=OUTPUT_TOKENS, salt=b"ours", **sampling)]
    engine.add(case.strangers[1], max_tokens=9, **SEEDED)
    for _ in range(5):
        engine.step()
    engine.add(case.strangers[2], max_tokens=12)
    ours.append(engine.add(case.prompt, max_tokens=OUTPUT_TOKENS, salt=b"other", **sampling))
    engine.run()
    for seq in ours:
        assert_same(engine.answers[seq], expected)


@pytest.mark.parametrize("shared", [16, 65])
def test_after_a_prefix_hit(
    case: Case, sampling: dict[str, Any], expected: Answer, shared: int
) -> None:
    engine = RecordingEngine(case.model, budget=40)
    engine.add(case.prompt[:shared] + case.strangers[1], max_tokens=2)
    engine.run()
    seq = engine.add(case.prompt, max_tokens=OUTPUT_TOKENS, **sampling)
    engine.run()
    assert engine.cached_tokens[seq] == shared // 16 * 16
    assert_same(engine.answers[seq], expected)


@pytest.mark.parametrize("emitted", [1, 6, 23])
@pytest.mark.parametrize("hit", [False, True], ids=["cold", "hit"])
def test_a_continuation_prefills_what_was_decoded(
    case: Case, sampling: dict[str, Any], expected: Answer, emitted: int, *, hit: bool
) -> None:
    """The client has ``emitted`` tokens; the rest comes from another engine, as it would have."""
    engine = RecordingEngine(case.threaded, budget=60)
    if hit:
        engine.add(case.prompt, max_tokens=1)
        engine.run()
    relayed = [expected.ids[i] for i in range(emitted)]
    seq = engine.add(case.prompt, relayed, max_tokens=OUTPUT_TOKENS, **sampling)
    engine.run()
    answer = engine.answers[seq]
    assert sorted(answer.ids) == list(range(emitted, OUTPUT_TOKENS))
    assert (engine.cached_tokens[seq] > 0) == hit
    assert_same(answer, expected)


def test_after_preemption(case: Case, sampling: dict[str, Any], expected: Answer) -> None:
    # Just enough to admit both: when each has grown by a block, the younger must give way.
    older = case.strangers[0]
    blocks = -(-len(older) // 16) + -(-len(case.prompt) // 16) + 1
    engine = RecordingEngine(case.model, budget=200, num_blocks=blocks)
    engine.add(older, max_tokens=40)
    seq = engine.add(case.prompt, max_tokens=OUTPUT_TOKENS, **sampling)
    engine.run()
    assert engine.answers[seq].recomputed
    assert_same(engine.answers[seq], expected)


@pytest.fixture(scope="module", params=["reference", "native"])
def tiny(request: pytest.FixtureRequest, tiny_dir: Path) -> tuple[Case, Answer]:
    case = tiny_case(tiny_dir, request.param, "bfloat16")
    return case, case.alone(**SEEDED)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_schedule(tiny: tuple[Case, Answer], data: st.DataObject) -> None:
    """Random budgets, pools, arrivals, shared beginnings and continuations."""
    case, expected = tiny
    engine = RecordingEngine(
        case.model,
        budget=data.draw(st.integers(4, 90), "budget"),
        num_blocks=data.draw(st.integers(12, 40), "blocks"),
        max_sequences=data.draw(st.integers(1, 4), "seats"),
    )
    ours: list[int] = []
    for _ in range(data.draw(st.integers(1, 5), "sequences")):
        if data.draw(st.booleans(), "ours"):
            emitted = data.draw(st.integers(0, OUTPUT_TOKENS - 1), "emitted")
            relayed = [expected.ids[i] for i in range(emitted)]
            ours.append(engine.add(case.prompt, relayed, max_tokens=OUTPUT_TOKENS, **SEEDED))
        else:
            shared = data.draw(st.integers(0, len(case.prompt)), "shared")
            stranger = data.draw(st.sampled_from(case.strangers[:2]), "stranger")
            engine.add(case.prompt[:shared] + stranger, max_tokens=data.draw(st.integers(1, 9)))
        for _ in range(data.draw(st.integers(0, 8), "steps")):
            engine.step()
    engine.run()
    for seq in ours:
        assert_same(engine.answers[seq], expected)
