"""A running node tells its routers what other nodes take from it."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from pop_node.peers.inventory import NAME_HEADER
from pop_node.peers.neighbours import BUNDLES_SERVICE
from pop_node.store.store import Store
from registry.client import Registry
from tests.pop_node.hand_router import MODEL
from tests.pop_node.node_mesh import tiny_mesh, write_store


async def test_routers_hear_what_is_given(tmp_path: Path) -> None:
    store: Store = write_store(tmp_path)
    manifest = store.get(MODEL).manifest
    async with tiny_mesh(store, tmp_path, "a", version=4) as mesh:
        a = mesh.routers["a"]
        assert a.load is not None
        assert a.load.giving.given_bytes == 0
        async with Registry.connect(mesh.url) as registry:
            (entry,) = (await registry.services(BUNDLES_SERVICE)).entries
        url = f"http://{entry.meta['bundles']}/bundles/{manifest.bundle}/{manifest.data.name}"
        headers = {NAME_HEADER: "a", "Range": f"bytes=0-{manifest.data.nbytes - 1}"}
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as got:
            assert len(await got.read()) == manifest.data.nbytes
        await a.until(lambda: a.load is not None and a.load.giving.given_bytes)
        assert a.load.giving.given_bytes == manifest.data.nbytes
        assert a.load.giving.bytes_per_s > 0
        assert (a.load.giving.takers, a.load.giving.turned_away) == (0, 0)
