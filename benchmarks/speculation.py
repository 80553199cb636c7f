"""What guessing tokens ahead brings: tokens per second with and without it, on three kinds of text.

    python benchmarks/speculation.py --store .cache/store-2 \\
        --out benchmarks/results/speculation.json [--rounds 3] \\
        [--batches 1,4,16] [--kinds copying,prose,new]

SmolLM2-135M bf16 on one thread, scheduler and runner without sockets, prompts prefilled before the
clock runs. ``copying``: text and code to be repeated or edited, greedy. ``prose``: stories, lists
and poems, greedy. ``new``: the same at temperature 1, where next to nothing repeats. Both sides
take turns at every measurement and must give the same tokens. ``tok/s`` = tokens / CPU seconds of
the steps that decode; ratios are medians over rounds of one side's over the other's in the same
round.
``accepted`` = guesses that were right / tokens of the answers, ``drafted`` likewise.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from common.report import ROOT, command_line, facts, save

ANSWER_TOKENS = 128
BLOCK_TOKENS, NUM_BLOCKS = 16, 1024
CODE = (ROOT / "pop_node" / "engine" / "scheduling" / "block_pool.py").read_text()[400:1400]
ASKED = {
    "copying": [
        "Repeat this text exactly:\n" + CODE[:600],
        "Print this code again, with `blocks` renamed to `pages`:\n" + CODE,
        "Translate each line into the same line:\n" + CODE[300:800],
        "List every attribute of this class with its comment:\n" + CODE,
    ],
    "prose": [
        "Write a story about a lighthouse keeper.",
        "List twenty facts about the ocean.",
        "Write a poem about rain in Lisbon.",
        "How does a bicycle stay upright?",
    ],
}
ASKED["new"] = ASKED["prose"]
TEMPERATURE = {"copying": 0.0, "prose": 0.0, "new": 1.0}


class Side:
    """The engine of one model, with guesses or without."""

    def __init__(self, model: Any, ops: Any) -> None:
        from pop_node.engine.running.runner import Runner

        self._model = model
        self._runner = Runner(model, ops, NUM_BLOCKS, BLOCK_TOKENS)

    def answer(
        self, prompts: list[list[int]], temperature: float, speculation: Any
    ) -> tuple[dict[str, float], list[list[int]]]:
        """Figures and tokens of all answers, computed at once."""
        from pop_node.engine.messages import Add, Token
        from pop_node.engine.scheduling.block_pool import BlockPool
        from pop_node.engine.scheduling.scheduler import Scheduler
        from pop_node.engine.scheduling.validate import Limits

        pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        context = NUM_BLOCKS * BLOCK_TOKENS
        limits = Limits(self._model.config.vocab_size, context, BLOCK_TOKENS, NUM_BLOCKS)
        scheduler = Scheduler(
            *(pool, limits),
            token_budget=512,
            max_sequences=64,
            max_waiting=64,
            speculation=speculation,
        )
        answers: list[list[int]] = [[] for _ in prompts]
        for seq, ids in enumerate(prompts):
            salt = b"%d" % seq
            add = Add(seq, "both", ids, [], ANSWER_TOKENS, temperature, 1.0, seq, [], salt, b"")
            scheduler.handle(add, 0.0)
        seconds, tokens, steps = 0.0, 0, 0
        while scheduler.num_sequences:
            began = time.process_time()
            schedule, _ = scheduler.schedule(time.monotonic())
            ids = self._runner.run(schedule, lambda layer: None)
            effects = scheduler.complete(schedule, ids, time.monotonic())
            spent = time.process_time() - began
            new = [e for e in effects if isinstance(e, Token)]
            for token in new:
                answers[token.seq].append(token.id)
            if schedule.prefill_tokens == 0:
                seconds, tokens, steps = seconds + spent, tokens + len(new), steps + 1
        found = {"tok_s": tokens / seconds, "steps": steps, "tokens": tokens}
        if speculation is not None:
            found |= {"drafted": speculation.drafted, "accepted": speculation.accepted}
        return found, answers


def rounded(numbers: list[float]) -> float:
    return round(statistics.median(numbers), 3)


def summary(plain: list[dict[str, float]], guessing: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds."""
    ratios = [a["tok_s"] / b["tok_s"] for a, b in zip(guessing, plain, strict=True)]
    return {
        "tok_s_without": rounded([each["tok_s"] for each in plain]),
        "tok_s_with": rounded([each["tok_s"] for each in guessing]),
        "ratio": rounded(ratios),
        "drafted": rounded([each["drafted"] / each["tokens"] for each in guessing]),
        "accepted": rounded([each["accepted"] / each["tokens"] for each in guessing]),
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store that holds the model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--kinds", default=",".join(ASKED))
    args = parser.parse_args()

    from tokenizers import Tokenizer

    from pop_node.engine.scheduling.speculation import Speculation
    from pop_node.models.registry import load_backend, load_model
    from pop_node.store.store import Store

    directory = Store(args.store).get("smollm2-135m").path.resolve()
    ops = load_backend("native", 1)
    side = Side(load_model(directory, "bfloat16", ops), ops)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def prompts(kind: str, batch: int) -> list[list[int]]:
        asked = (ASKED[kind] * batch)[:batch]
        turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        texts = [f"{turn.format(text)}" for text in asked]
        # Copies of a prompt must not be answered alike: each begins somewhere else.
        return [
            tokenizer.encode(text).ids[at // len(ASKED[kind]) :] for at, text in enumerate(texts)
        ]

    report = facts(__doc__, ("torch",)) | {
        "operations": ops.name,
        "threads": 1,
        "rounds": args.rounds,
        "answer_tokens": ANSWER_TOKENS,
    }
    side.answer(prompts("prose", 1), 0.0, None)  # warm-up
    for kind in args.kinds.split(","):
        for batch in map(int, args.batches.split(",")):
            plain, guessing = [], []
            for round_ in range(args.rounds):
                turns = [False, True] if round_ % 2 else [True, False]
                said = {}
                for guesses in turns:
                    speculation = Speculation() if guesses else None
                    found, said[guesses] = side.answer(
                        prompts(kind, batch), TEMPERATURE[kind], speculation
                    )
                    (guessing if guesses else plain).append(found)
                if said[True] != said[False]:
                    raise SystemExit(f"{kind} {batch}: the answers differ")
            key = f"{kind} {batch}"
            report[key] = summary(plain, guessing) | {"without": plain, "with": guessing}
            short = {k: v for k, v in report[key].items() if not isinstance(v, list)}
            print(key, json.dumps(short), flush=True)
            save(report, args.out)


if __name__ == "__main__":
    main()
