"""The store: names, atomicity, concurrency, verification."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_models import HEAD_DIM, KV_HEADS, LAYERS, tensors, write_huggingface

from pop_node.store import store as store_module
from pop_node.store.files import workspace
from pop_node.store.manifest import KvGeometry, Manifest
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError


def add(store: Store, source: Path, name: str = "tiny") -> Manifest:
    return store.add(str(source), name, "float32", unwatched)


def snapshot(root: Path) -> set[str]:
    """Everything a reader can see, with nothing half-written."""
    kept = [*root.glob("bundles/*"), *root.glob("names/*")]
    return {str(path.relative_to(root)) for path in kept}


# ---- what an added model is --------------------------------------------------------------------


def test_an_added_model_is_described_and_complete(store: Store, source: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    manifest = store.add(str(source), "tiny", "float32", lambda *event: seen.append(event))
    bundle = store.get("tiny")
    assert bundle.manifest == manifest
    assert bundle.path == store.root / "bundles" / manifest.bundle
    assert manifest.kv == KvGeometry(LAYERS, KV_HEADS, HEAD_DIM)
    assert (manifest.context_tokens, manifest.dtype, manifest.licence) == (
        128,
        "float32",
        "apache-2.0",
    )
    files = {path.name: path.stat().st_size for path in bundle.path.iterdir()}
    described = {entry.name: entry.nbytes for entry in manifest.files}
    described["weights.bin"] = manifest.data.nbytes
    assert {name: size for name, size in files.items() if name != "manifest.json"} == described
    assert manifest.total_bytes == sum(described.values())
    expected = tensors()
    assert {entry.name for entry in manifest.tensors} == expected.keys()
    raw = (bundle.path / "weights.bin").read_bytes()
    stripes = manifest.stripes
    assert stripes == 4  # as many as there are heads
    for entry in manifest.tensors:
        stored = np.frombuffer(raw[entry.offset : entry.offset + entry.nbytes], np.float32)
        value = expected[entry.name]
        parts = np.split(value, stripes, axis=1) if entry.axis == 1 else [value]
        assert np.array_equal(stored, np.concatenate([part.ravel() for part in parts]))
    assert any(entry.axis == 1 for entry in manifest.tensors)
    done = [event for event in seen if event[0] == "convert"]
    assert done[-1][1] == done[-1][2] == sum(entry.nbytes for entry in manifest.tensors)
    assert not list((store.root / "tmp").iterdir())


def test_list_is_sorted_and_carries_the_names_asked_for(store: Store, source: Path) -> None:
    assert store.list() == []
    add(store, source, "b")
    add(store, source, "a")
    assert [manifest.name for manifest in store.list()] == ["a", "b"]


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "absent")
    assert store.list() == []
    with pytest.raises(ConfigError, match="the store is empty"):
        store.get("tiny")
    with pytest.raises(ConfigError, match="no model tiny"):
        store.remove("tiny")
    assert not store.root.exists()


# ---- identity ----------------------------------------------------------------------------------


def test_identity_follows_the_model_not_its_packing(tmp_path: Path, store: Store) -> None:
    weights = tensors()
    half = {name: value.astype(np.float16) for name, value in weights.items()}
    forms = {
        "single": write_huggingface(tmp_path / "single"),
        "sharded": write_huggingface(tmp_path / "sharded", shards=3),
        "half": write_huggingface(tmp_path / "half", half, torch_dtype="float16"),
        "newer": write_huggingface(tmp_path / "newer", transformers_version="5.0.0"),
    }
    found = {name: add(store, path, name) for name, path in forms.items()}
    assert len({manifest.identity for manifest in found.values()}) == 1
    assert found["single"].bundle == found["sharded"].bundle == found["half"].bundle
    assert found["newer"].bundle != found["single"].bundle


def test_identity_tells_models_apart(tmp_path: Path, store: Store) -> None:
    weights = tensors()
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    swapped = tensors()
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    swapped[first], swapped[second] = swapped[second], swapped[first]
    forms = [
        write_huggingface(tmp_path / "plain"),
        write_huggingface(tmp_path / "weights", weights),
        write_huggingface(tmp_path / "swapped", swapped),
        write_huggingface(tmp_path / "rope", rope_theta=50000.0),
        write_huggingface(tmp_path / "unknown-key", some_future_switch=True),
        write_huggingface(tmp_path / "template", template="{{ messages }}"),
    ]
    tokenizer = write_huggingface(tmp_path / "tokenizer") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"ab"', '"ba"').replace('"b"\n', '"a"\n'))
    identities = {add(store, path, path.name).identity for path in [*forms, tokenizer.parent]} | {
        store.add(str(forms[0]), "bf16", "bfloat16", unwatched).identity
    }
    assert len(identities) == len(forms) + 2


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a/b", "..", "a" * 65, "ä", "a\n", "a b"])
def test_bad_names_are_refused_everywhere(store: Store, source: Path, name: str) -> None:
    for act in (lambda: add(store, source, name), lambda: store.get(name)):
        with pytest.raises(ConfigError, match="is not a model name"):
            act()
    assert not store.root.exists()


def test_a_missing_model_comes_with_a_suggestion(store: Store, source: Path) -> None:
    add(store, source, "smollm2-135m")
    with pytest.raises(ConfigError) as close:
        store.get("smollm-135m")
    assert close.value.suggestion == "did you mean smollm2-135m?"
    with pytest.raises(ConfigError) as far:
        store.get("zzz")
    assert far.value.suggestion == "there are: smollm2-135m"


def test_adding_again_changes_nothing(store: Store, source: Path) -> None:
    manifest = add(store, source)
    before = snapshot(store.root)
    phases: list[str] = []
    again = store.add(str(source), "tiny", "float32", lambda phase, *_: phases.append(phase))
    assert (again, phases, snapshot(store.root)) == (manifest, [], before)


def test_a_taken_name_is_not_overwritten(tmp_path: Path, store: Store, source: Path) -> None:
    add(store, source)
    other = write_huggingface(tmp_path / "other", tensors(1))
    with pytest.raises(ConfigError, match="already in the store"):
        add(store, other)
    with pytest.raises(ConfigError, match="already in the store"):
        store.add(str(source), "tiny", "bfloat16", unwatched)


def test_unknown_dtypes_and_sources_are_refused(store: Store, source: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        store.add(str(source), "tiny", "int4", unwatched)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="neither a model directory nor"):
        store.add(str(source / "absent"), "tiny", "float32", unwatched)
    assert snapshot(store.root) == set()


def test_a_bundle_lives_as_long_as_a_name_means_it(store: Store, source: Path) -> None:
    path = store.root / "bundles" / add(store, source, "a").bundle
    add(store, source, "b")
    store.remove("a")
    assert path.is_dir()
    store.verify("b")
    with pytest.raises(ConfigError, match="no model a"):
        store.get("a")
    store.remove("b")
    assert snapshot(store.root) == set()
    assert not list((store.root / "tmp").iterdir())


# ---- crashes -----------------------------------------------------------------------------------


def test_every_disk_fault_leaves_the_old_state_or_the_new(
    store: Store, source: Path, failing_disk: list[int]
) -> None:
    steps = 0
    for steps in range(1, 100):
        failing_disk[0] = steps
        failed = ""
        try:
            add(store, source)
        except ConfigError as exc:
            failed = str(exc)
        failing_disk[0] = 0
        if not failed:
            break
        assert "disk failed" in failed
        for manifest in store.list():
            store.verify(manifest.name)
        assert not list((store.root / "tmp").iterdir())
        assert {path.name for path in (store.root / "names").iterdir()} <= {"tiny.json"}
        if store.list():  # the last step failed after the name appeared
            store.remove("tiny")
    assert steps > 8, "the sweep must reach past files, directories and both renames"
    store.verify("tiny")


def test_what_a_killed_process_left_is_collected(
    store: Store, source: Path, tmp_path: Path
) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from pop_node.store.store import Store
def die(phase, done, total):
    if phase == "convert":
        os.kill(os.getpid(), signal.SIGKILL)
Store(Path(sys.argv[1])).add(sys.argv[2], "tiny", "float32", die)
"""
    command = [sys.executable, "-c", script, str(store.root), str(source)]
    ended = subprocess.run(command, timeout=60, check=False, cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL
    assert len(list((store.root / "tmp").iterdir())) == 1
    assert snapshot(store.root) == set()
    orphan = store.root / "bundles" / ("0" * 64)  # as after a crash between bundle and name
    orphan.mkdir()
    add(store, source)
    assert not list((store.root / "tmp").iterdir())
    store.verify("tiny")
    add(store, source, "other")
    store.remove("other")
    assert not orphan.exists()


def test_the_workspace_of_a_living_process_is_left_alone(store: Store, source: Path) -> None:
    add(store, source, "first")
    with workspace(store.root / "tmp", store.root / "locks" / "store") as mine:
        add(store, source, "second")
        assert mine.is_dir()
    assert not mine.exists()


# ---- several at once ---------------------------------------------------------------------------


def test_a_second_add_waits_for_the_first_and_sees_its_model(store: Store, source: Path) -> None:
    converting, waiting = threading.Event(), threading.Event()
    phases: list[str] = []

    def first(phase: str, done: int, total: int) -> None:
        if phase == "convert" and not converting.is_set():
            converting.set()
            assert waiting.wait(30), "the second add never waited"

    def second(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        waiting.set()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(store.add, str(source), "tiny", "float32", first)
        assert converting.wait(30)
        two = pool.submit(Store(store.root).add, str(source), "tiny", "float32", second)
        assert one.result() == two.result()
    assert set(phases) == {"wait"}


def test_names_added_at_once_share_one_bundle(store: Store, source: Path) -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> Manifest:
        barrier.wait(30)
        return add(Store(store.root), source, f"m{number}")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert len({manifest.bundle for manifest in found}) == 1
    assert [manifest.name for manifest in store.list()] == ["m0", "m1", "m2", "m3"]
    store.verify("m0")


# ---- damage ------------------------------------------------------------------------------------


def test_verify_finds_a_changed_byte_in_any_file(store: Store, source: Path) -> None:
    add(store, source)
    bundle = store.get("tiny")
    store.verify("tiny")
    for name in ["weights.bin", *(entry.name for entry in bundle.manifest.files)]:
        path = bundle.path / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ConfigError, match=name):
            store.verify("tiny")
        path.unlink()
        with pytest.raises(ConfigError, match=name):
            store.verify("tiny")
        path.write_bytes(good)
    store.verify("tiny")


@pytest.mark.parametrize(
    ("field", "value", "found_by"),
    [
        ("identity", "0" * 64, "verify"),
        ("tensors", [], "verify"),
        ("files", [], "get"),
        ("bundle", "0" * 64, "get"),
        ("format_version", 3, "get"),
        ("kv", None, "get"),
    ],
)
def test_a_forged_manifest_is_refused(
    store: Store, source: Path, field: str, value: object, found_by: str
) -> None:
    add(store, source)
    path = store.get("tiny").path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConfigError):
        getattr(store, found_by)("tiny")


def test_a_name_file_cannot_lead_out_of_the_store(store: Store, source: Path) -> None:
    add(store, source)
    path = store.root / "names" / "tiny.json"
    entry = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(entry | {"bundle": "../../source"}))
    with pytest.raises(ConfigError, match="does not name a bundle"):
        store.get("tiny")


def test_the_store_needs_no_torch() -> None:
    modules = f"{store_module.__name__}, pop_node.text.stream"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert ended.returncode == 0
