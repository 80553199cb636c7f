"""In bfloat16 a stream that moved to another node may differ, but only where it is a near-tie.

A stream goes on elsewhere by prefilling what was decoded before, which sums in another order. The
oracle is transformers: read in float32, every token of the moved stream must be its choice but for
what bfloat16 itself makes uncertain, which is measured as the largest difference between its own
bfloat16 and float32 logits over the same text.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.mesh import Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPTS = [
    "The harbour was quiet that morning, and the fishermen said that",
    "To bake a good loaf of bread you first need to understand why",
    "In the year 1887 a young engineer from Lyon had the idea of",
]
TOKENS = 64
MOVE_AFTER = 12


async def moved(mesh: Mesh, prompt: str) -> str:
    """The text of a greedy answer whose decode engine dies after some tokens."""
    async with openai.AsyncOpenAI(
        base_url=f"{mesh.url}/v1", api_key="none", max_retries=0
    ) as client:
        raw = await client.completions.with_raw_response.create(
            model="smollm2-135m",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        name = raw.headers["x-popmesh-decode"]
        _, engine = mesh.pids(name)
        text, events = "", 0
        async for event in raw.parse():
            text += event.choices[0].text
            events += 1
            if events == MOVE_AFTER:
                os.kill(engine, signal.SIGKILL)
        record = mesh.request_record(raw.headers["x-popmesh-request-id"])
    assert record["outcome"] == "length"
    assert record["usage"]["completion_tokens"] == TOKENS
    assert 0 < record["attempts"][-1]["forced_tokens"] < TOKENS, "the stream did not move"
    await mesh.wait_reborn(name, engine)
    return text


def logits(folder: Path, dtype: torch.dtype, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocabulary] in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


async def test_a_moved_stream_differs_only_at_near_ties(demo_mesh, smollm2_f32_dir):
    texts = [await moved(demo_mesh, prompt) for prompt in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_f32_dir)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        before = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + text)["input_ids"]
        exact = logits(smollm2_f32_dir, torch.float32, ids)[before - 1 : -1]
        rough = logits(smollm2_f32_dir, torch.bfloat16, ids)[before - 1 : -1]
        uncertain = float((exact - rough).abs().max())
        chosen = exact.gather(1, torch.tensor(ids[before:])[:, None])[:, 0]
        gap = float((exact.max(dim=1).values - chosen).max())
        # Each of the two logits that are compared may be off by that much, in either direction.
        assert gap <= 2 * uncertain, f"gap {gap:.3f}, uncertainty {uncertain:.3f}: {text!r}"
        wrong = float((exact.max(dim=1).values - exact.min(dim=1).values).min())
        assert wrong > 4 * uncertain, "any token at all would pass"
