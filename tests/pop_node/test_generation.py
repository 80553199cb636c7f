"""A generation keeps to itself: its doors close with it, and its slots concern its engine alone."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from pop_node.engine.config import EngineConfig
from pop_node.engine.messages import Ready
from pop_node.hosting.generation import Generation, HostSettings
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.address import Dialer
from wire.errors import ConfigError

SPEC = KvSpec((KvGroup("tokens", (0,), (KvComponent("k", "float32", (1, 4)),)),))
READY = Ready(1, 16, 4, 64, "reference", SPEC.to_dict(), {})


def a_generation() -> Generation:
    settings = HostSettings(
        mesh="m",
        node="n",
        site="s",
        incarnation="i",
        model="model",
        identity="x",
        engine=EngineConfig(Path("none"), "float32", "reference", 1, 64),
        kv_host="127.0.0.1",
        kv_port=0,
        dialer=Dialer(),
        server_ssl=None,
        client_ssl=None,
        authorize_peer=lambda name, ssl_object: None,
        detection_s=5.0,
    )
    return Generation(settings, lambda transfer, event: None)


async def test_an_engine_that_dies_while_its_doors_open_leaves_none_open() -> None:
    first = a_generation()
    opening = asyncio.create_task(first.open_doors(READY, 0))
    await asyncio.sleep(0)  # it has begun
    closing = asyncio.create_task(first.close())
    port = await opening
    await closing
    assert port
    second = a_generation()
    assert await second.open_doors(READY, port) == port
    await second.close()
    await second.close()


async def test_doors_of_a_closed_generation_stay_closed() -> None:
    generation = a_generation()
    await generation.close()
    assert await generation.open_doors(READY, 0) is None


async def test_a_taken_port_is_a_mistake_of_the_configuration() -> None:
    generation = a_generation()
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ConfigError, match="cannot listen"):
        await generation.open_doors(READY, taken.getsockname()[1])
    await generation.close()


def test_staging_closes_while_somebody_still_looks_at_a_slot() -> None:
    staging = Staging.create(StagingLayout(slot_bytes=4096, export_slots=1, import_slots=1))
    view = staging.slot(0)
    staging.close()
    view[0] = 7
    assert view[0] == 7
    view.release()
