"""The mesh says what the model says: alone, across sites, from cache, in a batch.

The oracle is Hugging Face transformers in float32 on the same weights. It reads prompt + answer
once: where every token is its own greedy choice at its place, this is what it would have said. Else
it says it, token by token, and the mesh's first other token must be within 1e-3 by its logits.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.mesh import Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "smollm2-135m-f32"
OUTPUT_TOKENS = 48
NEAR_TIE = 1e-3
PROMPT_TOKENS = [
    *(10, 12, 17, 23, 31, 40, 48, 63, 64, 65),
    *(90, 111, 128, 150, 200, 257, 350, 512, 777, 1500),
]

BOTH = {"x-popmesh-route": "prefill=ams-1,decode=ams-1"}
OTHER = {"x-popmesh-route": "prefill=ord-1,decode=ord-1"}
SPLIT = {"x-popmesh-route": "prefill=ams-1,decode=ord-1"}
TEXT = Path(__file__).parents[2] / "ARCHITECTURE.md"


@dataclass
class Oracle:
    model: AutoModelForCausalLM
    tokenizer: AutoTokenizer
    known: dict[tuple[int, ...], str] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def worst_gap(self, prompt_ids: list[int], answer_ids: list[int]) -> float:
        """Largest amount by which transformers prefers another token anywhere in the answer."""
        ids = torch.tensor([prompt_ids + answer_ids[:-1]])
        with torch.inference_mode():
            logits = self.model(ids, logits_to_keep=len(answer_ids)).logits[0]
        chosen = logits.gather(1, torch.tensor(answer_ids)[:, None])[:, 0]
        return float((logits.max(dim=1).values - chosen).max())

    def greedy(self, prompt: list[int], said: str) -> str:
        """Its own greedy text, which ``said`` may turn out to be by reading it."""
        if tuple(prompt) not in self.known:
            ids = self.ids(said)
            is_it = len(ids) == OUTPUT_TOKENS and self.worst_gap(prompt, ids) == 0
            self.known[tuple(prompt)] = said if is_it else self._generate(prompt)
        return self.known[tuple(prompt)]

    def _generate(self, prompt: list[int]) -> str:
        ids = torch.tensor([prompt])
        done = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_TOKENS,
            min_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return self.tokenizer.decode(done[0, len(prompt) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def oracle(smollm2_f32_dir: Path) -> Oracle:
    torch.set_num_threads(os.cpu_count() or 1)  # the mesh is idle meanwhile
    model = AutoModelForCausalLM.from_pretrained(smollm2_f32_dir, dtype=torch.float32)
    return Oracle(model.eval(), AutoTokenizer.from_pretrained(smollm2_f32_dir))


@pytest.fixture(scope="module")
def prompts(oracle: Oracle) -> list[list[int]]:
    """20 prompts of exactly 10 to 1,500 tokens, all different from their first token on."""
    rng = random.Random(7)
    ids = oracle.tokenizer(TEXT.read_text() * 2)["input_ids"]
    out = []
    for length in PROMPT_TOKENS:
        start = rng.randrange(len(ids) - length)
        out.append(ids[start : start + length])
    return out


async def answer(client: openai.AsyncOpenAI, prompt: list[int], headers: dict[str, str]) -> str:
    done = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=OUTPUT_TOKENS,
        temperature=0,
        extra_headers=headers,
        extra_body={"ignore_eos": True},
    )
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.completion_tokens == OUTPUT_TOKENS
    return done.choices[0].text


async def answers(
    mesh: Mesh, prompts: list[list[int]], headers: dict[str, str], at_once: int
) -> list[str]:
    gate = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:

        async def one(prompt: list[int]) -> str:
            async with gate:
                return await answer(client, prompt, headers)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def check(oracle: Oracle, prompts: list[list[int]], got: list[str]) -> None:
    """Equal text, or a first difference that is a near-tie under the oracle's own logits."""
    differing = 0
    for prompt, have in zip(prompts, got, strict=True):
        want = oracle.greedy(prompt, have)
        if want == have:
            continue
        differing += 1
        gap = oracle.worst_gap(prompt, oracle.ids(have))
        assert gap <= NEAR_TIE, f"{len(prompt)} tokens: gap {gap}\nwant {want!r}\nhave {have!r}"
    assert differing <= 2, "near-ties are rare; this many differences are an error"


async def test_one_node(exact_mesh, oracle, prompts):
    check(oracle, prompts, await answers(exact_mesh, prompts, OTHER, 2))


async def test_across_sites_then_cached(exact_mesh, oracle, prompts):
    before = exact_mesh.status()
    check(oracle, prompts, await answers(exact_mesh, prompts, SPLIT, 2))
    # (d) the same prompts again: the prefix is already in the prefill node's cache
    check(oracle, prompts, await answers(exact_mesh, prompts, BOTH, 2))
    assert before["mesh"] == exact_mesh.status()["mesh"]


async def test_in_a_batch_of_16(exact_mesh, oracle, prompts):
    chosen = prompts[:16]
    check(oracle, chosen, await answers(exact_mesh, chosen, BOTH, 16))


async def test_the_cache_is_reported(exact_mesh, prompts):
    async with openai.AsyncOpenAI(base_url=f"{exact_mesh.url}/v1", api_key="none") as client:
        await answer(client, prompts[15], BOTH)
        done = await client.completions.create(
            model=MODEL, prompt=prompts[15], max_tokens=2, temperature=0, extra_headers=BOTH
        )
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    cached = done.usage.prompt_tokens_details.cached_tokens
    assert cached == 256  # 257 tokens: 16 whole blocks, the last token is computed


async def test_seeded_sampling_is_the_same_on_one_node_and_across_two(exact_mesh, prompts):
    async with openai.AsyncOpenAI(base_url=f"{exact_mesh.url}/v1", api_key="none") as client:

        async def sample(headers: dict[str, str], seed: int) -> str:
            done = await client.completions.create(
                model=MODEL,
                prompt=prompts[8],
                max_tokens=OUTPUT_TOKENS,
                temperature=1.0,
                seed=seed,
                extra_headers=headers,
            )
            return done.choices[0].text

        alone = [await sample(OTHER, seed) for seed in range(4)]
        across = [await sample(SPLIT, seed) for seed in range(4)]
    assert alone == across
    assert len(set(alone)) == 4


def test_streaming_equals_not_streaming(exact_mesh):
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Write two sentences about the sea. 🌊 Émile"}],
        "max_completion_tokens": 60,
        "temperature": 0.8,
        "seed": 11,
    }
    with openai.OpenAI(base_url=f"{exact_mesh.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**ask, extra_headers=BOTH)
        again = client.chat.completions.create(**ask, extra_headers=BOTH)
        stream = client.chat.completions.create(
            **ask, extra_headers=BOTH, stream=True, stream_options={"include_usage": True}
        )
        events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == again.choices[0].message.content == whole.choices[0].message.content
    assert events[-1].usage == again.usage
    finishes = [e.choices[0].finish_reason for e in events if e.choices]
    assert [f for f in finishes if f] == [again.choices[0].finish_reason]
