"""Whatever is chosen for a model's matrices, its tokens and logits are the same."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
from recording import RecordingEngine, assert_same
from tiny_llama import write_tiny_llama

from kernels.ops import native_ops
from kernels.resident import ResidentMatrix
from pop_node.engine.config import EngineConfig
from pop_node.engine.weight_form import settle
from pop_node.models.llama import Llama
from pop_node.models.registry import load_model
from pop_node.models.tuning import measure
from pop_node.store.machine import this_machine
from pop_node.store.manifest import TABLES_FILE
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from pop_node.store.weight_choice import Shape, ShapeTimings, Timing
from pop_node.store.weight_tables import WeightTable

PROMPTS = (list(range(3)), list(range(40)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    folder = tmp_path_factory.mktemp("choices")
    store = Store(folder / "store")
    source = folder / "source"
    source.mkdir()
    (write_tiny_llama(source) / "tokenizer.json").write_text("{}")
    store.add(str(source), "tiny", "bfloat16", unwatched)
    return store, store.get("tiny").path


def run(model: Llama) -> RecordingEngine:
    engine = RecordingEngine(model)
    for prompt in PROMPTS:
        engine.add(prompt, max_tokens=8)
    engine.run()
    return engine


def shapes(model: Llama) -> dict[Shape, bool]:
    """Every shape, and whether it is resident."""
    weights = model.weights
    found = [weights.embedding, weights.head]
    for layer in weights.layers:
        found += [layer.qkv, layer.output, layer.gate_up, layer.down]
    return {(one.shape[0], one.shape[1]): isinstance(one, ResidentMatrix) for one in found}


def table(threads: int, resident: Iterable[Shape], plain: Iterable[Shape]) -> WeightTable:
    timed = [ShapeTimings(shape, 1, (Timing(1, 2.0, 1.0),)) for shape in resident]
    timed += [ShapeTimings(shape, 1, (Timing(1, 1.0, 2.0),)) for shape in plain]
    return WeightTable(this_machine(threads), tuple(timed))


def config(directory: Path, threads: int = 1, **more: str) -> EngineConfig:
    fields = {"dtype": "bfloat16", "backend": "native", "weights": "auto"} | more
    return EngineConfig(directory, threads=threads, kv_tokens=64, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_the_same_under_every_table(bundle: tuple[Store, Path], threads: int) -> None:
    store, path = bundle
    ops = native_ops(threads)
    plain = load_model(path, "bfloat16", ops)
    expected = run(plain)
    packed = shapes(load_model(path, "bfloat16", ops, "resident"))
    every = sorted(shape for shape, is_resident in packed.items() if is_resident)
    assert len(every) >= 4
    for count in range(len(every) + 1):
        for chosen in list(combinations(every, count))[:: 1 if threads == 1 else 4]:
            others = set(every) - set(chosen)
            store.keep_table("tiny", table(threads, chosen, others))
            settled, stays = settle(config(path, threads))
            assert settled.weights != "auto"
            model = load_model(path, "bfloat16", ops, settled.weights, stays)
            for shape, is_resident in shapes(model).items():
                assert is_resident == (shape in chosen)
            for number, answer in run(model).answers.items():
                assert_same(answer, expected.answers[number])


def test_what_nobody_measured_stays_plain(bundle: tuple[Store, Path], tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path)
    (directory / TABLES_FILE).write_text("no bundle's")
    assert settle(config(directory))[0].weights == "plain"
    store, path = bundle
    store.keep_table("tiny", table(1, [(64, 64)], []))
    assert settle(config(path, 1))[0].weights == "resident"
    assert settle(config(path, 3))[0].weights == "plain"


def test_what_cannot_be_resident_stays_plain(bundle: tuple[Store, Path]) -> None:
    store, path = bundle
    store.keep_table("tiny", table(1, [(64, 64)], []))
    assert settle(config(path, backend="reference"))[0].weights == "plain"
    assert settle(config(path, dtype="float32"))[0].weights == "plain"


def test_measuring_times_every_shape_in_every_bucket(bundle: tuple[Store, Path]) -> None:
    _, path = bundle
    ops = native_ops(1)
    model = load_model(path, "bfloat16", ops)
    told: list[tuple[str, int, int]] = []
    found = measure(model, ops, lambda *words: told.append(words))
    known = shapes(load_model(path, "bfloat16", ops, "resident"))
    assert {one.shape for one in found} == {shape for shape, packs in known.items() if packs}
    layers = len(model.weights.layers)
    for one in found:
        assert [timing.rows for timing in one.timings] == [1, 2, 4, 8, 16, 32, 128, 512]
        is_in_layers = one.shape != tuple(model.weights.head.shape)
        assert one.count == (layers if is_in_layers else 2)
        assert all(timing.plain_us > 0 < timing.resident_us for timing in one.timings)
    assert told[0][:2] == ("tune", 0)
    assert told[-1][1] == told[-1][2] == len(told) - 1
