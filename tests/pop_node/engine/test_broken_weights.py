"""Weights that give one request numbers that are not finite harm no other, on any runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_builders import an_add
from safetensors.torch import load_file, save_file
from test_cuda_runner import as_the_device_sees_it
from tiny_llama import VOCABULARY, write_tiny_llama

from pop_node.engine.messages import Declined, Token
from pop_node.engine.running.cuda_runner import CudaRunner
from pop_node.engine.running.runner import Runner
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.validate import Limits
from pop_node.models.registry import load_backend, load_model
from tests.fakes.late_device import HostSampler, LateDevice

BLOCKS, BLOCK_TOKENS, CONTEXT = 12, 16, 192
BAD_TOKEN = 7


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding of one token is not finite."""
    found = write_tiny_llama(tmp_path_factory.mktemp("broken"))
    weights = load_file(found / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_TOKEN, 5] = torch.nan
    save_file(weights, found / "model.safetensors")
    return found


def on_host(model: Any) -> Runner:
    return Runner(model, model._ops, BLOCKS, BLOCK_TOKENS)


def on_device(model: Any) -> CudaRunner:
    sizes = {"token_budget": 512, "max_sequences": 8, "context_tokens": CONTEXT}
    return CudaRunner(model, LateDevice(), HostSampler(), BLOCKS, BLOCK_TOKENS, **sizes)


KINDS = {
    "reference": ("reference", on_host),
    "native": ("native", on_host),
    "device": ("reference", on_device),
}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_row_ends_alone(directory: Path, kind: str, temperature: float) -> None:
    backend, place = KINDS[kind]
    make: Callable[[Any], Any] = place
    ops = load_backend(backend, 1, batch_invariant=True)  # type: ignore[arg-type]
    if kind == "device":
        ops = as_the_device_sees_it(ops)
    model = load_model(directory, "float32", ops)

    def answers(runner: Any, prompts: dict[int, list[int]]) -> dict[int, list[int | str]]:
        """Tokens of each, and the code of whoever was declined."""
        pool = BlockPool(BLOCKS, BLOCK_TOKENS)
        limits = Limits(VOCABULARY, CONTEXT, BLOCK_TOKENS, BLOCKS)
        scheduler = Scheduler(pool, limits, token_budget=512, max_sequences=8, max_waiting=8)
        found: dict[int, list[int | str]] = {seq: [] for seq in prompts}
        for seq, prompt in prompts.items():
            scheduler.handle(
                an_add(seq, prompt_ids=prompt, max_tokens=12, temperature=temperature), 0.0
            )
        while scheduler.num_sequences:
            schedule, _ = scheduler.schedule(0.0)
            ids = runner.launch(schedule, lambda layer: None)()
            for effect in scheduler.complete(schedule, ids, 0.0):
                if isinstance(effect, Token):
                    found[effect.seq].append(effect.id)
                elif isinstance(effect, Declined):
                    found[effect.seq].append(effect.code)
            scheduler.check()
        assert pool.available == BLOCKS
        return found

    generator = torch.Generator().manual_seed(3)
    sound = {
        seq: torch.randint(10, VOCABULARY, (30,), generator=generator).tolist() for seq in (1, 3)
    }
    prompts = {1: sound[1], 2: [*sound[1][:20], BAD_TOKEN, *sound[1][20:]], 3: sound[3]}
    expected = answers(make(model), sound)
    runner = make(model)
    found = answers(runner, prompts)
    assert found == expected | {2: ["internal_error"]}
    # Whoever comes next gets the blocks that the broken one filled.
    for shift in range(3):
        one = {1: sound[1][shift:]}
        assert answers(runner, one) == answers(make(model), one)
