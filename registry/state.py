"""The embedded registry's state: services with TTL checks, keys and values, and one index.

Pure: commands and the time in, refusals or changes out. Knows no HTTP and no JSON. Its meaning
follows Consul's, checked by running the same contract tests against both:

- every visible change takes the next index; a heartbeat that changes no status is not one;
- a reading's index is that of the last change that concerns it, deletions included. It never goes
  backwards, but it may move without a change of content;
- an instance that stays critical for ``deregister_after_s`` is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from registry.entries import KvEntry, KvSnapshot, ServiceEntry, Snapshot, Status

MIN_DEREGISTER_AFTER_S = 60.0
"""Least time before a critical instance is forgotten. Source: Consul documentation of
DeregisterCriticalServiceAfter."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one embedded registry: one machine's mesh with room to spare.

    ``max_value_bytes`` is Consul's own; the others are guesses.
    """

    max_services: int = 1024
    max_keys: int = 1024
    max_value_bytes: int = 512 * 1024
    max_kv_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TtlCheck:
    """The check of a registration; ``status`` None keeps the one before (at first: critical)."""

    ttl_s: float
    status: Status | None = None
    deregister_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class RegisterService:
    """Register or replace an instance. Without a check it is passing and never expires."""

    service_id: str
    service: str
    address: str
    port: int
    meta: Mapping[str, str]
    check: TtlCheck | None


@dataclass(frozen=True, slots=True)
class DeregisterService:
    """Forget an instance; an unknown one is no error."""

    service_id: str


@dataclass(frozen=True, slots=True)
class UpdateCheck:
    """A heartbeat: the instance's health, and a note about it."""

    service_id: str
    status: Status
    note: str


@dataclass(frozen=True, slots=True)
class PutKey:
    """Create or replace a key."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class DeleteKey:
    """Delete a key; a missing one is no error."""

    key: str


Command = RegisterService | DeregisterService | UpdateCheck | PutKey | DeleteKey


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a command changed nothing."""

    reason: Literal["unknown_check", "too_large", "full"]
    text: str


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance and its health; times are those of the shell's clock."""

    entry: ServiceEntry
    check: TtlCheck | None
    note: str
    expires_at: float | None
    critical_since: float | None

    @property
    def forget_at(self) -> float | None:
        """When it has been critical for too long."""
        if self.check is None or self.check.deregister_after_s is None:
            return None
        if self.critical_since is None:
            return None
        return self.critical_since + max(self.check.deregister_after_s, MIN_DEREGISTER_AFTER_S)


class RegistryState:
    """Everything an embedded registry knows."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._index = 1
        self._instances: dict[str, Instance] = {}
        # By service name, while it has instances: index of its last change.
        self._service_index: dict[str, int] = {}
        self._last_extinction = 1  # when a service lost its last instance
        self._keys: dict[str, KvEntry] = {}
        self._kv_bytes = 0
        self._last_deletion = 1  # of any key

    @property
    def index(self) -> int:
        """Index of the last visible change; no reading has a higher one."""
        return self._index

    # ---- changing ------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> Refused | None:
        """Carry out one command at time ``now`` (seconds, monotonic)."""
        self.expire(now)
        match command:
            case RegisterService():
                return self._register(command, now)
            case DeregisterService(service_id):
                self._forget(service_id)
                return None
            case UpdateCheck(service_id, status, note):
                return self._update(service_id, status, note, now)
            case PutKey(key, value):
                return self._put(key, value)
            case DeleteKey(key):
                self._delete(key)
                return None

    def expire(self, now: float) -> None:
        """Turn instances critical whose TTL is over, forget those that were so for too long."""
        for service_id, instance in list(self._instances.items()):
            if instance.expires_at is not None and instance.expires_at <= now:
                instance = self._with_health(
                    instance, "critical", "TTL expired", at=instance.expires_at, expires_at=None
                )
                self._store(instance)
            if instance.forget_at is not None and instance.forget_at <= now:
                self._forget(service_id)

    def next_deadline(self) -> float | None:
        """When to call ``expire``; None while nothing can expire."""
        deadlines = [
            at
            for instance in self._instances.values()
            for at in (instance.expires_at, instance.forget_at)
            if at is not None
        ]
        return min(deadlines, default=None)

    def _register(self, command: RegisterService, now: float) -> Refused | None:
        known = self._instances.get(command.service_id)
        if known is None and len(self._instances) >= self._limits.max_services:
            return Refused("full", f"more than {self._limits.max_services} services")
        if known is not None and known.entry.service != command.service:
            self._forget(command.service_id)
            known = None
        entry = ServiceEntry(
            command.service_id,
            command.service,
            command.address,
            command.port,
            dict(command.meta),
            "passing",
        )
        check = command.check
        if check is None:
            self._store(Instance(entry, None, "", None, None))
            return None
        status, note, critical_since = check.status, "", None
        if known is not None and known.check is not None:
            critical_since = known.critical_since
            if status is None:
                status, note = known.entry.status, known.note
        instance = Instance(entry, check, note, None, critical_since)
        expires_at = now + check.ttl_s
        self._store(
            self._with_health(instance, status or "critical", note, at=now, expires_at=expires_at)
        )
        return None

    def _update(self, service_id: str, status: Status, note: str, now: float) -> Refused | None:
        instance = self._instances.get(service_id)
        if instance is None or instance.check is None:
            # Consul 1.8 words it like this; clients recognise it.
            text = f'CheckID "service:{service_id}" does not have associated TTL'
            return Refused("unknown_check", text)
        expires_at = now + instance.check.ttl_s
        self._store(self._with_health(instance, status, note, at=now, expires_at=expires_at))
        return None

    def _with_health(
        self, instance: Instance, status: Status, note: str, *, at: float, expires_at: float | None
    ) -> Instance:
        since = None
        if status == "critical":
            since = at if instance.critical_since is None else instance.critical_since
        return replace(
            instance,
            entry=replace(instance.entry, status=status),
            note=note,
            expires_at=expires_at,
            critical_since=since,
        )

    def _store(self, instance: Instance) -> None:
        """Keep an instance; a new index only if others can see a difference."""
        entry = instance.entry
        known = self._instances.get(entry.service_id)
        self._instances[entry.service_id] = instance
        if known is None or known.entry != entry:
            self._index += 1
            self._service_index[entry.service] = self._index

    def _forget(self, service_id: str) -> None:
        instance = self._instances.pop(service_id, None)
        if instance is None:
            return
        self._index += 1
        name = instance.entry.service
        if any(other.entry.service == name for other in self._instances.values()):
            self._service_index[name] = self._index
        else:
            del self._service_index[name]
            self._last_extinction = self._index

    def _put(self, key: str, value: bytes) -> Refused | None:
        limits = self._limits
        if len(value) > limits.max_value_bytes:
            return Refused("too_large", f"a value of more than {limits.max_value_bytes} bytes")
        known = self._keys.get(key)
        if known is None and len(self._keys) >= limits.max_keys:
            return Refused("full", f"more than {limits.max_keys} keys")
        kv_bytes = self._kv_bytes + len(value) - (0 if known is None else len(known.value))
        if kv_bytes > limits.max_kv_bytes:
            return Refused("full", f"values of more than {limits.max_kv_bytes} bytes")
        if known is None or known.value != value:
            self._index += 1
            self._keys[key] = KvEntry(key, value, self._index)
            self._kv_bytes = kv_bytes
        return None

    def _delete(self, key: str) -> None:
        known = self._keys.pop(key, None)
        if known is not None:
            self._index += 1
            self._kv_bytes -= len(known.value)
            self._last_deletion = self._index

    # ---- reading -------------------------------------------------------------------------------

    def service(self, name: str) -> Snapshot:
        """All instances of a service."""
        entries = [i.entry for i in self._instances.values() if i.entry.service == name]
        entries.sort(key=lambda entry: entry.service_id)
        return Snapshot(self._service_index.get(name, self._last_extinction), tuple(entries))

    def note(self, service_id: str) -> str:
        """What the last heartbeat of an instance said; empty for an unknown one."""
        instance = self._instances.get(service_id)
        return "" if instance is None else instance.note

    def key(self, key: str) -> KvSnapshot:
        """One key, or none."""
        return self._keys_where(lambda name: name == key)

    def keys(self, prefix: str) -> KvSnapshot:
        """All keys that start with ``prefix``."""
        return self._keys_where(lambda name: name.startswith(prefix))

    def _keys_where(self, wanted: Callable[[str], bool]) -> KvSnapshot:
        entries = [entry for name, entry in sorted(self._keys.items()) if wanted(name)]
        index = max((entry.index for entry in entries), default=1)
        return KvSnapshot(max(index, self._last_deletion), tuple(entries))
