"""A model whose weights stay in memory in 12 bits answers like the one in 16, logits and all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recording import Answer, RecordingEngine, assert_same
from tiny_llama import write_tiny_llama

from kernels.native.build import ensure_library
from kernels.ops import NativeUnavailableError, native_ops, reference_ops
from kernels.resident import ResidentMatrix, Weight
from pop_node.models.llama import Llama
from pop_node.models.registry import load_model
from pop_node.store.store import Store
from wire.errors import ConfigError

PROMPTS = ([5] * 9, list(range(100, 140)), list(range(1000, 5000, 25)))
"""Computed together: chunks of a prompt, then decode steps of three."""


def answers(model: Llama, max_tokens: int, num_prompts: int = 3) -> list[Answer]:
    engine = RecordingEngine(model, budget=128)
    numbers = [engine.add(prompt, max_tokens=max_tokens) for prompt in PROMPTS[:num_prompts]]
    engine.run()
    return [engine.answers[number] for number in numbers]


def own_kb() -> int:
    """Kilobytes of memory of its own that this process has."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_real_model_answers_alike(threads: int, model_store: Store) -> None:
    bundle = model_store.get("smollm2-135m").path
    ops = native_ops(threads)
    plain, packed = (load_model(bundle, "bfloat16", ops, form) for form in ("plain", "resident"))
    assert isinstance(packed.weights.embedding, ResidentMatrix)
    assert packed.weights.head is packed.weights.embedding
    for ours, theirs in zip(answers(packed, 12), answers(plain, 12), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_on_other_instruction_sets(isa: str, model_store: Store) -> None:
    bundle = model_store.get("smollm2-135m").path
    ensure_library()  # a compiler has to be there, a processor may lack what it is asked for
    try:
        ops = native_ops(1, isa)
    except NativeUnavailableError as exc:
        pytest.skip(str(exc))
    plain, packed = (load_model(bundle, "bfloat16", ops, form) for form in ("plain", "resident"))
    for ours, theirs in zip(answers(packed, 3, 2), answers(plain, 3, 2), strict=True):
        assert_same(ours, theirs)


def test_what_was_packed_is_given_back(model_store: Store) -> None:
    bundle = model_store.get("smollm2-135m").path
    ops = native_ops(1)
    sizes = {}
    for form in ("resident", "plain"):
        before = own_kb()
        model = load_model(bundle, "bfloat16", ops, form)  # type: ignore[arg-type]
        sizes[form] = own_kb() - before
        assert model.weights.layers
        del model
    assert sizes["resident"] < 0.8 * sizes["plain"]


def test_a_plain_directory_keeps_its_files_as_they_are(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path)
    ops = native_ops(1)
    plain, packed = (load_model(directory, "bfloat16", ops, form) for form in ("plain", "resident"))
    packed_matrices = [isinstance(layer.qkv, ResidentMatrix) for layer in packed.weights.layers]
    assert all(packed_matrices)
    for ours, theirs in zip(answer_tiny(packed), answer_tiny(plain), strict=True):
        assert_same(ours, theirs)


def answer_tiny(model: Llama) -> list[Answer]:
    engine = RecordingEngine(model)
    numbers = [engine.add(list(range(n)), max_tokens=8) for n in (3, 40)]
    engine.run()
    return [engine.answers[number] for number in numbers]


def test_float32_stays_as_it_is(tmp_path: Path) -> None:
    model = load_model(write_tiny_llama(tmp_path), "float32", native_ops(1), "resident")
    assert isinstance(model.weights.embedding, torch.Tensor)


def test_a_backend_without_such_products_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resident.*reference"):
        load_model(write_tiny_llama(tmp_path), "bfloat16", reference_ops(), "resident")


def test_for_a_device_matrices_of_a_directory_are_packed_there_one_by_one(tmp_path: Path) -> None:
    """It is read to the host: the device never has it in 16 bits as a whole. (Bundles:
    ``test_store_cuda_resident``.)"""
    packed: list[torch.Tensor] = []

    def pack(weight: torch.Tensor, allocate: Callable[[int], torch.Tensor]) -> Weight:
        assert allocate(64).device == weight.device
        packed.append(weight)
        return weight

    ops = replace(reference_ops(), device=torch.device("meta"), pack=pack)
    model = load_model(write_tiny_llama(tmp_path), "bfloat16", ops, "resident")
    assert len(packed) == 2 + 4 * model.config.layers
    assert {weight.device.type for weight in packed} == {"meta"}
    assert model.weights.final_norm.device.type == "meta"
