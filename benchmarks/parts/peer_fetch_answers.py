"""Endless answers of one node, one after the other, read as events over HTTP.

    python benchmarks/parts/peer_fetch_answers.py ROUTER_URL MODEL NODE

Reads until its standard input ends, then prints JSON: per answer the moments (monotonic clock, s)
of its events. Whoever started it cuts gaps out of them with ``gaps_ms``.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import aiohttp
import uvloop

from popmesh.sse import SseParser

ANSWER_TOKENS = 256
"""Every condition sees all lengths, since ITL grows with the tokens before: 8 % in so many."""


def gaps_ms(answers: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Gaps between events of one answer, both of them between two moments."""
    gaps = []
    for times in answers:
        inside = [at for at in times if begin <= at <= end]
        gaps += [round((b - a) * 1000, 2) for a, b in pairwise(inside)]
    return gaps


async def read_answers(url: str, model: str, node: str) -> list[list[float]]:
    """Until standard input ends."""
    answers: list[list[float]] = []
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(_read(session, url, model, node, answers))
        await asyncio.to_thread(sys.stdin.read)
        reading.cancel()
    return answers


async def _read(
    session: aiohttp.ClientSession, url: str, model: str, node: str, answers: list[list[float]]
) -> None:
    while True:
        times: list[float] = []
        answers.append(times)
        body = {
            "model": model,
            "prompt": f"Story {len(answers)} of {node}: once upon a time",
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"x-popmesh-route": f"prefill={node},decode={node}"}
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            events = SseParser()
            async for chunk in answer.content.iter_any():
                times += [time.monotonic()] * len(events.feed(chunk))


if __name__ == "__main__":
    gc.disable()  # its pauses are not the mesh's
    print(json.dumps(uvloop.run(read_answers(*sys.argv[1:]))))
