"""Streamed answers as a client sees them, disturbed while they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from popmesh.links.control import heal
from popmesh.links.plan import LinkFault
from tests.e2e.mesh import Mesh

MODEL = "smollm2-135m-f32"

KV_SLOW = LinkFault("ams", "lhr", bandwidth_mbps=4.0)
"""One hundredth of its rate: the KV of 100 tokens (46 kB each in float32) takes nine seconds."""

SMALL_KV_TOKENS = 60
"""Enough KV in float32 for a sample of a link's rate (46 kB a token, 512 KiB a sample)."""

MEASURINGS = 8
"""Hand-overs that show a router a healed link: each sample halves what the slow one left."""

RECOVERIES = {"retarget", "salvage", "recompute", "resume"}

REST_S = 30.0
"""How long a mesh may take to come to rest after a fault: a lease (5 s), a redial and a margin."""


@dataclass
class Answer:
    """What one client read. ``gaps_s``: seconds between its events, the first from the request."""

    request_id: str = ""
    prefill: str = ""
    decode: str = ""
    text: str = ""
    finish: str | None = None
    gaps_s: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        return max(self.gaps_s)


def words(number: int, count: int) -> str:
    """A prompt of about ``count`` tokens that no other number shares a first block with."""
    names = ["river", "mountain", "village", "harbour", "garden", "library", "market", "island"]
    story = " ".join(f"The {names[(number + n) % 8]} was quiet." for n in range(count // 5))
    return f"Story number {number}. {story} Then"


def body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }


async def ask(
    mesh: Mesh,
    prompt: str,
    max_tokens: int = 40,
    route: str | None = None,
    on_event: Callable[[int, Answer], None] | None = None,
) -> Answer:
    """Read a whole streamed answer; ``on_event`` hears of every event, from 1. Raises as openai."""
    answer = Answer()
    headers = {"x-popmesh-route": route} if route else {}
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as ai:
        last = time.monotonic()
        raw = await ai.completions.with_raw_response.create(
            **body(prompt, max_tokens), stream=True, extra_headers=headers
        )
        answer.request_id = raw.headers["x-popmesh-request-id"]
        answer.prefill = raw.headers["x-popmesh-prefill"]
        answer.decode = raw.headers["x-popmesh-decode"]
        async for event in raw.parse():
            now = time.monotonic()
            answer.gaps_s.append(now - last)
            last = now
            for choice in event.choices:
                answer.text += choice.text
                answer.finish = choice.finish_reason or answer.finish
            if on_event is not None:
                on_event(len(answer.gaps_s), answer)
    return answer


def at(count: int, act: Callable[[Answer], None]) -> Callable[[int, Answer], None]:
    """Do ``act`` at the ``count``-th event."""

    def on_event(number: int, answer: Answer) -> None:
        if number == count:
            act(answer)

    return on_event


async def undisturbed(mesh: Mesh, prompt: str, max_tokens: int = 40) -> str:
    """What the model says to it: float32, greedy, in a mesh that is whole again."""
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as ai:
        return (await ai.completions.create(**body(prompt, max_tokens))).choices[0].text


def plan_of(mesh: Mesh) -> Path:
    """The plan file of the mesh's emulated links."""
    return Path(mesh.ready["shaper"]["plan"])


async def whole_text(mesh: Mesh, answer: Answer, prompt: str, max_tokens: int = 40) -> None:
    """The client read what it would have read, and the router says how that came about."""
    heal(plan_of(mesh))
    assert answer.finish == "length"
    assert answer.text == await undisturbed(mesh, prompt, max_tokens)
    record = mesh.request_record(answer.request_id)
    assert record["outcome"] == "length"
    for attempt in record["attempts"][1:]:
        assert attempt["recovery"]["kind"] in RECOVERIES
        assert attempt["recovery"]["price_s"] > 0


def busy(mesh: Mesh) -> list[str]:
    """What is not at rest, in words; empty when everything is."""
    status = mesh.status()
    found = [f"router: {status['in_flight']} requests"] if status["in_flight"] else []
    for node in status["nodes"]:
        for engine in node["engines"]:
            counts = {
                name: engine[name]
                for name in ("running", "waiting", "transfers_in", "transfers_out", "streams")
                if engine[name]
            }
            if counts:
                found.append(f"{node['name']}: {counts}")
            if engine["free_blocks"] + engine["cached_blocks"] != engine["total_blocks"]:
                found.append(f"{node['name']}: blocks held")
    return found


async def wait_whole(mesh: Mesh, nodes: int) -> None:
    """Until every node serves and nothing is held anywhere."""
    left: list[str] = []
    deadline = time.monotonic() + REST_S
    while time.monotonic() < deadline:
        status = mesh.status()
        up = [n for n in status["nodes"] if n["engines"] and all(e["ready"] for e in n["engines"])]
        left = busy(mesh)
        if len(up) == nodes and not left:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not whole again: {left}, {mesh.status()}")


async def wait_planned(mesh: Mesh, prefill: str, decode: str) -> None:
    """Until the router would send a request this way again: a link that was slow is avoided, so
    hand-overs over it have to show that it is not any more."""
    seen: list[tuple[str, str]] = []
    for number in range(MEASURINGS):
        prompt = words(1000 + number, SMALL_KV_TOKENS)
        route = mesh.explain({"model": MODEL, "messages": [{"role": "user", "content": prompt}]})
        seen.append((route["prefill"], route["decode"]))
        if seen[-1] == (prefill, decode):
            return
        await ask(mesh, prompt, 2, route=f"prefill={prefill},decode={decode}")
    raise AssertionError(f"{prefill} -> {decode} is not planned again: {seen}")
