"""Packed bundles: the same model in fewer bytes, and nothing that a raw one does not withstand."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from blake3 import blake3
from tiny_models import tensors, write_huggingface

from kernels import codec as blocks
from kernels.codec import encode
from pop_node.store import layout
from pop_node.store.holding import Hold
from pop_node.store.layout import ALIGNMENT
from pop_node.store.manifest import (
    Manifest,
    bundle_digest,
    decode_manifest,
    encode_manifest,
)
from pop_node.store.pack_table import class_rows, tensor_class
from pop_node.store.packing import Packed
from pop_node.store.partial import partial_bundle
from pop_node.store.reading import read_share
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.adding import weights_of
from wire.errors import ConfigError

CHUNK = 4 * ALIGNMENT
"""The least of which packing saves a page."""


@pytest.fixture
def store(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """With ``tiny`` in bfloat16, raw."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", CHUNK)
    store.add(str(source), "tiny", "bfloat16", unwatched)
    return store


@pytest.fixture
def packed(store: Store) -> Packed:
    """``packed``, beside ``tiny``."""
    return store.pack("tiny", target="packed", progress=unwatched)


def equal(one: Store, name: str, other: Store, other_name: str) -> bool:
    found, expected = weights_of(one, name), weights_of(other, other_name)
    return found.keys() == expected.keys() and all(
        torch.equal(found[key].view(torch.int16), expected[key].view(torch.int16)) for key in found
    )


def leftovers(store: Store) -> list[Path]:
    folders = (store.root / folder for folder in ("tmp", "partial"))
    return [path for folder in folders for path in folder.iterdir()]


def forged(store: Store, packed: Packed, change: Callable[[int, bytes], bytes]) -> Path:
    """The packed bundle with its first packed chunk changed, and every digest that tells so."""
    manifest, data = packed.manifest, packed.manifest.data
    index = next(piece.offset // CHUNK for piece in packed.pieces if not piece.reason)
    path = store.get("packed").path
    offset, nbytes = data.span(index)
    content = bytearray((path / data.name).read_bytes())
    stored = change(data.decoded_span(index)[1], bytes(content[offset : offset + nbytes]))
    content[offset : offset + nbytes] = stored.ljust(nbytes, b"\0")
    assert len(content) == data.nbytes
    chunks = list(data.chunks)
    chunks[index] = blake3(content[offset : offset + nbytes]).hexdigest()
    lie = msgspec.structs.replace(manifest, data=msgspec.structs.replace(data, chunks=chunks))
    lie = msgspec.structs.replace(lie, bundle=bundle_digest(lie))
    folder = store.root / "forged"
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / data.name).write_bytes(content)
    (folder / "manifest.json").write_bytes(encode_manifest(lie))
    return folder


# ---- the same model ----------------------------------------------------------------------------


def test_it_is_the_same_model_in_fewer_bytes(store: Store, packed: Packed) -> None:
    raw, here = store.get("tiny").manifest, store.get("packed").manifest
    assert here.identity == raw.identity
    assert here.bundle == packed.manifest.bundle != raw.bundle
    assert here.data.decoded_bytes == raw.data.nbytes
    assert here.data.nbytes < 0.85 * raw.data.nbytes
    assert (store.get("packed").path / "weights.bin").stat().st_size == here.data.nbytes
    assert equal(store, "packed", store, "tiny")
    store.verify("packed")
    assert not leftovers(store)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_a_parallel_group_has_the_same_share(
    store: Store, packed: Packed, rank: int
) -> None:
    shares = [
        read_share(store.get(name).path, store.get(name).manifest, rank, 2)
        for name in ("tiny", "packed")
    ]
    (_, expected, _), (_, found, report) = shares
    assert np.array_equal(found, expected)
    assert report.phases["verify"].nbytes <= packed.manifest.data.nbytes


def test_unpacked_it_is_the_old_bundle_again(store: Store, packed: Packed) -> None:
    again = store.pack("packed", "raw", progress=unwatched)
    assert again.manifest.bundle == store.get("tiny").manifest.bundle
    assert len(list((store.root / "bundles").iterdir())) == 1
    assert {piece.reason for piece in again.pieces} == {"raw was asked for"}


def test_packing_is_the_same_every_time(store: Store, packed: Packed) -> None:
    assert store.pack("packed", progress=unwatched).manifest.bundle == packed.manifest.bundle


def test_a_codec_that_gives_something_else_back_is_caught_before_it_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = blocks.encode

    def wrong(piece: memoryview, dtype: str) -> bytes:
        spoilt = bytearray(piece)
        spoilt[len(spoilt) // 2] ^= 1
        return right(memoryview(spoilt), dtype)

    monkeypatch.setattr(blocks, "encode", wrong)
    with pytest.raises(ConfigError, match="does not come back"):
        store.pack("tiny", target="packed", progress=unwatched)
    assert [manifest.name for manifest in store.list()] == ["tiny"]
    assert not leftovers(store)


def test_what_does_not_shrink_stays_and_says_why(store: Store, source: Path) -> None:
    raw = store.add(str(source), "wide", "float32", unwatched)
    kept = store.pack("wide", progress=unwatched)
    assert kept.manifest == msgspec.structs.replace(raw, name=kept.manifest.name)
    assert {piece.reason for piece in kept.pieces} == {"F32 values are not coded"}
    for row in class_rows(kept.manifest, kept.pieces):
        assert row.stored_bytes == pytest.approx(row.decoded_bytes)
        assert sum(row.raw.values()) == row.decoded_bytes
    quantised = tensors() | {"model.layers.0.mlp.scales": np.arange(64, dtype=np.int8)}
    whole = write_huggingface(source.parent / "whole", quantised)
    store.add(str(whole), "whole", "float32", unwatched)
    reasons = {piece.reason for piece in store.pack("whole", progress=unwatched).pieces}
    assert "I8 values (integers, quantised weights) have no exponents to code" in reasons
    values = tensors()
    rng = np.random.default_rng(5)
    for name, value in values.items():  # every exponent is as likely
        bits = rng.integers(0, 1 << 16, value.shape, np.uint32) << 16
        values[name] = np.where(bits & 0x7F800000 == 0x7F800000, bits ^ 0x40000000, bits).view("f4")
    noise = write_huggingface(source.parent / "noise", values)
    store.add(str(noise), "noise", "bfloat16", unwatched)
    kept = store.pack("noise", progress=unwatched)
    assert kept.manifest.data.packing is None
    assert all(piece.reason for piece in kept.pieces)


def test_the_table_accounts_for_every_tensor(packed: Packed) -> None:
    rows = class_rows(packed.manifest, packed.pieces)
    names = {"embedding", "norm", "attention", "mlp"}
    assert {row.name for row in rows} == names
    assert sum(row.decoded_bytes for row in rows) == sum(t.nbytes for t in packed.manifest.tensors)
    assert sum(row.stored_bytes for row in rows) < packed.manifest.data.nbytes, "padding is not"
    for row in rows:
        assert row.limit_bytes <= row.stored_bytes
        assert row.limit_bits_per_weight > 8
    assert rows[0].name == tensor_class("model.layers.3.mlp.up_proj.weight") == "mlp"


# ---- damage and lies ---------------------------------------------------------------------------


def test_one_flipped_bit_anywhere_is_found_before_anything_is_bound(
    store: Store, packed: Packed
) -> None:
    weights = store.get("packed").path / "weights.bin"
    good = weights.read_bytes()
    rng = random.Random(11)
    for offset, nbytes in packed.manifest.data.spans():
        bad = bytearray(good)
        bad[offset + rng.randrange(nbytes)] ^= 1 << rng.randrange(8)
        weights.write_bytes(bad)
        with pytest.raises(ConfigError, match="does not match its digest"):
            weights_of(store, "packed")
        with pytest.raises(ConfigError, match="does not match its digest"):
            store.verify("packed")
        with pytest.raises(ConfigError, match="does not match its digest"):
            store.pack("packed", "raw", progress=unwatched)
    weights.write_bytes(good)
    store.verify("packed")


@pytest.mark.parametrize("what", ["other weights", "garbage", "too long", "too short"])
def test_a_bundle_that_decodes_to_something_else_is_refused(
    store: Store, packed: Packed, tmp_path: Path, what: str
) -> None:
    def change(decoded: int, stored: bytes) -> bytes:
        if what == "garbage":
            return bytes(reversed(stored))
        nbytes = {"too long": decoded + 2, "too short": decoded - 2}.get(what, decoded)
        return encode(np.zeros(nbytes, np.uint8), "bfloat16")

    lie = forged(store, packed, change)
    taker = Store(tmp_path / "taker")
    with pytest.raises(ConfigError, match=r"cannot be decoded|is not the one named"):
        taker.add(lie.as_uri(), "tiny", None, unwatched)
    assert taker.list() == []
    assert not leftovers(taker), "nothing of it is worth keeping"


@pytest.mark.parametrize("what", ["none", "fewer", "down", "empty", "longer", "odd", "raw", "old"])
def test_impossible_tables_are_refused(packed: Packed, what: str) -> None:
    manifest, data = packed.manifest, packed.manifest.data
    assert data.packing is not None
    ends = list(data.packing.ends)
    tables: dict[str, list[int]] = {
        "fewer": ends[1:],
        "down": [ends[1], ends[0], *ends[2:]],
        "empty": [0, *ends[1:]],
        "longer": [ends[0] + CHUNK, *ends[1:]],
        "odd": [ends[0] - 1, *ends[1:]],
    }
    changes: dict[str, object] = {
        "none": {"data": msgspec.structs.replace(data, packing=None)},
        "raw": {"data": msgspec.structs.replace(data, codec="raw")},
        "old": {"format_version": 2},
    }.get(what) or {
        "data": msgspec.structs.replace(
            data, packing=msgspec.structs.replace(data.packing, ends=tables[what])
        )
    }
    lie: Manifest = msgspec.structs.replace(manifest, **changes)
    lie = msgspec.structs.replace(lie, bundle=bundle_digest(lie))
    with pytest.raises(ConfigError, match="the manifest cannot be read"):
        decode_manifest(encode_manifest(lie), where="here")
    assert decode_manifest(encode_manifest(manifest), where="here") == manifest


def test_who_reads_only_raw_bundles_is_told_by_the_number(store: Store, packed: Packed) -> None:
    assert store.get("tiny").manifest.format_version == 2
    assert b"packing" not in (store.get("tiny").path / "manifest.json").read_bytes()
    assert packed.manifest.format_version == 3
    newer = msgspec.structs.replace(packed.manifest, format_version=4)
    with pytest.raises(ConfigError, match="bundle format 4, this popmesh reads 2 and 3"):
        decode_manifest(encode_manifest(newer), where="here")


# ---- the store ---------------------------------------------------------------------------------


def test_packed_in_place_a_name_keeps_what_it_was(store: Store) -> None:
    store.pin("tiny", True)
    before = store.row("tiny").entry
    hold = Hold(store.get("tiny").path)
    packed = store.pack("tiny", progress=unwatched)
    after = store.row("tiny").entry
    assert after == msgspec.structs.replace(before, bundle=packed.manifest.bundle)
    bundles = {path.name for path in (store.root / "bundles").iterdir()}
    assert bundles == {before.bundle, after.bundle}, "an engine has the old one loaded"
    hold.close()
    store.gc(0)
    assert [path.name for path in (store.root / "bundles").iterdir()] == [after.bundle]
    store.pin("tiny", False)
    store.remove("tiny")
    assert not list((store.root / "bundles").iterdir())


def test_names_that_mean_something_else_are_not_taken(store: Store, source: Path) -> None:
    store.add(str(source), "wide", "float32", unwatched)
    with pytest.raises(ConfigError, match="wide is already in the store"):
        store.pack("tiny", target="wide", progress=unwatched)
    with pytest.raises(ConfigError, match="did you mean tiny"):
        store.pack("tine", progress=unwatched)
    with pytest.raises(ConfigError, match="unknown codec"):
        store.pack("tiny", "zip", progress=unwatched)


def test_a_name_that_changes_meanwhile_is_left_alone(store: Store) -> None:
    path = store.root / "names" / "tiny.json"
    changed = msgspec.structs.replace(store.row("tiny").entry, bundle="0" * 64)
    text = msgspec.json.encode(changed)
    with pytest.raises(ConfigError, match="was changed while tiny was packed"):
        store.pack("tiny", progress=lambda *_: path.write_bytes(text) and None)
    assert path.read_bytes() == text
    assert not leftovers(store)


def test_a_bundle_travels_packed(store: Store, packed: Packed, tmp_path: Path) -> None:
    taker = Store(tmp_path / "taker")
    seen: list[tuple[str, int, int]] = []
    taker.add(
        store.get("packed").path.as_uri(),
        "tiny",
        None,
        lambda *event: seen.append(event),
        packed.manifest.identity,
    )
    nbytes = packed.manifest.data.nbytes
    assert [event for event in seen if event[0] == "fetch"][-1][1:] == (nbytes, nbytes)
    taker.verify("tiny")
    assert equal(taker, "tiny", store, "tiny")


def test_it_is_loaded_while_it_arrives(store: Store, packed: Packed, tmp_path: Path) -> None:
    source = store.get("packed")
    data, content = source.manifest.data, (source.path / "weights.bin").read_bytes()
    with (
        ThreadPoolExecutor(1) as pool,
        partial_bundle(tmp_path, source.manifest, on_wait=lambda: None) as partial,
    ):
        missing = partial.missing_chunks(unwatched)
        for entry in source.manifest.files:
            assert partial.put_text(entry, (source.path / entry.name).read_bytes())
        loading = pool.submit(read_share, partial.path, source.manifest)
        for index in reversed(missing):
            offset, nbytes = data.span(index)
            assert partial.put_chunk(index, content[offset : offset + nbytes])
        partial.check(unwatched)
        found = loading.result()[1]
    raw = store.get("tiny")
    assert np.array_equal(found, read_share(raw.path, raw.manifest)[1])


def test_a_disk_without_room_changes_nothing(disk: Path, source: Path) -> None:
    store = Store(disk / "store")
    store.add(str(source), "tiny", "bfloat16", unwatched)
    before = store.row("tiny")
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    ballast.write_bytes(bytes(free - 3 * ALIGNMENT))
    with pytest.raises(ConfigError, match="No space left"):
        store.pack("tiny", progress=unwatched)
    assert store.row("tiny") == before
    assert not leftovers(store)
    ballast.unlink()
    store.pack("tiny", progress=unwatched)
