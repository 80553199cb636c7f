"""Shared by the engine's GPU benchmarks: random Llamas, an engine without its process, reports.

Needs torch, triton and numpy; with ``dry``, no GPU: kernels run in Triton's interpreter, streams
and graphs are the tests' fakes, and no figure means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from common import report  # noqa: E402

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
from pop_node.models.llama import DTYPES, Llama, LlamaConfig  # noqa: E402

SEED = 20240607
BLOCK_TOKENS = 16
DRY_MULTIPROCESSORS = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's sizes; ``config`` is its config.json."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    context: int

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
        }

    @property
    def read_weights(self) -> int:
        """Elements of the weights that each step reads: all matrices, of embeddings the head."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden

    @property
    def kv_elements(self) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SMOLLM2 = Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, True, 8448)
LLAMA_8B = Shape("llama3-8b", 32, 4096, 32, 8, 128, 14336, 128256, False, 8448)
TINY = Shape("tiny", 2, 32, 4, 2, 8, 48, 96, True, 256)


def weights(shape: Shape, dtype: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Random ones by their names in files; what is multiplied as one lies back to back.

    All are numbers of bfloat16, so that a model is the same in either dtype.
    """
    rng = torch.Generator(device).manual_seed(SEED)
    hidden, kind = shape.hidden, DTYPES[dtype]

    def draw(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, device=device, generator=rng) * columns**-0.5
        return drawn.bfloat16().to(kind)

    def norm() -> torch.Tensor:
        drawn = torch.randn(hidden, device=device, generator=rng)
        return (1 + drawn / 10).bfloat16().to(kind)

    named = {"model.embed_tokens.weight": draw(shape.vocab, hidden), "model.norm.weight": norm()}
    if not shape.tied:
        named["lm_head.weight"] = draw(shape.vocab, hidden)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        q, k, v = draw(queries + 2 * keys, hidden).split([queries, keys, keys])
        gate, up = draw(2 * shape.inner, hidden).split(shape.inner)
        named |= {
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": draw(hidden, queries),
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": draw(hidden, shape.inner),
            at + "input_layernorm.weight": norm(),
            at + "post_attention_layernorm.weight": norm(),
        }
    return named


def operations(dry: bool, *, batch_invariant: bool = False) -> Ops:
    """Of the GPU; ``dry``: the same kernels, interpreted."""
    if not dry:
        return triton_ops(batch_invariant=batch_invariant)
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


def a_device(dry: bool) -> Any:
    if dry:
        from tests.fakes.late_device import LateDevice

        return LateDevice()
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


def prompts(shape: Shape, count: int, tokens: int) -> list[list[int]]:
    """Random ones."""
    rng = torch.Generator().manual_seed(SEED)
    drawn: list[list[int]] = torch.randint(0, shape.vocab, (count, tokens), generator=rng).tolist()
    return drawn


def a_model(shape: Shape, dtype: str, ops: Ops) -> Llama:
    """A random one."""
    named = weights(shape, dtype, ops.device)
    return Llama(LlamaConfig.from_hf(shape.config), named, ops, dtype)


def hugging_face(shape: Shape, dtype: str, device: torch.device) -> Any:
    """transformers' model of the same weights, to call; None where it is not installed."""
    try:
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    with torch.device(device):
        model = LlamaForCausalLM(TheirConfig(**shape.config)).to(DTYPES[dtype]).eval()
    named = weights(shape, dtype, device)
    if shape.tied:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    model.load_state_dict(named)
    return model


def synchronize(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()


def seconds_of(run: Any, dry: bool) -> float:
    """Wall time of ``run`` and of all that it queued."""
    synchronize(dry)
    began = time.perf_counter()
    run()
    synchronize(dry)
    return time.perf_counter() - began


def facts(doc: str | None, dry: bool) -> dict[str, Any]:
    """Where and with what it ran."""
    found = report.facts(doc, ["torch", "triton", "numpy"]) | {"seed": SEED, "dry": dry}
    if not dry:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def arguments(doc: str | None) -> argparse.Namespace:
    """``--out`` and ``--dry``; exits with 2 where there is no GPU for a real run."""
    parser = report.command_line(doc)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted, no GPU")
    given = parser.parse_args()
    if not given.dry and not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    return given


def ceilings(dry: bool) -> dict[str, float]:
    """Of the device, measured: bytes copied per second, read and written, and FLOPs of a large
    bfloat16 product."""
    size, side, rounds = (1 << 16, 32, 1) if dry else (4 << 30, 8192, 10)
    device = torch.device("cpu") if dry else torch.device("cuda")
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

    def best(run: Any) -> float:
        run()
        return min(seconds_of(lambda: [run() for _ in range(rounds)], dry) for _ in range(3))

    copy_s, product_s = best(lambda: target.copy_(source)), best(lambda: a @ b)
    return {
        "copy_bytes_s": 2 * size * rounds / copy_s,
        "product_flops_s": 2 * side**3 * rounds / product_s,
    }


def save(content: dict[str, Any], out: Path) -> None:
    """Write the report; what is not a finite number would not be JSON."""
    json.dumps(content, allow_nan=False)
    report.save(content, out)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinity for what is not finite."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if math.isfinite(error) else math.inf
