"""A node asks as many peers at once as a plan counts on."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pop_node.peers import gathering
from pop_node.peers.client import Dialing
from pop_node.peers.neighbours import Peer
from pop_node.store.origin import InterruptedReadError
from pop_node.store.partial import Partial
from topology.rollout import PEERS_AT_ONCE

MIB = 1024 * 1024


class SilentSource:
    """A fake connection: its peer never answers."""

    asked: list[str]

    def __init__(self, peer: Peer, digest: str, dialing: Dialing) -> None:
        self.asked.append(peer.name)
        self._over = threading.Event()

    def marks(self, num_chunks: int) -> bytes:
        self._over.wait()
        raise InterruptedReadError("hung up")

    def abort(self) -> None:
        self._over.set()

    def close(self) -> None:
        pass


def asked_of(
    peers: list[Peer], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, int]:
    """Connections by peer that a node opens before any of them answers."""
    monkeypatch.setattr(SilentSource, "asked", [], raising=False)
    monkeypatch.setattr(gathering, "PeerSource", SilentSource)
    data = SimpleNamespace(chunks=(b"",) * 64, chunk_bytes=chunk_bytes, longest_chunk=chunk_bytes)
    partial: Any = SimpleNamespace(
        manifest=SimpleNamespace(bundle="b", data=data), missing_chunks=lambda report: range(64)
    )

    def stop() -> bool:
        work.abort()
        return True

    work = gathering.Gathering(
        cast(Partial, partial),
        lambda: peers,
        stop,
        lambda holders: 0.0,
        cast(Dialing, None),
        lambda peer, nbytes: None,
        random.Random(0),
    )
    assert not work.run()
    return {name: SilentSource.asked.count(name) for name in SilentSource.asked}


def test_as_many_peers_are_asked_as_a_plan_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [Peer(f"n{i}", "fra", "127.0.0.1:1", float(i)) for i in range(PEERS_AT_ONCE + 3)]
    asked = asked_of(peers, 4 * MIB, monkeypatch)
    assert asked == {f"n{i}": gathering.LINES_PER_PEER for i in range(PEERS_AT_ONCE)}


def test_fewer_peers_are_asked_for_chunks_that_fill_the_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers = [Peer(f"n{i}", "fra", "127.0.0.1:1", float(i)) for i in range(PEERS_AT_ONCE)]
    asked = asked_of(peers, gathering.BUFFER_BYTES // 6, monkeypatch)
    assert asked == {f"n{i}": gathering.LINES_PER_PEER for i in range(3)}
