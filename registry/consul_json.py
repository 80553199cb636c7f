"""Consul's JSON, from the server's side: registrations in, health and keys out.

Owns the formats of the embedded registry's HTTP API and the rules for what a registration may say;
a body that breaks them is a ``ValueError``.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import msgspec

from registry.entries import KvSnapshot, Status
from registry.state import RegisterService, RegistryState, TtlCheck, UpdateCheck

DATACENTER = "local"
NODE = "embedded"

# Source of the metadata's limits: Consul documentation, service registration.
MAX_META_PAIRS = 64
MAX_META_VALUE_CHARS = 512
_META_KEY = re.compile(r"(?!consul-)[A-Za-z0-9_-]{1,128}")

MAX_TTL_S = 86_400.0
"""Longest TTL taken. Guess: an instance that lives a day without a word is a mistake."""

# Go's duration syntax: "1m30s", "1.5s", "250ms".
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", re.ASCII)
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class _Check(msgspec.Struct, rename="lower", forbid_unknown_fields=True):
    ttl: str
    status: Status | None = None
    deregistercriticalserviceafter: str | None = None


class _Registration(msgspec.Struct, rename="lower", forbid_unknown_fields=True):
    name: str
    id: str = ""
    address: str = ""
    port: int = 0
    meta: dict[str, str] = {}
    check: _Check | None = None
    checks: list[_Check] = []


class _CheckUpdate(msgspec.Struct, rename="lower", forbid_unknown_fields=True):
    status: Status
    output: str = ""


def parse_duration_s(text: str) -> float:
    """Go's duration syntax -> seconds; raises ``ValueError``."""
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"invalid duration {text!r}")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def parse_registration(body: bytes) -> RegisterService:
    """The body of ``/v1/agent/service/register``; at most one check, and only a TTL check."""
    said = msgspec.convert(_lower_keys(json.loads(body)), _Registration)
    if not said.name:
        raise ValueError("Missing service name")
    if not 0 <= said.port <= 65535:
        raise ValueError(f"invalid port {said.port}")
    if len(said.meta) > MAX_META_PAIRS:
        raise ValueError(f"Invalid Service Meta: more than {MAX_META_PAIRS} pairs")
    for key, value in said.meta.items():
        if not _META_KEY.fullmatch(key) or len(value) > MAX_META_VALUE_CHARS:
            raise ValueError(f"Invalid Service Meta: {key[:128]!r}")
    checks = said.checks + ([] if said.check is None else [said.check])
    if len(checks) > 1:
        raise ValueError("the embedded registry takes one check per service")
    return RegisterService(
        service_id=said.id or said.name,
        service=said.name,
        address=said.address,
        port=said.port,
        meta=said.meta,
        check=_ttl_check(checks[0]) if checks else None,
    )


def parse_check_update(service_id: str, body: bytes) -> UpdateCheck:
    """The body of ``/v1/agent/check/update``."""
    said = msgspec.convert(_lower_keys(json.loads(body)), _CheckUpdate)
    return UpdateCheck(service_id, said.status, said.output)


def health(state: RegistryState, name: str) -> tuple[int, list[dict[str, Any]]]:
    """The answer of ``/v1/health/service``, with its index."""
    snapshot = state.service(name)
    return snapshot.index, [
        {
            "Node": {"Node": NODE, "Address": "127.0.0.1", "Datacenter": DATACENTER},
            "Service": {
                "ID": entry.service_id,
                "Service": entry.service,
                "Tags": [],
                "Address": entry.address,
                "Meta": dict(entry.meta),
                "Port": entry.port,
            },
            "Checks": [
                {
                    "Node": NODE,
                    "CheckID": f"service:{entry.service_id}",
                    "Name": f"Service '{entry.service}' check",
                    "Status": entry.status,
                    "Output": state.note(entry.service_id),
                    "ServiceID": entry.service_id,
                    "ServiceName": entry.service,
                    "Type": "ttl",
                }
            ],
        }
        for entry in snapshot.entries
    ]


def keys(snapshot: KvSnapshot) -> tuple[int, list[dict[str, Any]]]:
    """The answer of ``/v1/kv``, with its index; an empty value is null there."""
    return snapshot.index, [
        {
            "LockIndex": 0,
            "Key": entry.key,
            "Flags": 0,
            "Value": base64.b64encode(entry.value).decode() or None,
            "CreateIndex": entry.index,
            "ModifyIndex": entry.index,
        }
        for entry in snapshot.entries
    ]


def agent_self() -> dict[str, Any]:
    """The answer of ``/v1/agent/self``."""
    return {"Config": {"Datacenter": DATACENTER, "NodeName": NODE, "Server": True}}


def _ttl_check(check: _Check) -> TtlCheck:
    ttl_s = parse_duration_s(check.ttl)
    if not 0 < ttl_s <= MAX_TTL_S:
        raise ValueError(f"a TTL of {check.ttl}")
    after = check.deregistercriticalserviceafter
    return TtlCheck(ttl_s, check.status, parse_duration_s(after) if after else None)


def _lower_keys(value: Any) -> Any:
    """Consul matches field names without regard to case or underscores; metadata stays as it is."""
    if isinstance(value, list):
        return [_lower_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    lowered = {key.replace("_", "").lower(): item for key, item in value.items()}
    return {key: item if key == "meta" else _lower_keys(item) for key, item in lowered.items()}
