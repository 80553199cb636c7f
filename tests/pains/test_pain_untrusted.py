"""Bytes of strangers that become code, and parameters of a transfer that kill an engine."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import pickle
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pop_node.kv_stream import liveness
from pop_node.store.store import Store
from registry.client import Registry
from registry.embedded import EmbeddedRegistry
from tests.pains.pain_parts import hand_over
from tests.pop_node.hand_router import a_submit
from tests.pop_node.kv_stream.kv_node import Node, assert_at_rest
from tests.pop_node.node_mesh import MESH, TinyMesh, tiny_mesh
from tests.router.router_mesh import RouterMesh
from wire.framing import encode
from wire.messages import Finished, Hello, Submit, Transfer

ROOT = Path(__file__).parents[2]
OURS = ("popmesh", "router", "pop_node", "registry", "kernels", "topology", "wire")
CODE_LOADERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
}


class Bait:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def baits(path: Path) -> list[bytes]:
    """The bait as it is, and as a frame of either wire might carry it."""
    raw = pickle.dumps(Bait(path))
    framed = struct.pack("<I", len(raw)) + raw
    packed = msgspec.msgpack.encode([16, raw])
    return [raw, framed, struct.pack("<I", len(packed)) + packed, b"\x80\x04" * 5000]


async def throw(address: str, data: bytes) -> None:
    """Say this to a listener, and wait until it has had enough of us."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError):  # closed while we still spoke
        writer.write(data)
        writer.write_eof()
        await reader.read()
    writer.close()


@contextlib.asynccontextmanager
async def served_registry() -> AsyncIterator[str]:
    registry = EmbeddedRegistry()
    yield await registry.start()
    await registry.stop()


def test_the_bait_works(tmp_path: Path) -> None:
    pickle.loads(baits(tmp_path / "owned")[0])  # noqa: S301
    assert (tmp_path / "owned").exists()


async def test_cve_2026_3059_and_3060_no_listener_unpickles(
    mesh: RouterMesh, tmp_path: Path
) -> None:
    """CVE-2026-3059 and CVE-2026-3060 (fixed by sgl-project/sglang 20904 and 21435): services that
    took Python objects over ZeroMQ unpickled whatever reached their port. What these listeners
    get is data, whoever sends it, and the next peer is served."""
    owned = tmp_path / "owned"
    async with asyncio.timeout(60), served_registry() as url, Node("p") as p, Node("d") as d:
        for bait in baits(owned):
            await throw(d.address, bait)
            await throw(url.removeprefix("consul://"), bait)
            await throw(mesh.url.removeprefix("http://"), bait)
            body = await mesh.http.post("/v1/chat/completions", data=bait)
            assert body.status == 400
        await hand_over(p, d)
        assert_at_rest(p, d)
        async with Registry.connect(url) as client:
            assert (await client.services("anything")).entries == ()
        assert (await mesh.chat()).status == 200
    assert not owned.exists()


@pytest.mark.parametrize("package", OURS)
def test_cve_2026_3059_and_3060_nothing_of_ours_could(package: str) -> None:
    """CVE-2026-3059 and CVE-2026-3060: no module imports what turns bytes into code, and weights
    are never read by torch.load."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                assert not (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load")
                ), path
                continue
            assert not names & CODE_LOADERS, path


MALFORMED_ON_THE_WIRE: dict[str, Any] = {
    "a number": 5,
    "text": "x",
    "a map": {"id": b"x" * 16, "peer": "b", "address": "127.0.0.1:1"},
    "too short": [b"x" * 16],
    "id as text": ["x" * 16, "b", "127.0.0.1:1"],
    "id missing": [None, "b", "127.0.0.1:1"],
    "address as number": [b"x" * 16, "b", 9],
}
MALFORMED_IN_MEANING = {
    "no id": Transfer(b"", "b", "127.0.0.1:1"),
    "id of another length": Transfer(b"x" * 17, "b", "127.0.0.1:1"),
    "nobody we know": Transfer(b"n" * 16, "nobody", "127.0.0.1:1"),
    "no address": Transfer(b"a" * 16, "b", ""),
    "no such address": Transfer(b"s" * 16, "b", "a..b \0:99999999999"),
    "a door that is shut": Transfer(b"d" * 16, "b", "127.0.0.1:1"),
    "itself": Transfer(b"i" * 16, "a", "127.0.0.1:1"),
}


async def throw_submit(mesh: TinyMesh, leg: str, transfer: Any) -> None:
    """A Submit whose transfer is not of the right type, on a link of its own."""
    frame = encode(a_submit(1, leg, transfer=Transfer(b"x" * 16, "b", "127.0.0.1:1")))
    fields = msgspec.msgpack.decode(frame[4:])
    at = 1 + Submit.__struct_fields__.index("transfer")
    fields[at] = transfer
    body = msgspec.msgpack.encode(fields)
    hello = encode(Hello(1, 1, MESH, "router", "evil", "ams", "i2", [], []))
    await throw(mesh.nodes["a"].address, hello + struct.pack("<I", len(body)) + body)


async def test_cve_2026_94622_a_malformed_transfer_costs_its_own_request_only(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-94622: one request with malformed KV transfer parameters ended the engine process,
    and with it everybody's request. Here a stream that runs meanwhile ends as if it were alone,
    and the engine is the same process afterwards."""
    monkeypatch.setattr(liveness, "MIN_WAIT_S", 0.5)
    async with asyncio.timeout(90), tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a, pid = mesh.routers["a"], mesh.nodes["a"].engine["pid"]
        alone = mesh.whole("a", max_tokens=100)
        await a.ending(alone)
        meanwhile = mesh.whole("a", max_tokens=100)
        for transfer in MALFORMED_ON_THE_WIRE.values():
            for leg in ("prefill", "decode"):
                await throw_submit(mesh, leg, transfer)
        sent: dict[int, tuple[str, str]] = {}
        for what, transfer in MALFORMED_IN_MEANING.items():
            for leg in ("prefill", "decode"):
                sent[mesh.stream()] = what, leg
                a.send(a_submit(max(sent), leg, transfer=transfer))
        for stream, (what, leg) in sent.items():
            if leg == "decode":  # some would wait for a peer that may come
                mesh.cancel(stream, "a")
            ending = await a.ending(stream)
            if isinstance(ending, Finished):
                assert (leg, ending.reason) == ("decode", "cancelled"), what
        assert (await a.ending(meanwhile)).reason == "length"
        assert mesh.answer(meanwhile) == mesh.answer(alone)
        assert mesh.nodes["a"].engine["pid"] == pid
        await mesh.at_rest()


@pytest.mark.parametrize("name", ["kv_transfer_params", "transfer", "bootstrap_room"])
async def test_cve_2026_94622_clients_cannot_speak_of_transfers_at_all(
    mesh: RouterMesh, name: str
) -> None:
    """CVE-2026-94622: the parameters came in through the public API. There they are unknown."""
    response = await mesh.chat(**{name: {"id": "x", "peer": "fra-1"}})
    assert response.status == 400
    assert (await response.json())["error"]["code"] == "unsupported_parameter"
    assert not any(node.submits for node in mesh.nodes.values())
