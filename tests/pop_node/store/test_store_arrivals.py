"""Loading while chunks still arrive: order, waits, lies, and the moment of completion."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from tiny_models import write_huggingface

from kernels.ops import load_ops
from pop_node.models import registry
from pop_node.store import arrivals, layout
from pop_node.store import bundle as bundle_module
from pop_node.store import partial as partial_module
from pop_node.store.arrivals import CHECKED, REFUSED, Arrivals, Marks
from pop_node.store.bundle import check_tensor
from pop_node.store.holding import Hold, claimed
from pop_node.store.image import ImageFile
from pop_node.store.layout import TensorEntry
from pop_node.store.manifest import Manifest, bundle_digest
from pop_node.store.partial import Partial, partial_bundle
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError


@dataclass(frozen=True)
class Number:
    index: int


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    store = Store(tmp_path / "there")
    store.add(str(write_huggingface(tmp_path / "source")), "tiny", "float32", unwatched)
    return store


@pytest.fixture
def manifest(original: Store) -> Manifest:
    return original.get("tiny").manifest


class Sender:
    """Stands for a fetch that a test drives: brings texts at once, and chunks when told."""

    def __init__(self, original: Store, store: Store, manifest: Manifest) -> None:
        self.original = original.get("tiny").path
        self.store = store
        self.manifest = manifest
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.partial: Partial | None = None

    def receive(self) -> Manifest:
        return self.store.receive(self.manifest, "tiny", "test", self._fill, unwatched)

    def send(self, *indexes: int) -> None:
        weights = (self.original / "weights.bin").read_bytes()
        for index in indexes:
            offset, nbytes = self.manifest.data.span(index)
            assert self.partial is not None
            assert self.partial.put_chunk(index, weights[offset : offset + nbytes])

    def _fill(self, partial: Partial) -> None:
        partial.missing_chunks(unwatched)
        for entry in partial.missing_texts():
            assert partial.put_text(entry, (self.original / entry.name).read_bytes())
        self.partial = partial
        self.begun.set()
        assert self.go_on.wait(30)


@contextmanager
def arriving(sender: Sender) -> Iterator[Callable[[], Manifest]]:
    """The block runs while the bundle arrives; the value ends the fetch and gives its result."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(sender.receive)
        assert sender.begun.wait(30)

        def finish() -> Manifest:
            sender.go_on.set()
            return result.result(30)

        try:
            yield finish
        finally:
            sender.go_on.set()


def test_what_is_there_comes_first_and_the_rest_as_it_arrives(tmp_path: Path) -> None:
    marks = Marks(tmp_path, 5)
    marks.mark(3)
    reader = Arrivals(marks._fd, 5, tmp_path)
    order = reader.as_they_come([Number(i) for i in range(5)], threading.Event())
    assert next(order).index == 3
    marks.mark(1)
    assert next(order).index == 1
    for index in (4, 0, 2):
        marks.mark(index)
    assert [number.index for number in order] == [0, 2, 4]
    marks.close()


def test_patience_ends_when_nothing_comes_any_more(tmp_path: Path) -> None:
    marks = Marks(tmp_path, 2)
    reader = Arrivals(marks._fd, 2, tmp_path)
    with pytest.raises(ConfigError, match="nothing of the bundle has arrived"):
        list(reader.as_they_come([Number(0)], threading.Event(), patience_s=0.05))
    with pytest.raises(ConfigError, match="nothing of the bundle has arrived"):
        reader.wait_checked(patience_s=0.05)
    marks.judge(REFUSED)
    with pytest.raises(ConfigError, match="not the one its manifest names"):
        reader.wait_checked()
    marks.judge(CHECKED)
    reader.wait_checked()
    stop = threading.Event()
    stop.set()
    assert not list(reader.as_they_come([Number(0)], stop))
    marks.close()


def test_nothing_is_waited_for_that_nobody_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "ORPHAN_S", 0.02)
    marks = Marks(tmp_path, 2)
    reader = Arrivals(marks._fd, 2, tmp_path)
    for wait in (
        lambda: list(reader.as_they_come([Number(0)], threading.Event())),
        lambda: reader.wait_checked(),
    ):
        with pytest.raises(ConfigError, match="nothing of the bundle has arrived for 0 s"):
            wait()
    marks.close()


def test_a_new_writer_forgets_what_the_last_one_said(tmp_path: Path) -> None:
    first = Marks(tmp_path, 3)
    first.mark(1)
    first.judge(CHECKED)
    reader = Arrivals(first._fd, 3, tmp_path)
    assert reader.marks() == b"\0\1\0"
    second = Marks(tmp_path, 3)
    assert reader.marks() == b"\0\0\0"
    second.close()
    first.close()


def test_a_model_is_loaded_while_it_arrives(
    tmp_path: Path, original: Store, manifest: Manifest
) -> None:
    store = Store(tmp_path / "here")
    sender = Sender(original, store, manifest)
    assert store.open_partial("tiny") is None
    chunks = range(len(manifest.data.chunks))
    with arriving(sender) as finish, ThreadPoolExecutor(1) as pool:
        bundle = store.open_partial(manifest.identity)
        assert bundle is not None
        sender.send(*chunks[::2])
        loading = pool.submit(registry.load, bundle.path, "float32", load_ops("reference", 1))
        sender.send(*chunks[1::2])
        assert not loading.done(), "the model was not checked yet"
        finish()
        loaded = loading.result(30)
    assert loaded.hold is not None
    assert store.row("tiny").loaded, "the hold outlives the move"
    loaded.hold.close()
    assert not store.row("tiny").loaded
    wanted = registry.load_weights(original.get("tiny").path, manifest, torch.device("cpu"))[0]
    here = registry.load_weights(store.get("tiny").path, manifest, torch.device("cpu"))[0]
    assert all(torch.equal(here[name], wanted[name]) for name in wanted)
    assert store.open_partial("tiny") is None
    assert not (store.get("tiny").path / arrivals.ARRIVED_FILE).exists()


def test_a_path_from_before_the_end_is_good_after_it(
    tmp_path: Path, original: Store, manifest: Manifest
) -> None:
    store = Store(tmp_path / "here")
    sender = Sender(original, store, manifest)
    with arriving(sender) as finish:
        bundle = store.open_partial("tiny")
        assert bundle is not None
        sender.send(*range(len(manifest.data.chunks)))
        finish()
    assert not bundle.path.exists()
    registry.load_model(bundle.path, "float32", load_ops("reference", 1))


def test_a_bundle_that_is_another_model_is_never_loaded(
    tmp_path: Path, original: Store, manifest: Manifest
) -> None:
    """Chunks and identity fit the manifest; the tensors are not those that the identity names."""
    tensors = [msgspec.structs.replace(manifest.tensors[0], blake3="1" * 64)]
    lie = msgspec.structs.replace(manifest, tensors=tensors + manifest.tensors[1:])
    lie = msgspec.structs.replace(lie, bundle=bundle_digest(lie))
    store = Store(tmp_path / "here")
    sender = Sender(original, store, lie)
    with arriving(sender) as finish, ThreadPoolExecutor(1) as pool:
        assert store.open_partial("tiny") is None, "its claims do not fit together"
        assert sender.partial is not None
        path = sender.partial.path
        loading = pool.submit(registry.load, path, "float32", load_ops("reference", 1))
        sender.send(*range(len(manifest.data.chunks)))
        with pytest.raises(ConfigError, match="is not the one named"):
            finish()
        with pytest.raises(ConfigError):
            loading.result(30)
    assert store.rows() == []


def test_what_is_being_loaded_is_not_collected(tmp_path: Path, manifest: Manifest) -> None:
    store = Store(tmp_path / "here")
    root = store.root / "partial"
    for folder in (root, store.root / "bundles", store.root / "names", store.root / "locks"):
        folder.mkdir(parents=True)
    (store.root / "tmp").mkdir()
    with partial_bundle(root, manifest, on_wait=lambda: None) as partial:
        assert store.gc().num_partials == 0, "it is being filled"
        hold = Hold(partial.path)
    assert store.gc().num_partials == 0, "an engine reads it"
    hold.close()
    assert store.gc(0, abandoned=False).num_partials == 0, "a later fetch is to go on with it"
    assert store.gc().num_partials == 1


def test_a_bundle_is_held_by_its_name(original: Store) -> None:
    hold = original.hold("tiny")
    assert hold.bundle == original.get("tiny").path
    with pytest.raises(ConfigError, match="is loaded"):
        original.remove("tiny")
    hold.close()
    original.remove("tiny")
    with pytest.raises(ConfigError, match="no model tiny"):
        original.hold("tiny")


def test_a_look_at_a_bundle_does_not_stop_who_begins_to_load_it(original: Store) -> None:
    path = original.get("tiny").path
    looking, seen = threading.Event(), threading.Event()

    def look() -> None:
        with claimed(path) as free:
            assert free
            looking.set()
            seen.wait(0.02)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(look)
        assert looking.wait(10)
        Hold(path).close()
        seen.set()
        result.result(10)


def test_a_bundle_that_is_being_removed_is_not_held(original: Store) -> None:
    path = original.get("tiny").path
    with claimed(path) as free:
        assert free
        with pytest.raises(ConfigError, match="is being removed"):
            Hold(path)


def test_tensors_are_checked_as_soon_as_they_are_whole(
    tmp_path: Path, original: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "CHECK_S", 0.001)
    seen: list[str] = []
    some = threading.Event()

    def check(image: ImageFile, manifest: Manifest, entry: TensorEntry) -> None:
        seen.append(entry.name)
        check_tensor(image, manifest, entry)
        some.set()

    monkeypatch.setattr(partial_module, "check_tensor", check)
    monkeypatch.setattr(bundle_module, "check_tensor", check)
    sender = Sender(original, Store(tmp_path / "here"), manifest)
    with arriving(sender) as finish:
        first, *rest = range(len(manifest.data.chunks))
        sender.send(*rest)
        assert some.wait(30)
        sender.send(first)
        finish()
    names = {tensor.name for tensor in manifest.tensors}
    assert set(seen) == names
    assert len(seen) == len(names), "each is read once"


def test_a_bit_that_flips_after_its_chunk_arrived_is_found_by_the_loader(
    tmp_path: Path, original: Store, manifest: Manifest
) -> None:
    store = Store(tmp_path / "here")
    sender = Sender(original, store, manifest)
    with arriving(sender):
        bundle = store.open_partial("tiny")
        assert bundle is not None
        sender.send(*range(len(manifest.data.chunks)))
        with (bundle.path / manifest.data.name).open("r+b") as file:
            file.seek(5000)
            byte = file.read(1)
            file.seek(5000)
            file.write(bytes([byte[0] ^ 8]))
        with pytest.raises(ConfigError, match=r"chunk 1 .* does not match its digest"):
            registry.load(bundle.path, "float32", load_ops("reference", 1))


def test_who_waits_for_another_process_can_give_up(
    tmp_path: Path, original: Store, manifest: Manifest
) -> None:
    class GivenUpError(Exception):
        pass

    def give_up(phase: str, done: int, total: int) -> None:
        raise GivenUpError(phase)

    store = Store(tmp_path / "here")
    with arriving(Sender(original, store, manifest)):
        for name in ("tiny", "other"):  # waits for the name, and for the bundle
            with pytest.raises(GivenUpError, match="wait"):
                store.receive(manifest, name, "test", lambda partial: None, give_up)
