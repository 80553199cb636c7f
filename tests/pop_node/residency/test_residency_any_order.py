"""Which models are in memory: any order of events over a node that obeys."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pop_node.residency import events as ev
from pop_node.residency.residency import Residency

GB = 10**9
SIZES = {"a": 3, "b": 4, "c": 5, "d": 2, "e": 6, "f": 9}
PINNED = {"d"}
BUDGET = 8
models = st.sampled_from(sorted(SIZES))


class AnyOrder(RuleBasedStateMachine):
    """A node that carries out what the machine says, when it likes, and does not always succeed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.waiting: dict[str, float] = {}
        self.legs = dict.fromkeys(SIZES, 0)
        self.held: dict[str, float] = {}
        self.fetching: set[str] = set()
        self.arriving: set[str] = set()
        self.engines: dict[str, str] = {}  # starting, ready, ending
        self.drilled: set[str] = set()
        self.disk: set[str] = set()
        self.told: set[str] = set()  # what the machine heard to be on the disk
        self.node = Residency(
            list(SIZES), pinned=PINNED, fetchable="abde", budget_bytes=BUDGET * GB
        )

    @initialize(there=st.sets(models))
    def start(self, there: set[str]) -> None:
        for model in there:
            self.fetched(model)
        self.feed(ev.Started())

    def fetched(self, model: str) -> None:
        self.disk.add(model)
        self.told.add(model)
        self.feed(ev.Fetched(model, SIZES[model] * GB, GB))

    def look(self, model: str) -> None:
        """As a node does when an engine has ended: is its bundle still there?"""
        if model not in self.disk:
            self.told.discard(model)
            self.feed(ev.Gone(model))

    def feed(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.node.handle(event, self.now)
        for effect in effects:
            model = effect.model
            match effect:
                case ev.Fetch():
                    assert model not in self.fetching | self.disk
                    self.fetching.add(model)
                case ev.Load():
                    assert model in self.told | self.arriving
                    assert model not in self.engines
                    assert model not in self.drilled
                    self.engines[model] = "starting"
                case ev.Unload():
                    assert self.engines[model] in ("starting", "ready")
                    if self.engines[model] == "ready" and model in self.drilled:
                        assert not self.legs[model], "a drill waits for legs"
                    elif self.engines[model] == "ready":
                        assert model not in PINNED
                        assert not self.legs[model], "one with legs is unloaded"
                        assert self.held.get(model, -1.0) <= self.now, "a lease is broken"
                    self.engines[model] = "ending"
                case ev.Refuse():
                    del self.waiting[model]
        return effects

    @rule(model=models, wait_s=st.floats(0.5, 50))
    def want(self, model: str, wait_s: float) -> None:
        serves = self.engines.get(model) == "ready" and model not in self.drilled
        if not serves:
            self.waiting[model] = max(self.waiting.get(model, 0.0), self.now + wait_s)
        why = self.node.why_refused(model, self.now)
        self.feed(ev.Wanted(model, self.now + wait_s))
        assert bool(why) == (model not in self.waiting and not serves)

    @rule(model=models, hold_s=st.floats(0.5, 50))
    def hold(self, model: str, hold_s: float) -> None:
        if not self.node.why_refused(model, self.now):
            self.held[model] = max(self.held.get(model, 0.0), self.now + hold_s)
        self.feed(ev.Held(model, self.now + hold_s))

    @rule(model=models, count=st.integers(0, 2))
    def legs_change(self, model: str, count: int) -> None:
        if self.engines.get(model) == "ready":
            self.legs[model] = count
            self.feed(ev.Legs(model, count))

    @rule(model=models)
    def drill(self, model: str) -> None:
        """Takes one down that serves, and brings back one that it took down before."""
        if model in self.drilled:
            self.drilled.remove(model)
            self.feed(ev.BringBack(model))
        elif self.engines.get(model) == "ready":
            self.drilled.add(model)
            self.feed(ev.TakeDown(model))

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), works=st.booleans())
    def fetch_ends(self, data: st.DataObject, works: bool) -> None:
        model = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.remove(model)
        self.arriving.discard(model)
        if works:
            self.fetched(model)
        else:
            self.feed(ev.FetchFailed(model, "a broken line"))

    @precondition(lambda self: self.fetching - PINNED)
    @rule(data=st.data())
    def fetch_is_put_off(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.fetching - PINNED)))
        self.fetching.remove(model)
        self.arriving.discard(model)
        self.feed(ev.PutOff(model))

    @precondition(lambda self: self.fetching - self.arriving)
    @rule(data=st.data())
    def enough_is_there(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.fetching - self.arriving)))
        self.arriving.add(model)
        self.feed(ev.Arriving(model, SIZES[model] * GB, GB))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), works=st.booleans())
    def engine_moves(self, data: st.DataObject, works: bool) -> None:
        self.engine_moves_on(data.draw(st.sampled_from(sorted(self.engines))), works=works)

    def engine_moves_on(self, model: str, *, works: bool) -> None:
        match self.engines[model]:
            case "ending":
                del self.engines[model]
                self.legs[model] = 0
                self.feed(ev.Left(model))
                self.look(model)
            case "starting" if works and model in self.disk:
                self.engines[model] = "ready"
                self.waiting.pop(model, None)
                self.feed(ev.Ready(model, 1.0))
            case "starting":
                self.feed(ev.Exited(model))
                self.look(model)
            case "ready" if not works:
                self.engines[model] = "starting"
                self.feed(ev.Exited(model))
                self.legs[model] = 0
                self.feed(ev.Legs(model, 0))

    @rule(model=models, by_the_node=st.booleans())
    def collected(self, model: str, by_the_node: bool) -> None:
        """Whatever no engine holds may go; what others remove, nobody says."""
        if model in self.disk and self.engines.get(model) != "ready":
            self.disk.remove(model)
            if by_the_node:
                self.look(model)

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (at := self.node.next_deadline()) is not None and at <= until:
            self.now = max(self.now, at)
            self.feed(ev.Tick())
        self.now = until

    @invariant()
    def never_over_the_budget(self) -> None:
        assert sum(SIZES[model] for model in self.engines) <= BUDGET
        assert self.node.resident_bytes == sum(SIZES[model] for model in self.engines) * GB
        assert self.node.committed_bytes <= BUDGET * GB

    @invariant()
    def nothing_loads_what_is_known_not_to_come(self) -> None:
        loading = {model for model, how in self.engines.items() if how == "starting"}
        assert loading <= self.told | self.arriving

    @invariant()
    def whoever_waits_has_a_deadline(self) -> None:
        at = self.node.next_deadline()
        assert not self.waiting or (at is not None and at <= min(self.waiting.values()))

    def teardown(self) -> None:
        """Once the node obeys in time, everybody is served or told; pinned ones come back."""
        self.time_passes(max([0.0, *self.held.values()]))  # no lease runs any more
        for model in SIZES:
            if model in self.drilled:
                self.drill(model)
            if self.legs[model]:
                self.legs_change(model, 0)
        for _ in range(200):
            self.obey()
            if not self.fetching and set(self.engines.values()) <= {"ready"}:
                at = self.node.next_deadline()
                if at is not None:
                    self.time_passes(max(0.0, at - self.now))
                elif set(self.engines) >= PINNED:
                    break
                else:
                    self.feed(ev.Tick())
        else:
            raise AssertionError(f"no rest: {self.engines}, {self.fetching} on the way")
        assert not self.waiting, "somebody waits for ever"
        assert all(self.node.state(m).memory in ("out", "warm") for m in SIZES)

    def obey(self) -> None:
        """Every engine and every fetch gets as far as it can."""
        for model, how in list(self.engines.items()):
            if how != "ready":
                self.engine_moves_on(model, works=True)
        for model in list(self.fetching):
            self.fetching.remove(model)
            self.arriving.discard(model)
            self.fetched(model)


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
