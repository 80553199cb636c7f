"""The Llama forward pass against transformers, and against itself under other batchings."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from llama_cases import LLAMA3_ROPE, Sequences, hf_logits, tiny_transformers_llama

from kernels.ops import Ops, load_ops
from pop_node.models.llama import Llama, LlamaConfig
from wire.errors import ConfigError

IDS = torch.randint(0, 131, (90,), generator=torch.Generator().manual_seed(3)).tolist()
# Largest difference of a logit allowed between two ways to compute it; logits are of size about 1.
ATOL = {"float32": 1e-4, "bfloat16": 0.1}


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Both CPU backends."""
    return load_ops(request.param, 1)


def pair(ops: Ops, dtype: str = "float32", **changes: Any) -> tuple[Llama, Any]:
    """Our model and transformers' on the same weights."""
    theirs = tiny_transformers_llama(**changes)
    if dtype == "bfloat16":
        theirs = theirs.bfloat16()
    config = LlamaConfig.from_hf(theirs.config.to_dict())
    return Llama(config, theirs.state_dict(), ops, dtype), theirs


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=ATOL[dtype], rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    ],
    ids=["tied", "untied", "no-groups", "llama3-rope"],
)
def test_float32_matches_transformers(ops: Ops, changes: dict[str, Any]) -> None:
    model, theirs = pair(ops, **changes)
    sequences = Sequences(model)
    logits = sequences.step({sequences.new(): IDS})[0]
    assert_near(logits, hf_logits(theirs, IDS), "float32")


def test_everything_lies_on_the_device_of_the_operations() -> None:
    ops = dataclasses.replace(load_ops("reference", 1), device=torch.device("meta"))
    model, _ = pair(ops)
    assert {component.device.type for component in model.allocate_cache(3, 4)} == {"meta"}
    weights = model.weights
    tensors = [weights.embedding, weights.head, weights.final_norm, weights.cos_sin]
    for layer in weights.layers:
        tensors += [getattr(layer, field.name) for field in dataclasses.fields(layer)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_cache_that_a_device_has_no_room_for_is_a_mistake_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*size: Any, **how: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, _ = pair(dataclasses.replace(load_ops("reference", 1), device=torch.device("meta")))
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(ConfigError, match=r"KV cache of \d+ bytes.*kv_tokens"):
        model.allocate_cache(3, 4)


def test_bfloat16_is_as_near_to_the_float32_oracle_as_transformers(ops: Ops) -> None:
    model, theirs = pair(ops, "bfloat16")
    sequences = Sequences(model)
    logits = sequences.step({sequences.new(): IDS})[0]
    their_logits = hf_logits(theirs, IDS)
    oracle = hf_logits(theirs.float(), IDS)  # the same weights, already rounded to bfloat16
    our_error = (logits - oracle).square().mean().sqrt()
    their_error = (their_logits - oracle).square().mean().sqrt()
    assert our_error < 1.1 * their_error
    assert our_error < 0.03 * oracle.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_and_decode_steps_equal_the_whole_prefill(ops: Ops, dtype: str) -> None:
    model, _ = pair(ops, dtype)
    sequences = Sequences(model)
    whole, cut = sequences.new(), sequences.new()
    expected = sequences.step({whole: IDS})[whole]
    edges = [0, 1, 3, 20, 21, 61, 88, 89, 90]
    pieces = [sequences.step({cut: IDS[lo:hi]})[cut] for lo, hi in pairwise(edges)]
    assert_near(torch.cat(pieces), expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixed_batch_equals_each_sequence_alone(ops: Ops, dtype: str) -> None:
    model, _ = pair(ops, dtype)
    prompts = [IDS[:30], IDS[30:31], IDS[31:35], IDS[40:81]]
    continuations = [IDS[50:51], IDS[2:3], IDS[5:20], IDS[9:10]]
    together, apart = Sequences(model), Sequences(model)
    numbers = [together.new() for _ in prompts]
    together.step(dict(zip(numbers, prompts, strict=True)))
    batched = together.step(dict(zip(numbers, continuations, strict=True)))
    for number, prompt, continuation in zip(numbers, prompts, continuations, strict=True):
        alone = apart.new()
        apart.step({alone: prompt})
        assert_near(batched[number], apart.step({alone: continuation})[alone], dtype)


def test_only_the_rows_asked_for_get_logits(ops: Ops) -> None:
    model, _ = pair(ops)
    sequences = Sequences(model)
    every = sequences.step({sequences.new(): IDS})[0]
    seen: list[torch.Tensor] = []
    forward = model.forward

    class LastRows:
        """Asks ``forward`` for rows 89 and 3, whatever the caller wants."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, ids: Any, meta: Any, cache: Any, rows: torch.Tensor) -> torch.Tensor:
            seen.append(forward(ids, meta, cache, torch.tensor([89, 3])).clone())
            seen.append(forward(ids, meta, cache, torch.tensor([], dtype=torch.int64)))
            return forward(ids, meta, cache, rows)

    again = Sequences(LastRows())  # type: ignore[arg-type]
    again.step({again.new(): IDS})
    assert_near(seen[0], every[[89, 3]], "float32")
    assert seen[1].shape == (0, 131)


def test_a_layer_is_reported_once_its_kv_is_in_the_cache(ops: Ops) -> None:
    model, _ = pair(ops)
    sequences = Sequences(model)
    written: list[list[bool]] = []

    def on_layer(layer: int) -> None:
        slots = [
            (c[i].flatten(0, 1).isnan().all(dim=(1, 2))).logical_not().sum()
            for c in sequences.cache
            for i in range(3)
        ]
        written.append([int(count) == len(IDS) for count in slots])
        assert layer == len(written) - 1

    sequences.step({sequences.new(): IDS}, on_layer=on_layer)
    assert written == [[layer <= reported for layer in range(3)] * 2 for reported in range(3)]


def test_kv_spec_and_cache_agree(ops: Ops) -> None:
    model, _ = pair(ops, "bfloat16")
    spec = model.kv_spec()
    [group] = spec.groups
    assert (group.kind, group.layers) == ("tokens", (0, 1, 2))
    assert [(c.name, c.dtype, c.shape, c.shard_axis) for c in group.components] == [
        ("k", "bfloat16", (2, 20), 0),
        ("v", "bfloat16", (2, 20), 0),
    ]
    cache = model.allocate_cache(7, 4)
    assert [tuple(c.shape) for c in cache] == [(3, 7, 4, 2, 20)] * 2
    assert sum(c.nbytes for c in cache) == spec.token_bytes * 7 * 4


def test_weights_must_fit_the_configuration(ops: Ops) -> None:
    theirs = tiny_transformers_llama()
    config = LlamaConfig.from_hf(theirs.config.to_dict())
    weights = theirs.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConfigError, match=f"weight {name} is missing"):
        Llama(config, {k: v for k, v in weights.items() if k != name}, ops, "float32")
    with pytest.raises(ConfigError, match=r"has shape \(1, 60\)"):
        Llama(config, {**weights, name: torch.zeros(1, 60)}, ops, "float32")
    with pytest.raises(ConfigError, match=r"not part of a Llama, the first: model\.x\.bias"):
        Llama(config, {**weights, "model.x.bias": torch.zeros(1)}, ops, "float32")
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported"):
        Llama(config, weights, ops, "int8")
