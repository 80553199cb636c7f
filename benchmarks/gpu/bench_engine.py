"""Shared by the engine's GPU benchmarks: an engine without its process, its operations and device.

Needs torch, triton and numpy; with ``dry``, no GPU: kernels run in Triton's interpreter, streams
and graphs are the tests' fakes, and no figure means anything.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from kernels.ops import Ops, reference_ops, triton_ops  # noqa: E402
from kernels.triton.ops import TritonOps  # noqa: E402
from pop_node.engine.messages import Add, Commit, Drop, Token  # noqa: E402
from pop_node.engine.running.cuda_device import CudaDevice  # noqa: E402
from pop_node.engine.running.cuda_runner import CudaRunner  # noqa: E402
from pop_node.engine.running.device_sampler import DeviceSampler  # noqa: E402
from pop_node.engine.scheduling.block_pool import BlockPool  # noqa: E402
from pop_node.engine.scheduling.schedule import Schedule  # noqa: E402
from pop_node.engine.scheduling.scheduler import Scheduler  # noqa: E402
from pop_node.engine.scheduling.validate import Limits  # noqa: E402
from pop_node.models.llama import Llama  # noqa: E402

BLOCK_TOKENS = 16
DRY_MULTIPROCESSORS = 4


def operations(dry: bool, *, batch_invariant: bool = False, overlap: bool = False) -> Ops:
    """Of the GPU; ``dry``: the same kernels, interpreted, one after the other."""
    if not dry:
        return triton_ops(batch_invariant=batch_invariant, overlap=overlap)
    table = TritonOps(DRY_MULTIPROCESSORS, batch_invariant=batch_invariant)
    names = [f.name for f in dataclasses.fields(Ops) if hasattr(table, f.name)]
    own = {name: getattr(table, name) for name in names}
    return dataclasses.replace(reference_ops(), name="interpreted", **own, decoder=None)


def oracle(device: torch.device) -> Ops:
    """The readable operations, on ``device``."""
    return dataclasses.replace(reference_ops(), device=device)


class RecordingSampler(DeviceSampler):
    """Keeps the logits of every token: ``logits[sequence, index]``, [vocab] on the device."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self._rows: list[tuple[int, int]] = []

    def pack(self, schedule: Schedule) -> Any:
        rows = [schedule.rows[index] for index in schedule.sampled]
        self._rows = [(r.sequence.seq, r.end - r.sequence.prompt_tokens) for r in rows]
        return super().pack(schedule)

    def draw(self, logits: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        for row, key in enumerate(self._rows):
            self.logits[key] = logits[row].clone()
        return super().draw(logits, parameters)


class WithoutGraphs:
    """A device that runs a bucket's work again where another replays its graph."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def capture(self, work: Any) -> Any:
        work()
        return work


def a_device(dry: bool, *, prompt: bool = False) -> Any:
    """A GPU; ``dry``: the tests' fake, whose copies come late unless they are to be ``prompt``."""
    if dry:
        from tests.fakes.late_device import LateDevice, PromptDevice

        return PromptDevice() if prompt else LateDevice()
    return CudaDevice(torch.device("cuda", torch.cuda.current_device()))


class Engine:
    """Scheduler and runner, as in an engine's process but without the process."""

    def __init__(
        self,
        model: Llama,
        device: Any,
        tokens: int,
        *,
        seats: int,
        budget: int,
        sampler: DeviceSampler | None = None,
    ) -> None:
        """``tokens``: of the KV cache."""
        blocks = -(-tokens // BLOCK_TOKENS)
        context = model.config.context_tokens
        vocab = model.config.vocab_size
        self.pool = BlockPool(blocks, BLOCK_TOKENS)
        self.scheduler = Scheduler(
            self.pool,
            Limits(vocab, context, BLOCK_TOKENS, blocks),
            token_budget=budget,
            max_sequences=seats,
            max_waiting=4 * seats,
        )
        self.runner = CudaRunner(
            model,
            device,
            sampler or DeviceSampler(),
            blocks,
            BLOCK_TOKENS,
            token_budget=budget,
            max_sequences=seats,
            context_tokens=context,
        )
        self._sequences = 0
        self._under_way: tuple[Schedule, Callable[[], list[int]]] | None = None

    def add(self, prompt: list[int], more: int, *, leg: str = "both", **changes: Any) -> int:
        """Queue a sequence of ``more`` tokens after ``prompt``; its number."""
        self._sequences += 1
        seq = self._sequences
        transfer = b"" if leg == "both" else seq.to_bytes(16, "little")
        values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "seed": seq} | changes
        add = Add(
            seq=seq,
            leg=leg,  # type: ignore[arg-type]
            prompt_ids=prompt,
            forced_ids=[],
            max_tokens=more,
            stop_ids=[],
            salt=b"",
            transfer=transfer,
            **values,
        )
        effects = self.scheduler.handle(add, 0.0)
        assert not effects, effects
        return seq

    def receive(self, prompts: list[list[int]], more: int) -> list[int]:
        """Sequences as if the KV of their prompts had come from another node: it is what the cache
        holds, so that a context costs no prefill."""
        found = [self.add(prompt, more, leg="decode") for prompt in prompts]
        schedule, _ = self.scheduler.schedule(0.0)
        assert not schedule.rows
        for seq in found:
            self.scheduler.handle(Commit(seq.to_bytes(16, "little"), [seq % 7]), 0.0)
        return found

    def step(self) -> list[Token]:
        """Queue a step and wait for the one before, as the engine's loop does."""
        before = self._under_way
        if before is not None:
            self.scheduler.ahead(before[0])
        schedule, _ = self.scheduler.schedule(0.0)
        self._under_way = None
        if schedule.rows:
            self._under_way = schedule, self.runner.launch(schedule, lambda layer: None)
        if before is None:
            return []
        done, collect = before
        effects = self.scheduler.complete(done, collect(), 0.0)
        return [effect for effect in effects if isinstance(effect, Token)]

    def steps(self, count: int) -> None:
        """Compute ``count`` times."""
        for _ in range(count):
            self.step()

    def run(self) -> dict[int, list[int]]:
        """Until every sequence has ended: their tokens."""
        found: dict[int, list[int]] = {}
        while self.scheduler.num_sequences or self._under_way:
            for token in self.step():
                found.setdefault(token.seq, []).append(token.id)
        return found

    def drop(self, sequences: list[int]) -> None:
        """End them; nothing of them stays known."""
        for seq in sequences:
            self.scheduler.handle(Drop(seq), 0.0)
        self.run()  # the step that is under way
        self.pool.forget()
