"""Bundles from URLs: ranges, resumption, origins that lie, stop or know no ranges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from origins import Site, serving
from tiny_models import write_huggingface

from pop_node.store import fetch, layout, origin
from pop_node.store.bundle import FalseClaimError
from pop_node.store.manifest import (
    FileEntry,
    KvGeometry,
    Manifest,
    bundle_digest,
    encode_manifest,
    read_manifest,
)
from pop_node.store.origin import open_origin
from pop_node.store.partial import partial_bundle
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(fetch, "RUN_BYTES", 3 * 4096)
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The directory of a bundle in another store."""
    there = Store(tmp_path / "there")
    there.add(str(write_huggingface(tmp_path / "source")), "tiny", "float32", unwatched)
    return there.get("tiny").path


@pytest.fixture
def site(original: Path) -> Iterator[Site]:
    with serving(original) as site:
        yield site


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "here")


def same(store: Store, original: Path) -> None:
    """The store has the original's bundle and nothing besides."""
    store.verify("tiny")
    bundle = store.get("tiny")
    for path in original.iterdir():
        if path.name != "manifest.json":
            assert (bundle.path / path.name).read_bytes() == path.read_bytes()
    assert not list((store.root / "partial").iterdir())
    assert not list((store.root / "tmp").iterdir())


def test_a_bundle_arrives_whole(store: Store, site: Site, original: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    manifest = store.add(site.url, "tiny", None, lambda *event: seen.append(event))
    assert msgspec.structs.replace(read_manifest(original), name="tiny") == manifest
    same(store, original)
    ranges = [span for name, span in site.requests if name == "weights.bin"]
    assert len(ranges) == -(-len(manifest.data.chunks) // 3) > 4
    fetched = [event for event in seen if event[0] == "fetch"]
    assert fetched[0][1] == 0
    assert fetched[-1][1:] == (manifest.data.nbytes, manifest.data.nbytes)
    assert store.add(site.url, "tiny", "float32", unwatched) == manifest
    assert store.row("tiny").entry.source == site.url


def test_a_file_url_works_alike(store: Store, original: Path) -> None:
    store.add(original.as_uri(), "tiny", None, unwatched)
    same(store, original)


def test_a_bundle_that_is_there_is_not_fetched_again(store: Store, site: Site) -> None:
    first = store.add(site.url, "tiny", None, unwatched)
    site.requests.clear()
    second = store.add(site.url, "other", None, unwatched)
    assert (first.bundle, first.identity) == (second.bundle, second.identity)
    assert [name for name, _ in site.requests] == ["manifest.json"]


def test_what_arrived_before_is_not_fetched_again(store: Store, site: Site, original: Path) -> None:
    manifest = read_manifest(original)
    good = (original / "weights.bin").read_bytes()
    root = store.root / "partial"
    root.mkdir(parents=True)
    missing = {2, 3, 7}
    with partial_bundle(root, manifest, on_wait=lambda: None) as partial:
        assert partial.missing_chunks(unwatched) == list(range(len(manifest.data.chunks)))
        for index in range(len(manifest.data.chunks)):
            offset, nbytes = manifest.data.span(index)
            if index not in missing:
                assert partial.put_chunk(index, good[offset : offset + nbytes])
        assert not partial.put_chunk(2, good[:4096])
    weights = root / manifest.bundle / "weights.bin"
    with weights.open("r+b") as file:  # and one that the disk lost since
        file.seek(5 * 4096 + 17)
        byte = file.read(1)
        file.seek(5 * 4096 + 17)
        file.write(bytes([byte[0] ^ 4]))
    store.add(site.url, "tiny", None, unwatched)
    same(store, original)
    spans = {span for name, span in site.requests if name == "weights.bin"}
    assert spans == {f"bytes={lo * 4096}-{hi * 4096 - 1}" for lo, hi in ((2, 4), (5, 6), (7, 8))}


def test_connections_that_break_are_taken_up_again(
    store: Store, site: Site, original: Path
) -> None:
    site.cut_after = 4096 + 100  # one chunk and a part of the next per request
    store.add(site.url, "tiny", None, unwatched)
    same(store, original)


def test_an_origin_that_sends_nothing_more_is_given_up_and_the_rest_kept(
    store: Store, site: Site, original: Path
) -> None:
    site.cut_after = 100
    with pytest.raises(ConfigError, match=r"could not be fetched.*goes on from there"):
        store.add(site.url, "tiny", None, unwatched)
    tries = [span for name, span in site.requests if name == "weights.bin"]
    assert max(tries.count(span) for span in tries) == fetch.ATTEMPTS
    assert store.list() == []
    assert len(list((store.root / "partial").iterdir())) == 1
    site.cut_after = -1
    store.add(site.url, "tiny", None, unwatched)
    same(store, original)


def test_a_server_without_ranges_sends_one_stream(store: Store, site: Site, original: Path) -> None:
    site.ranges = False
    store.add(site.url, "tiny", None, unwatched)
    same(store, original)


@pytest.mark.parametrize(("name", "status"), [("weights.bin", 503), ("tokenizer.json", 429)])
def test_a_busy_server_is_asked_again_and_then_named(
    store: Store, site: Site, name: str, status: int
) -> None:
    site.status[name] = status
    with pytest.raises(ConfigError, match=str(status)):
        store.add(site.url, "tiny", None, unwatched)
    assert sum(asked == name for asked, _ in site.requests) >= fetch.ATTEMPTS


@pytest.mark.parametrize("name", ["manifest.json", "weights.bin", "config.json"])
def test_a_missing_file_is_named_at_once(store: Store, site: Site, name: str) -> None:
    site.status[name] = 404
    with pytest.raises(ConfigError, match=f"{name}: the server says 404"):
        store.add(site.url, "tiny", None, unwatched)
    assert store.list() == []


@pytest.mark.parametrize("name", ["weights.bin", "config.json", "tokenizer.json"])
def test_an_origin_that_sends_other_bytes_is_caught(
    store: Store, site: Site, original: Path, name: str
) -> None:
    good = bytearray((original / name).read_bytes())
    good[len(good) // 2] ^= 1
    site.spoil[name] = bytes(good)
    with pytest.raises(ConfigError, match="not what the manifest names"):
        store.add(site.url, "tiny", None, unwatched)
    assert store.list() == []


def renamed(manifest: Manifest, **changes: object) -> bytes:
    """A manifest that is changed and signs itself anew."""
    changed = msgspec.structs.replace(manifest, **changes)
    return encode_manifest(msgspec.structs.replace(changed, bundle=bundle_digest(changed)))


def test_a_manifest_that_lies_about_its_model_is_caught(
    store: Store, site: Site, original: Path
) -> None:
    """Its chunks are right, its tensors and identity are claims."""
    manifest = read_manifest(original)
    tensor = msgspec.structs.replace(manifest.tensors[0], blake3="1" * 64)
    site.spoil["manifest.json"] = renamed(manifest, tensors=[tensor, *manifest.tensors[1:]])
    with pytest.raises(ConfigError, match="is not the one named"):
        store.add(site.url, "tiny", None, unwatched)
    site.spoil["manifest.json"] = renamed(manifest, identity="2" * 64)
    with pytest.raises(ConfigError, match="not the one its manifest names"):
        store.add(site.url, "tiny", None, unwatched, digest="2" * 64)
    assert store.list() == []
    assert not list((store.root / "partial").iterdir())


LIES = [
    *("path", "own", "huge", "no tokenizer", "data", "codec", "chunks", "chunk size"),
    *("giant chunk", "odd size", "negative", "beyond", "overlap", "twice", "shape", "sizes"),
    *("axis", "stripes", "digest", "dtype", "mixed unit"),
]


def hostile(manifest: Manifest) -> dict[str, dict[str, object]]:
    data, (first, *rest) = manifest.data, manifest.tensors
    change = msgspec.structs.replace
    files = manifest.files
    odd = change(first, name="odd", dtype="U8", shape=(3,), nbytes=3, axis=None)
    after_odd = change(rest[0], unit=first.unit, offset=first.offset + 3)
    return {
        "path": {"files": [change(files[0], name="../../evil"), *files]},
        "own": {"files": [change(files[0], name="manifest.json"), *files]},
        "huge": {"files": [change(files[0], name="x", nbytes=1 << 40), *files]},
        "no tokenizer": {"files": [f for f in files if f.name != "tokenizer.json"]},
        "data": {"data": change(data, name="../weights.bin")},
        "codec": {"data": change(data, codec="zip")},
        "chunks": {"data": change(data, chunks=data.chunks[:-1])},
        "chunk size": {"data": change(data, chunk_bytes=1000)},
        "giant chunk": {"data": change(data, chunk_bytes=1 << 40, chunks=data.chunks[:1])},
        "odd size": {"data": change(data, nbytes=data.nbytes - 1)},
        "negative": {"tensors": [change(first, offset=-4096), *rest]},
        "beyond": {"tensors": [*rest[:-1], change(rest[-1], offset=1 << 50)]},
        "overlap": {"tensors": [first, change(first, name="again"), *rest]},
        "twice": {"tensors": [first, change(first, unit=1, offset=1 << 20)]},
        "shape": {"tensors": [change(first, shape=(1, 1)), *rest]},
        "sizes": {"tensors": [change(first, shape=(-12, -32)), *rest]},
        "axis": {"tensors": [change(first, axis=2), *rest]},
        "stripes": {"stripes": 0},
        "digest": {"tensors": [change(first, blake3="x"), *rest]},
        "dtype": {"dtype": "bfloat12"},
        "mixed unit": {"tensors": [odd, after_odd, *rest[1:]]},
    }


@pytest.mark.parametrize("what", LIES)
def test_impossible_manifests_are_refused_before_anything_travels(
    store: Store, site: Site, original: Path, what: str
) -> None:
    manifest = read_manifest(original)
    site.spoil["manifest.json"] = renamed(manifest, **hostile(manifest)[what])
    with pytest.raises(ConfigError, match=r"manifest"):
        store.add(site.url, "tiny", None, unwatched)
    assert [name for name, _ in site.requests] == ["manifest.json"]


def test_a_manifest_nested_beyond_reason_is_refused(store: Store, site: Site) -> None:
    depth = 100_000
    site.spoil["manifest.json"] = (
        b'{"format_version": 2, "more": ' + b"[" * depth + b"]" * depth + b"}"
    )
    with pytest.raises(ConfigError, match="manifest cannot be read"):
        store.add(site.url, "tiny", None, unwatched)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", b"[]"),
        ("config.json", b'{"x": "\\ud800"}'),
        ("config.json", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("config.json", b"{}"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}'),
    ],
)
def test_a_bundle_with_an_impossible_text_is_refused_as_a_whole(
    store: Store, site: Site, original: Path, name: str, text: bytes
) -> None:
    """Its digests are right, so it was never a model."""
    manifest = read_manifest(original)
    entry = FileEntry(name, len(text), blake3(text).hexdigest())
    files = [entry if file.name == name else file for file in manifest.files]
    site.spoil = {name: text, "manifest.json": renamed(manifest, files=files)}
    with pytest.raises(FalseClaimError):
        store.add(site.url, "tiny", None, unwatched)
    assert store.list() == []
    assert not list((store.root / "partial").iterdir())


@pytest.mark.parametrize("changes", [{"kv": KvGeometry(1, 1, 1 << 40)}, {"context_tokens": 1}])
def test_a_manifest_that_lies_about_its_sizes_is_caught(
    store: Store, site: Site, original: Path, changes: dict[str, object]
) -> None:
    site.spoil["manifest.json"] = renamed(read_manifest(original), **changes)
    with pytest.raises(FalseClaimError, match="not the one its manifest names"):
        store.add(site.url, "tiny", None, unwatched)
    assert store.list() == []


def test_only_the_model_that_was_asked_for_is_taken(
    store: Store, site: Site, original: Path
) -> None:
    with pytest.raises(ConfigError, match="asked for is"):
        store.add(site.url, "tiny", None, unwatched, digest="0" * 64)
    with pytest.raises(ConfigError, match="holds float32, not bfloat16"):
        store.add(site.url, "tiny", "bfloat16", unwatched)
    assert [name for name, _ in site.requests] == ["manifest.json"] * 2
    digest = read_manifest(original).identity
    assert store.add(site.url, "tiny", None, unwatched, digest=digest).identity == digest


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://me:secret@127.0.0.1/x", "neither user"),
        ("https://h/x?token=secret", "neither user"),
        ("file://elsewhere/x", "another machine"),
        ("file:///nowhere/at/all", "cannot be read"),
        ("http://127.0.0.1:9/x", "cannot be reached"),
    ],
)
def test_bad_urls_are_refused_without_their_secrets(store: Store, url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        store.add(url, "tiny", None, unwatched)
    assert "secret" not in str(caught.value)


def test_ranges_that_are_not_what_was_asked_for_are_refused(original: Path) -> None:
    with serving(original) as site:
        reader = open_origin(site.url)
        assert (
            b"".join(reader.stream("weights.bin", 10, 20))
            == (original / "weights.bin").read_bytes()[10:20]
        )
        with pytest.raises(ConfigError, match="not what was asked for"):
            origin._check_span("bytes 0-9/100", 10, "here")
