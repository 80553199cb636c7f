"""Binding a model to memory that is still being filled: nothing of it may be looked at."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama_cases import Sequences, tiny_transformers_llama
from safetensors.torch import save_file

from kernels.ops import Ops, load_ops
from pop_node.models.binding import Bound, bind_ahead
from pop_node.models.registry import load
from pop_node.store.arrivals import CHECKED, Marks
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import LoadPlan
from pop_node.store.reading import PlacedBundle, read_bundle
from pop_node.store.store import Bundle, Store

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("binding")
    theirs = tiny_transformers_llama()
    source = folder / "source"
    source.mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in theirs.state_dict().items()},
        source / "model.safetensors",
    )
    (source / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    (source / "tokenizer.json").write_text("{}")
    store = Store(folder / "store")
    store.add(str(source), "tiny", "float32", lambda *_: None)
    return store.get("tiny")


@pytest.fixture(scope="module")
def ops() -> Ops:
    return load_ops("native", 1)


def placed_of(bundle: Bundle) -> PlacedBundle:
    found: list[PlacedBundle] = []
    read_bundle(bundle.path, on_placed=found.append).hold.close()
    (placed,) = found
    return placed


def logits(loaded: object) -> torch.Tensor:
    sequences = Sequences(loaded)
    return sequences.step({sequences.new(): PROMPT})[0]


def test_a_model_bound_ahead_is_the_one_bound_afterwards(bundle: Bundle, ops: Ops) -> None:
    bound: list[Bound | None] = []
    read = read_bundle(
        bundle.path, on_placed=lambda placed: bound.append(bind_ahead(placed, "float32", ops))
    )
    loaded = load(bundle.path, "float32", ops, read, bound=bound[0])
    assert bound[0] is not None
    assert loaded.model is bound[0].model
    assert loaded.phases["bind"].ended == bound[0].ended
    assert torch.equal(logits(loaded.model), logits(load(bundle.path, "float32", ops).model))


def test_what_was_bound_to_other_memory_is_not_used(bundle: Bundle, ops: Ops) -> None:
    stale = placed_of(bundle)
    stale.memory[:] = 0
    bound = bind_ahead(stale, "float32", ops)
    loaded = load(bundle.path, "float32", ops, read_bundle(bundle.path), bound=bound)
    assert bound is not None
    assert loaded.model is not bound.model
    assert logits(loaded.model).any()


def test_another_dtype_waits_for_the_bytes(bundle: Bundle, ops: Ops) -> None:
    assert bind_ahead(placed_of(bundle), "bfloat16", ops) is None


def test_matrices_apart_wait_for_the_bytes(bundle: Bundle, ops: Ops) -> None:
    """One matrix of what is multiplied as one lies elsewhere: it would have to be copied."""
    placed = placed_of(bundle)
    spare = len(placed.memory)
    tensors = [
        tensor._replace(offset=spare)
        if tensor.name.endswith("0.self_attn.k_proj.weight")
        else tensor
        for tensor in placed.plan.tensors
    ]
    plan = LoadPlan(2 * spare, placed.plan.chunks, tensors)
    memory = HostArena(plan, 1, 4096).memory
    assert bind_ahead(dataclasses.replace(placed, plan=plan, memory=memory), "float32", ops) is None


def test_what_is_still_arriving_is_not_bound_ahead(bundle: Bundle, tmp_path: Path) -> None:
    """It may be completed and moved meanwhile, and is then read anew."""
    partial = tmp_path / "partial" / bundle.path.name
    shutil.copytree(bundle.path, partial)
    chunks = len(bundle.manifest.data.chunks)
    marks = Marks(partial, chunks)
    for index in range(chunks):
        marks.mark(index)
    marks.judge(CHECKED)
    found: list[PlacedBundle] = []
    read_bundle(partial, on_placed=found.append).hold.close()
    marks.close()
    assert not found


@pytest.mark.parametrize(
    "text", [b"no json", b'{"model_type": "llama", "hidden_size": -1}'], ids=["text", "size"]
)
def test_what_is_wrong_is_said_by_the_load(bundle: Bundle, ops: Ops, text: bytes) -> None:
    placed = dataclasses.replace(placed_of(bundle), texts={"config.json": text})
    assert bind_ahead(placed, "float32", ops) is None


NO_ACCESS = """
import ctypes, mmap, sys
from pathlib import Path
import numpy as np
from kernels.ops import load_ops
from pop_node.models.binding import bind_ahead
from pop_node.store.load_plan import plan_load
from pop_node.store.manifest import read_manifest
from pop_node.store.reading import PlacedBundle

directory = Path(sys.argv[1])
plan = plan_load(read_manifest(directory))
memory = np.frombuffer(mmap.mmap(-1, plan.arena_bytes), np.uint8)
address, nbytes = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(plan.arena_bytes)
assert ctypes.CDLL(None).mprotect(address, nbytes, 0) == 0  # PROT_NONE
texts = {"config.json": (directory / "config.json").read_bytes()}
placed = PlacedBundle(directory, texts, plan, memory)
for backend in ("native", "reference"):
    print(backend, bind_ahead(placed, "float32", load_ops(backend, 1)) is not None, flush=True)
print(memory[:1] if sys.argv[2] == "look" else "no look")
"""
"""Whoever looks at a byte of this memory dies of it."""


@pytest.mark.parametrize(("deed", "code"), [("bind", 0), ("look", -11)])
def test_binding_looks_at_no_byte(bundle: Bundle, deed: str, code: int) -> None:
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", NO_ACCESS, str(bundle.path), deed],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[:2] == ["native True", "reference True"], done.stderr
    assert done.returncode == code
