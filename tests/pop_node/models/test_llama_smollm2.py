"""The real model in bfloat16 against transformers, on text.

Stated tolerance: measured against transformers in float32, our bfloat16 logits are off by no more
than transformers' own bfloat16 logits are, plus a quarter, in root mean square and at the worst;
our float32 logits by at most 1e-3.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_cases import Sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_node.models.registry import load_backend, load_model

TEXT = Path(__file__).parents[3] / "ARCHITECTURE.md"
NUM_TOKENS = 250


@pytest.fixture(scope="module")
def ids(smollm2_dir: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    return torch.tensor(tokenizer(TEXT.read_text())["input_ids"][:NUM_TOKENS])


def transformers_logits(directory: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits.float()


def our_logits(directory: Path, dtype: str, backend: str, ids: torch.Tensor) -> torch.Tensor:
    """Half the text as one prompt, the rest in chunks of 30 and one token."""
    sequences = Sequences(load_model(directory, dtype, load_backend(backend, 1)))
    number = sequences.new()
    chunks = [ids[:125], *ids[125:245].split(30), *ids[245:].split(1)]
    return torch.cat([sequences.step({number: chunk.tolist()})[number] for chunk in chunks])


@pytest.fixture(scope="module")
def oracle(smollm2_f32_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    return transformers_logits(smollm2_f32_dir, torch.float32, ids)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_bfloat16_is_as_close_as_transformers_own(backend, smollm2_dir, ids, oracle):
    theirs = transformers_logits(smollm2_dir, torch.bfloat16, ids) - oracle
    ours = our_logits(smollm2_dir, "bfloat16", backend, ids) - oracle
    assert ours.square().mean().sqrt() <= 1.25 * theirs.square().mean().sqrt()
    assert ours.abs().max() <= 1.25 * theirs.abs().max()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_float32_agrees(backend, smollm2_f32_dir, ids, oracle):
    ours = our_logits(smollm2_f32_dir, "float32", backend, ids)
    assert (ours - oracle).abs().max() <= 1e-3
    assert torch.equal(ours.argmax(dim=1), oracle.argmax(dim=1))
