"""The embedded registry's state under a clock that the test owns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from registry.entries import KvSnapshot, Snapshot, Status
from registry.state import (
    MIN_DEREGISTER_AFTER_S,
    DeleteKey,
    DeregisterService,
    Limits,
    PutKey,
    Refused,
    RegisterService,
    RegistryState,
    TtlCheck,
    UpdateCheck,
)


def register(
    service_id: str = "a",
    service: str = "s",
    *,
    ttl_s: float = 10.0,
    status: Status | None = None,
    after_s: float | None = 90.0,
) -> RegisterService:
    check = TtlCheck(ttl_s, status, after_s)
    return RegisterService(service_id, service, "192.0.2.1", 1, {}, check)


def health(state: RegistryState, service: str = "s") -> dict[str, Status]:
    return {entry.service_id: entry.status for entry in state.service(service).entries}


def test_a_ttl_runs_from_the_last_heartbeat() -> None:
    state = RegistryState()
    state.handle(register(), 0.0)
    assert health(state) == {"a": "critical"}
    state.handle(UpdateCheck("a", "passing", "well"), 4.0)
    assert state.next_deadline() == 14.0
    state.expire(13.9)
    assert health(state) == {"a": "passing"}
    index = state.index
    state.expire(14.0)
    assert health(state) == {"a": "critical"}
    assert state.note("a") == "TTL expired"
    assert state.index == index + 1
    assert state.service("s").index == state.index


def test_a_warning_expires_as_well() -> None:
    state = RegistryState()
    state.handle(register(status="warning"), 0.0)
    state.expire(10.0)
    assert health(state) == {"a": "critical"}


def test_an_instance_critical_for_too_long_is_forgotten() -> None:
    state = RegistryState()
    state.handle(register(status="passing", after_s=90.0), 0.0)
    state.expire(50.0)  # late: it has been critical since 10
    assert state.next_deadline() == 100.0
    state.expire(99.9)
    assert health(state) == {"a": "critical"}
    state.expire(100.0)
    assert health(state) == {}
    assert state.next_deadline() is None
    refused = state.handle(UpdateCheck("a", "passing", ""), 100.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "unknown_check"


def test_critical_heartbeats_do_not_put_off_the_end_but_others_do() -> None:
    state = RegistryState()
    state.handle(register(status="critical", after_s=60.0), 0.0)
    for now in (8.0, 16.0, 24.0, 32.0):
        state.handle(UpdateCheck("a", "critical", "still"), now)
    state.handle(register(status="critical", after_s=60.0), 35.0)
    state.handle(UpdateCheck("a", "critical", "still"), 40.0)
    state.expire(59.9)
    assert health(state) == {"a": "critical"}
    state.handle(UpdateCheck("a", "passing", ""), 59.95)
    state.expire(69.95)
    assert state.next_deadline() == pytest.approx(69.95 + 60.0)


def test_an_end_sooner_than_consuls_least_is_put_off_to_it() -> None:
    state = RegistryState()
    state.handle(register(after_s=1.0), 0.0)
    state.expire(MIN_DEREGISTER_AFTER_S - 0.1)
    assert health(state) == {"a": "critical"}
    state.expire(MIN_DEREGISTER_AFTER_S)
    assert health(state) == {}


def test_without_an_end_a_critical_instance_stays() -> None:
    state = RegistryState()
    state.handle(register(after_s=None), 0.0)
    state.expire(1e9)
    assert health(state) == {"a": "critical"}
    assert state.next_deadline() is None


def test_without_a_check_an_instance_is_passing_for_ever() -> None:
    state = RegistryState()
    state.handle(RegisterService("a", "s", "192.0.2.1", 1, {}, None), 0.0)
    assert health(state) == {"a": "passing"}
    assert state.next_deadline() is None
    assert isinstance(state.handle(UpdateCheck("a", "passing", ""), 1.0), Refused)


def test_registering_again_keeps_the_health_unless_it_says_one() -> None:
    state = RegistryState()
    state.handle(register(status="passing"), 0.0)
    index = state.index
    state.handle(register(), 5.0)
    assert health(state) == {"a": "passing"}
    assert state.index == index, "nothing that anybody can see has changed"
    assert state.next_deadline() == 15.0
    state.handle(register(status="warning"), 6.0)
    assert health(state) == {"a": "warning"}
    assert state.index == index + 1


def test_an_instance_that_changes_its_service_leaves_the_old_one() -> None:
    state = RegistryState()
    state.handle(register(service="old"), 0.0)
    before = state.service("old")
    state.handle(register(service="new"), 1.0)
    assert state.service("old").entries == ()
    assert state.service("old").index > before.index
    assert health(state, "new") == {"a": "critical"}


def test_other_services_do_not_move_an_index() -> None:
    state = RegistryState()
    state.handle(register(), 0.0)
    before = state.service("s")
    state.handle(register("b", "other"), 1.0)
    state.handle(PutKey("k", b"v"), 1.0)
    assert state.service("s") == before


def test_bounds_refuse_what_is_new_and_let_the_rest_go_on() -> None:
    state = RegistryState(Limits(max_services=2, max_keys=2, max_value_bytes=4, max_kv_bytes=6))
    for service_id in ("a", "b"):
        assert state.handle(register(service_id), 0.0) is None
    refused = state.handle(register("c"), 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "full"
    assert state.handle(register("b", status="passing"), 0.0) is None
    state.handle(DeregisterService("a"), 0.0)
    assert state.handle(register("c"), 0.0) is None

    def put(key: str, value: bytes) -> str | None:
        outcome = state.handle(PutKey(key, value), 0.0)
        return None if outcome is None else outcome.reason

    assert put("x", b"12345") == "too_large"
    assert put("x", b"1234") is None
    assert put("y", b"1234") == "full"
    assert put("y", b"12") is None
    assert put("z", b"") == "full"
    assert put("x", b"12") is None
    assert put("y", b"1234") is None
    state.handle(DeleteKey("x"), 0.0)
    assert put("z", b"12") is None


@dataclass
class ModelInstance:
    service: str
    ttl_s: float
    beat_at: float
    said: Status
    critical_at: float | None


class StateAgainstModel(RuleBasedStateMachine):
    """Random commands and pauses; a naive model says what must be there.

    The index is held to its promise: whoever waits for a higher one misses no change of content.
    """

    IDS = ("a", "b", "c")
    SERVICES = ("s", "t")
    KEYS = ("k", "k/1", "k/2", "l")
    AFTER_S = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.state = RegistryState()
        self.now = 0.0
        self.instances: dict[str, ModelInstance] = {}
        self.keys: dict[str, bytes] = {}
        self.seen_services: dict[str, Snapshot] = {}
        self.seen_keys: dict[str, KvSnapshot] = {}

    def model_health(self) -> dict[str, tuple[str, Status]]:
        return {
            service_id: (
                each.service,
                "critical" if self.now >= each.beat_at + each.ttl_s else each.said,
            )
            for service_id, each in self.instances.items()
        }

    def settle(self) -> None:
        for service_id, each in list(self.instances.items()):
            if each.critical_at is None and self.now >= each.beat_at + each.ttl_s:
                each.critical_at = each.beat_at + each.ttl_s
            if each.critical_at is not None and self.now >= each.critical_at + self.AFTER_S:
                del self.instances[service_id]

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 20.0, 61.0]), in_time=st.booleans())
    def pass_time(self, seconds: float, in_time: bool) -> None:
        end = self.now + seconds
        deadline = self.state.next_deadline()
        while in_time and deadline is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.state.expire(self.now)
            after = self.state.next_deadline()
            assert after is None or after > deadline, "the timer would spin"
            deadline = after
        self.now = end
        self.state.expire(self.now)
        self.settle()

    @rule(
        service_id=st.sampled_from(IDS),
        service=st.sampled_from(SERVICES),
        ttl_s=st.sampled_from([1.0, 5.0]),
        status=st.sampled_from(["passing", "warning", "critical"]),
    )
    def register(self, service_id: str, service: str, ttl_s: float, status: Status) -> None:
        command = register(service_id, service, ttl_s=ttl_s, status=status, after_s=self.AFTER_S)
        assert self.state.handle(command, self.now) is None
        known = self.instances.get(service_id)
        kept = known.critical_at if known is not None and known.service == service else None
        critical_at = None if status != "critical" else self.now if kept is None else kept
        self.instances[service_id] = ModelInstance(service, ttl_s, self.now, status, critical_at)

    @rule(
        service_id=st.sampled_from(IDS),
        status=st.sampled_from(["passing", "warning", "critical"]),
        note=st.text(max_size=3),
    )
    def heartbeat(self, service_id: str, status: Status, note: str) -> None:
        outcome = self.state.handle(UpdateCheck(service_id, status, note), self.now)
        known = self.instances.get(service_id)
        assert (outcome is None) == (known is not None)
        if known is not None:
            known.beat_at, known.said = self.now, status
            if status != "critical":
                known.critical_at = None
            elif known.critical_at is None:
                known.critical_at = self.now

    @rule(service_id=st.sampled_from(IDS))
    def deregister(self, service_id: str) -> None:
        assert self.state.handle(DeregisterService(service_id), self.now) is None
        self.instances.pop(service_id, None)

    @rule(key=st.sampled_from(KEYS), value=st.binary(max_size=2))
    def put(self, key: str, value: bytes) -> None:
        assert self.state.handle(PutKey(key, value), self.now) is None
        self.keys[key] = value

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        assert self.state.handle(DeleteKey(key), self.now) is None
        self.keys.pop(key, None)

    @invariant()
    def content_is_that_of_the_model(self) -> None:
        for service in self.SERVICES:
            entries = self.state.service(service).entries
            expected = {k: v[1] for k, v in self.model_health().items() if v[0] == service}
            assert {entry.service_id: entry.status for entry in entries} == expected
        for prefix in ("", "k", "k/", "l", "z"):
            entries = self.state.keys(prefix).entries
            assert {entry.key: entry.value for entry in entries} == {
                key: value for key, value in self.keys.items() if key.startswith(prefix)
            }
        for key in self.KEYS:
            values = [entry.value for entry in self.state.key(key).entries]
            assert values == ([self.keys[key]] if key in self.keys else [])

    @invariant()
    def whoever_waits_misses_nothing(self) -> None:
        for service in (*self.SERVICES, "never"):
            present = self.state.service(service)
            before = self.seen_services.setdefault(service, present)
            assert before.index <= present.index <= self.state.index
            assert present.index > before.index or present.entries == before.entries
            self.seen_services[service] = present
        for prefix in ("", "k", "k/", "l", "z"):
            listed = self.state.keys(prefix)
            known = self.seen_keys.setdefault(prefix, listed)
            assert known.index <= listed.index <= self.state.index
            assert listed.index > known.index or listed.entries == known.entries
            self.seen_keys[prefix] = listed


StateAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestStateAgainstModel = StateAgainstModel.TestCase
