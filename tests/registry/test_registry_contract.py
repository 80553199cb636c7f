"""What the client relies on, held against the embedded registry and a real Consul alike."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from registry.client import Registry
from registry.entries import KvEntry, Registration, ServiceEntry, Snapshot
from wire.errors import PeerError

WAIT_S = 20.0  # longer than any change takes; a test that waits it out has failed


async def statuses(registry: Registry, service: str) -> dict[str, str]:
    snapshot = await registry.services(service)
    return {entry.service_id: entry.status for entry in snapshot.entries}


async def settled(registry: Registry, service: str) -> Snapshot:
    """The service once its index stands still (Consul syncs an agent's changes in steps)."""
    snapshot = await registry.services(service)
    while True:
        later = await registry.services(service, wait_index=snapshot.index, wait_s=0.2)
        if later == snapshot:
            return snapshot
        snapshot = later


async def wait_for_change(registry: Registry, snapshot: Snapshot, service: str) -> Snapshot:
    """The first answer with other content: an index may also move without."""
    later = snapshot
    while later.entries == snapshot.entries:
        later = await registry.services(service, wait_index=later.index, wait_s=WAIT_S)
    return later


async def test_a_registration_is_read_back_whole(
    registry: Registry, registration: Registration
) -> None:
    registration = replace(
        registration, meta={"utf8": "Zürich ✓", "json": '{"a": [1, 2]}', "empty": "", "k-_9": "x"}
    )
    await registry.register(registration, "warning")
    snapshot = await registry.services(registration.service)
    assert snapshot.index >= 1
    assert snapshot.entries == (
        ServiceEntry(
            service_id=registration.service_id,
            service=registration.service,
            address="192.0.2.1",
            port=7000,
            meta=dict(registration.meta),
            status="warning",
        ),
    )


async def test_an_unknown_service_is_an_empty_snapshot(registry: Registry, service: str) -> None:
    snapshot = await registry.services(service)
    assert snapshot.entries == ()
    assert snapshot.index >= 1


async def test_instances_are_ordered_by_id(registry: Registry, registration: Registration) -> None:
    ids = [f"{registration.service}:{name}" for name in ("c", "a", "b")]
    for service_id in ids:
        await registry.register(replace(registration, service_id=service_id))
    assert list(await statuses(registry, registration.service)) == sorted(ids)


async def test_a_registration_without_health_is_critical_until_its_first_heartbeat(
    registry: Registry, registration: Registration
) -> None:
    await registry.register(registration)
    assert await statuses(registry, registration.service) == {registration.service_id: "critical"}
    for status in ("passing", "warning", "critical", "passing"):
        assert await registry.heartbeat(registration.service_id, status, "a note")
        assert await statuses(registry, registration.service) == {registration.service_id: status}


async def test_registering_again_replaces_metadata_and_keeps_one_instance(
    registry: Registry, registration: Registration
) -> None:
    await registry.register(registration, "passing")
    await registry.register(replace(registration, meta={"draining": "yes"}, port=7001), "passing")
    (entry,) = (await registry.services(registration.service)).entries
    assert (entry.meta, entry.port, entry.status) == ({"draining": "yes"}, 7001, "passing")


async def test_a_heartbeat_for_an_unknown_instance_is_false(
    registry: Registry, service: str
) -> None:
    for status in ("passing", "warning", "critical"):
        assert not await registry.heartbeat(f"{service}:nobody", status)


async def test_deregistering_is_idempotent(registry: Registry, registration: Registration) -> None:
    await registry.register(registration)
    await registry.deregister(registration.service_id)
    await registry.deregister(registration.service_id)
    assert await statuses(registry, registration.service) == {}
    assert not await registry.heartbeat(registration.service_id, "passing")


async def test_a_waiting_query_wakes_on_registration_health_and_deregistration(
    registry: Registry, registration: Registration
) -> None:
    service = registration.service
    snapshot = await registry.services(service)

    async def after(change: asyncio.Future[object]) -> Snapshot:
        waiting = asyncio.create_task(wait_for_change(registry, snapshot, service))
        await change
        return await asyncio.wait_for(waiting, WAIT_S / 2)

    snapshot = await after(asyncio.ensure_future(registry.register(registration, "passing")))
    assert [entry.status for entry in snapshot.entries] == ["passing"]
    snapshot = await settled(registry, service)
    beat = registry.heartbeat(registration.service_id, "critical")
    snapshot = await after(asyncio.ensure_future(beat))
    assert [entry.status for entry in snapshot.entries] == ["critical"]
    snapshot = await settled(registry, service)
    gone = registry.deregister(registration.service_id)
    snapshot = await after(asyncio.ensure_future(gone))
    assert snapshot.entries == ()


async def test_a_heartbeat_that_changes_only_the_note_wakes_nobody(
    registry: Registry, registration: Registration
) -> None:
    await registry.register(registration, "passing")
    snapshot = await settled(registry, registration.service)
    for note in ("one", "two", "three"):
        assert await registry.heartbeat(registration.service_id, "passing", note)
    later = await registry.services(registration.service, wait_index=snapshot.index, wait_s=0.2)
    assert later == snapshot


async def test_a_wait_without_news_ends_with_the_same_answer(
    registry: Registry, registration: Registration
) -> None:
    await registry.register(registration, "passing")
    snapshot = await settled(registry, registration.service)
    assert snapshot == await registry.services(
        registration.service, wait_index=snapshot.index, wait_s=0.1
    )


async def test_an_index_from_another_life_is_answered_with_the_present_one(
    registry: Registry, registration: Registration
) -> None:
    await registry.register(registration, "passing")
    later = await registry.services(registration.service, wait_index=10**12, wait_s=0.2)
    assert later.index < 10**12
    assert [entry.service_id for entry in later.entries] == [registration.service_id]


async def test_without_heartbeats_an_instance_turns_critical(
    registry: Registry, registration: Registration
) -> None:
    other = replace(registration, service_id=f"{registration.service}:b")
    await registry.register(other, "passing")
    snapshot = await settled(registry, registration.service)
    await registry.register(replace(registration, ttl_s=0.6), "passing")
    while len(snapshot.entries) < 2 or snapshot.entries[0].status == "passing":
        snapshot = await wait_for_change(registry, snapshot, registration.service)
    assert [entry.status for entry in snapshot.entries] == ["critical", "passing"]
    assert await registry.heartbeat(registration.service_id, "passing")
    assert (await statuses(registry, registration.service))[registration.service_id] == "passing"


@pytest.mark.parametrize(
    "meta",
    [
        {"sp ace": "x"},
        {"": "x"},
        {"k": "x" * 513},
        {"k" * 129: "x"},
        {f"k{n}": "x" for n in range(65)},
        {"consul-thing": "x"},
    ],
)
async def test_impossible_metadata_is_refused_for_good(
    registry: Registry, registration: Registration, meta: dict[str, str]
) -> None:
    with pytest.raises(PeerError) as caught:
        await registry.register(replace(registration, meta=meta))
    assert caught.value.code == "registry_unavailable"
    assert not caught.value.retryable
    assert await statuses(registry, registration.service) == {}


async def test_metadata_at_its_limits_is_taken(
    registry: Registry, registration: Registration
) -> None:
    meta = {f"{n:02d}" + "k" * 126: "x" * 512 for n in range(64)}
    await registry.register(replace(registration, meta=meta))
    (entry,) = (await registry.services(registration.service)).entries
    assert entry.meta == meta


# ---- keys and values -----------------------------------------------------------------------------


async def test_keys_come_and_go(registry: Registry, service: str) -> None:
    key = f"{service}/topology/node a%2Fb?"
    assert await registry.kv_get(key) is None
    await registry.kv_put(key, b"first")
    first = await registry.kv_get(key)
    assert first is not None
    assert first == KvEntry(key, b"first", first.index)
    await registry.kv_put(key, b"\x00\xff second")
    second = await registry.kv_get(key)
    assert second is not None
    assert second.value == b"\x00\xff second"
    assert second.index > first.index
    await registry.kv_delete(key)
    await registry.kv_delete(key)
    assert await registry.kv_get(key) is None


async def test_an_empty_value_is_a_value(registry: Registry, service: str) -> None:
    await registry.kv_put(service, b"")
    entry = await registry.kv_get(service)
    assert entry is not None
    assert entry.value == b""


async def test_keys_are_listed_by_prefix_in_order(registry: Registry, service: str) -> None:
    for name in ("b", "a/2", "a/1", "ab"):
        await registry.kv_put(f"{service}/{name}", name.encode())
    listed = await registry.kv_list(f"{service}/a")
    assert [entry.key for entry in listed.entries] == [
        f"{service}/a/1",
        f"{service}/a/2",
        f"{service}/ab",
    ]
    assert [entry.value for entry in listed.entries] == [b"a/1", b"a/2", b"ab"]
    assert (await registry.kv_list(f"{service}/none/")).entries == ()


async def test_a_waiting_list_wakes_on_put_and_delete(registry: Registry, service: str) -> None:
    prefix = f"{service}/"
    listed = await registry.kv_list(prefix)
    for change, expected in (
        (registry.kv_put(f"{prefix}a", b"1"), [b"1"]),
        (registry.kv_put(f"{prefix}a", b"2"), [b"2"]),
        (registry.kv_delete(f"{prefix}a"), []),
    ):

        async def wait_for_news(known: tuple[KvEntry, ...], index: int) -> tuple[KvEntry, ...]:
            entries = known
            while entries == known:
                later = await registry.kv_list(prefix, wait_index=index, wait_s=WAIT_S)
                index, entries = later.index, later.entries
            return entries

        waiting = asyncio.create_task(wait_for_news(listed.entries, listed.index))
        await change
        entries = await asyncio.wait_for(waiting, WAIT_S / 2)
        assert [entry.value for entry in entries] == expected
        listed = await registry.kv_list(prefix)


async def test_a_value_over_the_limit_is_refused(registry: Registry, service: str) -> None:
    await registry.kv_put(service, bytes(512 * 1024))
    with pytest.raises(PeerError) as caught:
        await registry.kv_put(service, bytes(512 * 1024 + 1))
    assert not caught.value.retryable


# ---- the registry itself -------------------------------------------------------------------------


async def test_leader_and_datacenter(registry: Registry) -> None:
    assert (await registry.leader()).startswith("127.0.0.1:")
    assert await registry.datacenter() == "local"


async def test_the_named_datacenter_is_read_and_an_unknown_one_is_an_error(
    registry_url: str, registration: Registration
) -> None:
    async with Registry.connect(f"{registry_url}?dc=local&token=secret") as local:
        await local.register(registration)
        assert len((await local.services(registration.service)).entries) == 1
    async with Registry.connect(f"{registry_url}?dc=elsewhere") as elsewhere:
        with pytest.raises(PeerError):
            await elsewhere.services(registration.service)
