"""Closed-loop streaming load on an OpenAI-compatible server.

    python benchmarks/load.py URL --model NAME --tokenizer DIR/tokenizer.json [--concurrency 4] ...

Prints one JSON report. TTFT: request written -> first event with text. ITL: each gap between such
events. TPOT: (last - first) / (tokens - 1). Tokens are the server's own usage count where it sends
one, else the number of text events. Times in milliseconds. Every prompt is different (seeded
pseudo-random words), so prefix caches do not answer for the engine.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from common.report import command_line
from tokenizers import Tokenizer

WORD_LIST = """
river stone window garden letter winter bridge market silver forest music paper harbour candle
mountain story evening engine corner field orange summer table island kitchen answer early quiet
bright narrow heavy gentle sudden common distant simple proud hollow open walk carry build listen
gather remember follow close turn write speak travel begin under over between against beyond within
across after before toward around
"""
WORDS = WORD_LIST.split()


@dataclass(frozen=True)
class Load:
    """One load: ``requests`` prompts of about ``prompt_tokens``, ``concurrency`` at a time."""

    url: str
    model: str
    tokenizer: str
    concurrency: int = 1
    requests: int = 8
    warmup: int = 1
    prompt_tokens: int = 200
    prompt_stddev: float = 0.0
    output_tokens: int = 64
    seed: int = 0
    timeout_s: float = 540.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """Times in seconds of one finished request."""

    start: float
    end: float
    text_at: list[float]
    tokens: int
    prompt_tokens: int


def make_prompt(rng: random.Random, tokenizer: Tokenizer, num_tokens: int) -> str:
    """A text of ``num_tokens`` tokens, to within one or two."""
    text = " ".join(rng.choice(WORDS) for _ in range(num_tokens + 8))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:num_tokens]
    return str(tokenizer.decode(ids))


def percentiles(values: list[float]) -> dict[str, float] | None:
    """p50, p90, p99, mean and count; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    at = {
        f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3)
        for p in (50, 90, 99)
    }
    return {**at, "mean": round(sum(ordered) / len(ordered), 3), "n": len(ordered)}


async def ask(session: aiohttp.ClientSession, load: Load, prompt: str) -> Answer:
    """One streamed completion; raises ``RuntimeError`` with the server's words on any failure."""
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.extra,
    }
    text_at: list[float] = []
    usage: dict[str, Any] = {}
    start = time.perf_counter()
    async with session.post(load.url.rstrip("/") + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            usage = event.get("usage") or usage
            if any(choice.get("text") for choice in event.get("choices") or ()):
                text_at.append(now)
    if not text_at:
        raise RuntimeError("no text event")
    tokens = usage.get("completion_tokens") or len(text_at)
    return Answer(start, time.perf_counter(), text_at, tokens, usage.get("prompt_tokens") or 0)


async def run(load: Load) -> dict[str, Any]:
    """Run the warm-up, then the load; returns figures with the raw samples."""
    rng, tokenizer = random.Random(load.seed), Tokenizer.from_file(load.tokenizer)

    def prompts(count: int) -> list[str]:
        lengths = (
            max(4, round(rng.gauss(load.prompt_tokens, load.prompt_stddev))) for _ in range(count)
        )
        return [make_prompt(rng, tokenizer, length) for length in lengths]

    done: list[Answer] = []
    errors: list[str] = []

    async def worker(session: aiohttp.ClientSession, queue: list[str]) -> None:
        while queue:
            prompt = queue.pop()
            try:
                done.append(await ask(session, load, prompt))
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as exc:
                errors.append(f"{type(exc).__name__}: {exc}")

    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        warm = prompts(load.warmup)
        await worker(session, warm)
        done.clear()
        if errors:
            raise RuntimeError(f"warm-up failed: {errors[0]}")
        queue = prompts(load.requests)
        begin = time.perf_counter()
        await asyncio.gather(*(worker(session, queue) for _ in range(load.concurrency)))
        wall_s = time.perf_counter() - begin
    tokens = sum(answer.tokens for answer in done)
    return {
        "concurrency": load.concurrency,
        "prompt_tokens_wanted": load.prompt_tokens,
        "output_tokens_wanted": load.output_tokens,
        "seed": load.seed,
        "ok": len(done),
        "errors": errors[:3],
        "num_errors": len(errors),
        "wall_s": round(wall_s, 3),
        "output_tokens": tokens,
        "output_tok_s": round(tokens / wall_s, 2),
        "ttft_ms": percentiles([1e3 * (a.text_at[0] - a.start) for a in done]),
        "tpot_ms": percentiles(
            [1e3 * (a.text_at[-1] - a.text_at[0]) / (a.tokens - 1) for a in done if a.tokens > 1]
        ),
        "itl_ms": percentiles(
            [1e3 * (b - a) for x in done for a, b in zip(x.text_at, x.text_at[1:], strict=False)]
        ),
        "raw": [
            {
                "ttft_ms": round(1e3 * (a.text_at[0] - a.start), 2),
                "total_ms": round(1e3 * (a.end - a.start), 2),
                "tokens": a.tokens,
                "prompt_tokens": a.prompt_tokens,
            }
            for a in done
        ],
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True)
    for name, default in (
        ("concurrency", 1),
        ("requests", 8),
        ("warmup", 1),
        ("prompt-tokens", 200),
        ("output-tokens", 64),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt-stddev", type=float, default=0.0)
    parser.add_argument("--extra", type=json.loads, default={})
    print(json.dumps(asyncio.run(run(Load(**vars(parser.parse_args())))), indent=1))


if __name__ == "__main__":
    main()
