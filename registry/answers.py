"""Consul's JSON answers as checked values.

Owns the shapes that the client relies on; a registry that answers otherwise is as good as silent
(``msgspec.ValidationError``, which the client maps).
"""

from __future__ import annotations

from typing import Any

import msgspec

from registry.entries import KvEntry, ServiceEntry, Status

_SEVERITY: dict[Status, int] = {"passing": 0, "warning": 1, "critical": 2}


class _Node(msgspec.Struct):
    Address: str


class _Service(msgspec.Struct):
    ID: str
    Service: str
    Address: str
    Port: int
    Meta: dict[str, str] | None = None


class _Check(msgspec.Struct):
    Status: Status


class _Instance(msgspec.Struct):
    Node: _Node
    Service: _Service
    Checks: list[_Check]


class _Key(msgspec.Struct):
    Key: str
    ModifyIndex: int
    Value: bytes | None = None


class _AgentConfig(msgspec.Struct):
    Datacenter: str


class _AgentSelf(msgspec.Struct):
    Config: _AgentConfig


def service_entries(body: Any) -> tuple[ServiceEntry, ...]:
    """The answer of ``/v1/health/service``, ordered by id."""
    entries = map(_entry, msgspec.convert(body, list[_Instance]))
    return tuple(sorted(entries, key=lambda entry: entry.service_id))


def kv_entry(body: Any) -> KvEntry | None:
    """One key of ``/v1/kv``, its value already decoded; None when there was none."""
    return None if body is None else _kv_entry(msgspec.convert(body, _Key))


def kv_entries(body: Any) -> tuple[KvEntry, ...]:
    """A recursive answer of ``/v1/kv`` (None: no key has the prefix), ordered by key."""
    keys = [] if body is None else msgspec.convert(body, list[_Key])
    return tuple(sorted(map(_kv_entry, keys), key=lambda entry: entry.key))


def datacenter(body: Any) -> str:
    """The datacenter named by ``/v1/agent/self``."""
    return msgspec.convert(body, _AgentSelf).Config.Datacenter


def _entry(instance: _Instance) -> ServiceEntry:
    statuses = [check.Status for check in instance.Checks]
    service = instance.Service
    return ServiceEntry(
        service_id=service.ID,
        service=service.Service,
        address=service.Address or instance.Node.Address,
        port=service.Port,
        meta=service.Meta or {},
        status=max(statuses, key=_SEVERITY.__getitem__, default="passing"),
    )


def _kv_entry(key: _Key) -> KvEntry:
    return KvEntry(key.Key, key.Value or b"", key.ModifyIndex)
