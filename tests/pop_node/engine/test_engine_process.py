"""Real engine processes with a tiny Llama, driven through the client like an agent does."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_builders import an_add
from tiny_llama import CONTEXT_TOKENS, VOCABULARY, write_tiny_llama

from pop_node.engine import messages as m
from pop_node.engine.boundary import encode
from pop_node.engine.client import EngineClient
from pop_node.engine.config import EngineConfig
from pop_node.kv_stream.staging import Staging, StagingLayout

LAYOUT = StagingLayout(slot_bytes=4096, export_slots=4, import_slots=4)
WAIT_S = 60.0
BLOCKS, BLOCK_TOKENS = 40, 16


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(model_dir: Path) -> EngineConfig:
    return EngineConfig(
        model_dir=model_dir,
        dtype="float32",
        backend="reference",
        threads=1,
        kv_tokens=BLOCKS * BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        token_budget=64,
    )


class Engine:
    """A client that keeps what the engine said and lets a test wait for more."""

    def __init__(self, detection_s: float = 30.0) -> None:
        self.client = EngineClient(detection_s)
        self.staging = Staging.create(LAYOUT)
        self.said: list[Any] = []
        self.exit_code: int | None = None
        self._news = asyncio.Event()
        self.on_staged: Callable[[m.Staged], None] | None = None

    async def start(self, config: EngineConfig) -> m.Ready:
        await self.client.start(config, self.staging, self._heard, self._exited)
        return await self.until(lambda: self.last(m.Ready))

    def _heard(self, message: m.EngineMessage) -> None:
        self.said.append(message)
        if isinstance(message, m.Staged) and self.on_staged is not None:
            self.on_staged(message)
        self._news.set()

    def _exited(self, code: int) -> None:
        assert self.exit_code is None, "on_exit was called twice"
        self.exit_code = code
        self._news.set()

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until ``condition()`` is truthy; fails when the engine goes first."""
        async with asyncio.timeout(WAIT_S):
            while not (result := condition()):
                assert self.exit_code is None, f"the engine ended: {self.last(m.Crashed)}"
                self._news.clear()
                await self._news.wait()
        return result

    async def until_exit(self) -> int:
        async with asyncio.timeout(WAIT_S):
            while self.exit_code is None:
                self._news.clear()
                await self._news.wait()
        return self.exit_code

    def last(self, kind: type) -> Any:
        return next((x for x in reversed(self.said) if isinstance(x, kind)), None)

    def about(self, kind: type, seq: int) -> Any:
        return next((x for x in self.said if isinstance(x, kind) and x.seq == seq), None)

    def tokens(self, seq: int) -> list[tuple[int, int, str]]:
        steps = (x for x in self.said if isinstance(x, m.StepDone))
        return [t[1:] for step in steps for t in step.tokens if t[0] == seq]

    async def answer(self, add: m.Add) -> list[tuple[int, int, str]]:
        self.client.send(add)
        await self.until(lambda: self.about(m.Ended, add.seq))
        return self.tokens(add.seq)

    async def at_rest(self) -> m.StepDone:
        """Wait until the load says that nothing is held."""

        def rested() -> m.StepDone | None:
            load = self.last(m.StepDone)
            if load is None or load.running or load.waiting or load.pinned:
                return None
            return load if load.free_blocks + load.cached_blocks == BLOCKS else None

        load: m.StepDone = await self.until(rested)
        return load


@asynccontextmanager
async def running(config: EngineConfig, detection_s: float = 30.0) -> AsyncIterator[Engine]:
    engine = Engine(detection_s)
    try:
        await engine.start(config)
        yield engine
    finally:
        await engine.client.stop(timeout_s=5.0)
        engine.staging.close()


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


async def test_life_of_an_engine(config: EngineConfig) -> None:
    """Start, answers alone and together, prefix hits, refusals, cancel, and a clean end."""
    engine = Engine()
    ready = await engine.start(config)
    assert ready.pid == engine.client.pid
    assert (ready.total_blocks, ready.block_tokens) == (BLOCKS, BLOCK_TOKENS)
    assert ready.context_tokens == CONTEXT_TOKENS
    assert ready.phases_ms.keys() == {"import", "load", "warm"}
    spans = {name: (began, ended) for name, began, ended, _ in ready.phases}
    in_a_row = ["process_start", "imports", "standby", "kernels", "load", "warm"]
    assert spans.keys() == {*in_a_row, "setup", "first_token"}
    assert spans["process_start"][1] <= spans["setup"][0]  # perhaps beside the imports
    assert spans["setup"][1] <= spans["kernels"][0]
    moments = [moment for name in in_a_row for moment in spans[name]]
    assert moments == sorted(moments)
    assert spans["warm"][0] < spans["first_token"][1] <= spans["warm"][1]

    prompts = [prompt_of(length, length) for length in (1, 16, 33, 150)]
    alone = [
        await engine.answer(an_add(i, prompt_ids=p, max_tokens=12, salt=b"alone"))
        for i, p in enumerate(prompts, 1)
    ]
    assert [len(a) for a in alone] == [12] * 4
    assert [t[0] for t in alone[0]] == list(range(12))
    assert alone[0][-1][2] == "length"

    # In a batch, nothing cached.
    for i, p in enumerate(prompts, 11):
        engine.client.send(an_add(i, prompt_ids=p, max_tokens=12, salt=b"together"))
    for i in range(11, 15):
        await engine.until(lambda seq=i: engine.about(m.Ended, seq))
    assert [engine.tokens(i) for i in range(11, 15)] == alone

    # With the beginning cached: the last token is computed, the rest is not.
    assert await engine.answer(an_add(21, prompt_ids=prompts[3], max_tokens=12, salt=b"alone"))
    assert engine.about(m.Allocated, 21) == m.Allocated(21, 144)
    assert engine.tokens(21) == alone[3]

    # Continued from forced ids.
    forced = [t[1] for t in alone[2][:5]]
    continued = an_add(22, prompt_ids=prompts[2], forced_ids=forced, max_tokens=12)
    assert await engine.answer(continued) == alone[2][5:]

    # The same seed draws the same text, whatever runs beside it.
    drawn = an_add(23, prompt_ids=prompts[1], temperature=1.0, top_p=0.9, max_tokens=12)
    engine.client.send(an_add(24, prompt_ids=prompts[3], max_tokens=12))
    first = await engine.answer(drawn)
    assert await engine.answer(replace(drawn, seq=25)) == first
    assert first != alone[1]

    # An Add that can never run is declined and disturbs nothing.
    for seq, changes in enumerate(
        ({"prompt_ids": []}, {"prompt_ids": [VOCABULARY]}, {"max_tokens": 10_000}), 31
    ):
        engine.client.send(an_add(seq, **changes))
        await engine.until(lambda seq=seq: engine.about(m.Declined, seq))
        assert engine.about(m.Allocated, seq) is None

    # Dropped in the middle of its prefill: blocks come back.
    engine.client.send(an_add(41, prompt_ids=prompt_of(480, 1), max_tokens=30))
    await engine.until(lambda: engine.about(m.Allocated, 41))
    engine.client.send(m.Drop(41))
    await engine.until(lambda: engine.about(m.Ended, 41))
    assert engine.tokens(41) == []
    await engine.at_rest()

    await engine.client.stop(timeout_s=WAIT_S)
    assert engine.exit_code == 0
    engine.client.send(m.Drop(1))  # nobody listens, nobody minds
    engine.staging.close()


@pytest.mark.parametrize(("backend", "guesses"), [("native", True), ("reference", False)])
async def test_tokens_are_guessed_where_bits_do_not_depend_on_the_batch(
    config: EngineConfig, backend: Any, *, guesses: bool
) -> None:
    async with running(replace(config, backend=backend)) as engine:
        for seq in range(1, 5):
            await engine.answer(an_add(seq, prompt_ids=prompt_of(100, seq), max_tokens=200))
        load = await engine.at_rest()
    assert (load.drafted > 0) == guesses
    steps = [x for x in engine.said if isinstance(x, m.StepDone) and x.tokens]
    assert sum(len(x.tokens) for x in steps) == 800 == len(steps) + load.accepted


async def test_a_hand_over_between_two_engines_continues_the_text(config: EngineConfig) -> None:
    """Prefill in one process, bytes copied slot to slot, decode in another with other blocks."""
    other = replace(config, block_tokens=12, kv_tokens=480)
    async with running(config) as prefill, running(other) as decode:
        prompt = prompt_of(203, 5)
        whole = await prefill.answer(an_add(1, prompt_ids=prompt, max_tokens=20, salt=b"whole"))

        # The decode side holds the first half of the prompt already.
        await decode.answer(an_add(1, prompt_ids=prompt[:100], max_tokens=1))
        transfer = b"x" * 16
        import_slots = list(range(LAYOUT.export_slots, LAYOUT.total_slots))
        backlog: list[m.Staged] = []
        covered = 0

        def pump() -> None:
            while backlog and import_slots:
                staged, slot = backlog.pop(0), import_slots.pop()
                size = staged.nbytes
                decode.staging.slot(slot)[:size] = prefill.staging.slot(staged.slot)[:size]
                prefill.client.send(m.SlotFree(staged.slot))
                decode.client.send(m.Import(transfer, slot, *staged.piece.numbers))

        def on_staged(staged: m.Staged) -> None:
            nonlocal covered
            covered += (staged.layer_hi - staged.layer_lo) * (staged.token_hi - staged.token_lo)
            backlog.append(staged)
            pump()

        heard = decode.client._on_message
        assert heard is not None

        def on_imported(message: m.EngineMessage) -> None:
            heard(message)
            if isinstance(message, m.Imported):
                import_slots.append(message.slot)
                pump()

        decode.client._on_message = on_imported
        prefill.on_staged = on_staged
        shared = {"prompt_ids": prompt, "max_tokens": 20, "transfer": transfer}
        decode.client.send(an_add(2, leg="decode", **shared))
        allocated = await decode.until(lambda: decode.about(m.Allocated, 2))
        assert allocated.cached_tokens == 96
        prefill.client.send(an_add(2, leg="prefill", **shared))
        prefill.client.send(m.StageFrom(transfer, allocated.cached_tokens))
        await prefill.until(lambda: prefill.tokens(2))
        assert prefill.tokens(2) == [(0, whole[0][1], "handoff")]
        wanted = 3 * 2 * (203 - 96)
        await prefill.until(lambda: covered == wanted)
        await decode.until(lambda: not backlog)  # a Commit follows the last Import
        assert prefill.about(m.PrefillDone, 2).compute_ms > 0

        decode.client.send(m.Commit(transfer, [whole[0][1]]))
        await decode.until(lambda: decode.about(m.Ended, 2))
        assert decode.tokens(2) == whole[1:]

        assert prefill.about(m.Ended, 2) is None  # pinned until the transfer is over
        prefill.client.send(m.Release(transfer))
        await prefill.at_rest()
        assert sorted(import_slots) == list(range(LAYOUT.export_slots, LAYOUT.total_slots))


async def test_an_engine_without_its_model_says_why(config: EngineConfig, tmp_path: Path) -> None:
    engine = Engine()
    await engine.client.start(
        replace(config, model_dir=tmp_path), engine.staging, engine._heard, engine._exited
    )
    assert await engine.until_exit() == 1
    assert "config.json" in engine.last(m.Crashed).message
    assert isinstance(engine.said[-1], m.Crashed)
    await engine.client.stop(timeout_s=1.0)
    engine.staging.close()


async def test_an_engine_can_be_stopped_while_it_starts(config: EngineConfig) -> None:
    engine = Engine()
    await engine.client.start(config, engine.staging, engine._heard, engine._exited)
    await engine.client.stop(timeout_s=WAIT_S)
    assert engine.exit_code == 0
    engine.staging.close()


async def test_a_killed_engine_is_noticed(config: EngineConfig) -> None:
    async with running(config) as engine:
        os.kill(engine.client.pid or 0, signal.SIGKILL)
        assert await engine.until_exit() == -signal.SIGKILL


async def test_a_frozen_engine_is_given_up(config: EngineConfig) -> None:
    async with running(config, detection_s=1.0) as engine:
        os.kill(engine.client.pid or 0, signal.SIGSTOP)
        assert await engine.until_exit() == -signal.SIGKILL
        await engine.client.stop(timeout_s=WAIT_S)
        assert not psutil.pid_exists(engine.client.pid or 0)


async def test_an_engine_stuck_in_a_step_is_given_up(
    config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A real one stands still here, and a beat that no test can wait for is said for it."""
    async with running(config, detection_s=5.0) as engine:
        os.kill(engine.client.pid or 0, signal.SIGSTOP)
        engine.client._received(encode(m.Beat(1e6)))
        assert await engine.until_exit() == -signal.SIGKILL
        assert "is stuck" in caplog.text


async def test_an_engine_that_was_given_up_is_over_at_once(config: EngineConfig) -> None:
    """Whether or not the process can be killed: nobody waits for that."""
    async with running(config) as engine:
        engine.client.give_up("is of no use")
        assert engine.exit_code == -signal.SIGKILL
        engine.client.send(m.Drop(1))
        engine.client.give_up("is told twice")
        await engine.client.stop(timeout_s=WAIT_S)
        assert not psutil.pid_exists(engine.client.pid or 0)


async def test_what_ends_the_agent_leaves_its_engines_to_it(config: EngineConfig) -> None:
    """A service manager signals the whole control group; answers that run end first."""
    async with running(config) as engine:
        add = an_add(1, prompt_ids=prompt_of(20, 1), max_tokens=6)
        before = await engine.answer(add)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(engine.client.pid or 0, number)
        again = await engine.answer(replace(add, seq=2))
        assert [token[1] for token in again] == [token[1] for token in before]


async def test_a_stopped_engine_is_killed_in_the_end(config: EngineConfig) -> None:
    """One that does not hear that it shall stop."""
    async with running(config) as engine:
        os.kill(engine.client.pid or 0, signal.SIGSTOP)
        await engine.client.stop(timeout_s=0.1)
        assert engine.exit_code == -signal.SIGKILL


PARENT = """
import asyncio, sys
from pathlib import Path
from pop_node.engine.client import EngineClient
from pop_node.engine.config import EngineConfig
from pop_node.kv_stream.staging import Staging, StagingLayout

async def main():
    client = EngineClient(30.0)
    config = EngineConfig(Path(sys.argv[1]), "float32", "reference", 1, 640)
    staging = Staging.create(StagingLayout(4096, 4, 4))
    said = lambda message: print(client.pid, flush=True)
    await client.start(config, staging, said, lambda code: None)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_an_engine_does_not_outlive_its_agent(model_dir: Path) -> None:
    """Also the client on asyncio's own loop, and Ctrl-C, which is the agent's to decide about."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model_dir)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        engine.send_signal(signal.SIGINT)
        assert engine.is_running()
        parent.kill()
    psutil.wait_procs([engine], timeout=WAIT_S)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
