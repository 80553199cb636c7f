"""Keeper and watcher on real sockets: start, drain, close, and registries that hang or die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from registry_servers import Restartable, SilentServer
from registry_views import PATIENCE_S, Views, with_status

from registry import keep as keep_module
from registry import keeper as keeper_module
from registry.client import Registry
from registry.embedded import EmbeddedRegistry
from registry.entries import Registration, Snapshot
from registry.keeper import Keeper
from registry.watch import Watch
from registry.watcher import Watcher


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up at once what is in vain, so that tests of it are short."""
    monkeypatch.setattr(keeper_module, "CONFIRM_WITHIN_S", 0.1)
    monkeypatch.setattr(keep_module, "CLOSE_WITHIN_S", 0.3)


@asynccontextmanager
async def running(*parts: Watcher | Keeper) -> AsyncIterator[None]:
    """Run the shells during the block, then cancel those that have not ended."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part.run()) for part in parts]
        yield
        for task in tasks:
            task.cancel()


def watcher_of(
    registry: Registry, service: str, views: Views, *, watch: Watch | None = None
) -> Watcher:
    return Watcher(registry, service, views.add, rng=random.Random(1), watch=watch)


async def test_a_kept_registration_is_seen_drained_and_gone(
    registry: Registry, registration: Registration
) -> None:
    views = Views()
    watcher = watcher_of(registry, registration.service, views)
    keeper = Keeper(registry, registration)
    assert watcher.snapshot is None
    assert watcher.age_s is None
    async with running(watcher, keeper):
        view = await views.wait_for(with_status(a="passing"))
        assert watcher.snapshot == view
        assert watcher.age_s is not None
        assert await keeper.set_meta({**registration.meta, "draining": "yes"})
        view = await views.wait_for(lambda view: view.entries[0].meta["draining"] == "yes")
        assert view.entries[0].status == "passing"
        keeper.set_status("warning", "hot")
        await views.wait_for(with_status(a="warning"))
        await keeper.close()
        await views.wait_for(with_status())
    for before, after in zip(views.all, views.all[1:], strict=False):
        assert before.entries != after.entries
    assert not any(entry.status == "critical" for view in views.all for entry in view.entries)


async def test_heartbeats_keep_a_short_ttl_alive(
    registry: Registry, registration: Registration
) -> None:
    registration = replace(registration, ttl_s=1.5)
    views = Views()
    keeper = Keeper(registry, registration)
    async with running(watcher_of(registry, registration.service, views), keeper):
        await views.wait_for(with_status(a="passing"))
        # A second instance without a keeper, though its TTL is longer, does not last.
        other = replace(registration, service_id=f"{registration.service}:b", ttl_s=2.0)
        await registry.register(other, "passing")
        await views.wait_for(with_status(a="passing", b="critical"))
    assert all(view.entries[0].status == "passing" for view in views.all if view.entries)
    views = Views()  # a keeper that was cancelled leaves its instance to the TTL
    async with running(watcher_of(registry, registration.service, views)):
        await views.wait_for(with_status(a="critical", b="critical"))


async def test_a_registry_that_dies_and_comes_back_empty_is_filled_again(
    restartable: Restartable, registration: Registration, short_patience: None
) -> None:
    registration = replace(registration, ttl_s=1.5)
    views = Views()
    async with Registry.connect(restartable.url) as registry:
        watch = Watch(wait_s=1.0)
        watcher = watcher_of(registry, registration.service, views, watch=watch)
        keeper = Keeper(registry, registration, rng=random.Random(2))
        async with running(watcher, keeper):
            view = await views.wait_for(with_status(a="passing"))
            await restartable.kill()
            assert not await keeper.set_meta({"draining": "yes"}), "nobody can have taken it"
            assert watcher.snapshot == view, "the last view is served meanwhile"
            await restartable.start()
            await asyncio.wait_for(keeper.wait_settled(), PATIENCE_S)
            view = await views.wait_for(lambda view: view.entries[0].meta == {"draining": "yes"})
            assert with_status(a="passing")(view)
            (entry,) = (await registry.services(registration.service)).entries
            assert (entry.meta, entry.status) == ({"draining": "yes"}, "passing")
            assert all(view.entries for view in views.all[1:]), "it never left the view"
            await keeper.close()


async def test_what_does_not_come_back_leaves_the_view(
    restartable: Restartable, registration: Registration
) -> None:
    views = Views()
    gone = replace(registration, service_id=f"{registration.service}:b")
    async with Registry.connect(restartable.url) as registry:
        await registry.register(gone, "passing")
        keeper = Keeper(registry, replace(registration, ttl_s=1.0), rng=random.Random(3))
        watch = Watch(wait_s=1.0, hold_s=2.0)
        watcher = watcher_of(registry, registration.service, views, watch=watch)
        async with running(watcher, keeper):
            await views.wait_for(with_status(a="passing", b="passing"))
            await restartable.kill()
            await restartable.start()
            await views.wait_for(with_status(a="passing"))
            await keeper.close()


async def test_a_hanging_registry_leaves_the_shells_alive_and_closing_bounded(
    registration: Registration, short_patience: None
) -> None:
    views = Views()
    async with (
        SilentServer() as server,
        Registry.connect(server.url, timeout_s=0.05) as registry,
    ):
        watcher = watcher_of(registry, registration.service, views)
        keeper = Keeper(registry, registration)
        async with running(watcher, keeper):
            await server.wait_connections(6)  # each of the two comes back after its timeout
            await asyncio.wait_for(keeper.close(), PATIENCE_S)
        assert watcher.snapshot is None
        assert views.all == []


async def test_a_registry_that_is_not_there_yet_is_waited_for(
    registration: Registration, short_patience: None
) -> None:
    first = EmbeddedRegistry()
    url = await first.start()
    await first.stop()
    port = int(url.rpartition(":")[2])
    views = Views()
    async with Registry.connect(url) as registry:
        keeper = Keeper(registry, registration)
        async with running(watcher_of(registry, registration.service, views), keeper):
            assert not await keeper.set_meta({"draining": "soon"})
            server = EmbeddedRegistry(port=port)
            await server.start()
            view = await views.wait_for(with_status(a="passing"))
            assert view.entries[0].meta == {"draining": "soon"}
            await keeper.close()
    await server.stop()


async def test_closing_a_keeper_that_never_ran_is_immediate(embedded_url: str) -> None:
    async with Registry.connect(embedded_url) as registry:
        keeper = Keeper(registry, Registration("a", "s", "127.0.0.1", 1, {}, 1, 60))
        await keeper.close()
        await keeper.run()
        await keeper.close()
        assert (await registry.services("s")).entries == ()


async def test_what_a_callback_raises_ends_the_watcher(embedded_url: str) -> None:
    def broken(snapshot: Snapshot) -> None:
        raise RuntimeError("the view is wrong")

    async with Registry.connect(embedded_url) as registry:
        with pytest.raises(ExceptionGroup) as caught:
            await Watcher(registry, "s", broken).run()
    assert caught.group_contains(RuntimeError, match="the view is wrong")
