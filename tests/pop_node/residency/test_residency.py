"""Which models are in memory: examples, then any order of events over a node that obeys."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pop_node.residency import events as ev
from pop_node.residency.residency import MAX_FAILURES, RETRY_FIRST_S, Residency

GB = 10**9


def on_disk(*sizes: int, budget: int | None, pinned: tuple[str, ...] = ()) -> Residency:
    """Models a, b, … of so many GB that are on the disk, with the node not started yet."""
    names = "abcdefgh"[: len(sizes)]
    node = Residency(
        list(names), pinned=pinned, budget_bytes=None if budget is None else budget * GB
    )
    for name, size in zip(names, sizes, strict=True):
        assert node.handle(ev.Fetched(name, size * GB, size * GB), 0.0) == []
    return node


def warm(node: Residency, now: float, *models: str) -> None:
    for model in models:
        node.handle(ev.Ready(model, 3.0), now)


def test_what_fits_is_loaded_first_pinned_before_the_others() -> None:
    assert on_disk(4, 4, 1, budget=6).handle(ev.Started(), 0.0) == [ev.Load("a"), ev.Load("c")]
    node = on_disk(4, 4, 1, budget=6, pinned=("b",))
    assert node.handle(ev.Started(), 0.0) == [ev.Load("b"), ev.Load("c")]
    node = on_disk(4, 4, 1, budget=None)
    assert node.handle(ev.Started(), 0.0) == [ev.Load("a"), ev.Load("b"), ev.Load("c")]


def test_a_wanted_model_takes_the_place_of_the_least_recently_used() -> None:
    node = on_disk(4, 4, 4, budget=8)
    node.handle(ev.Started(), 0.0)
    warm(node, 3.0, "a", "b")
    node.handle(ev.Legs("a", 1), 4.0)
    node.handle(ev.Legs("a", 0), 5.0)
    assert node.handle(ev.Wanted("c", 60.0), 6.0) == [ev.Unload("b")]
    assert node.handle(ev.Wanted("c", 60.0), 6.0) == []
    assert node.state("c").memory == "queued"
    assert node.handle(ev.Left("b"), 7.0) == [ev.Load("c")]
    assert node.handle(ev.Ready("c", 2.0), 9.0) == []
    assert node.state("c").last_load_s == 2.0


def test_no_more_leave_than_have_to() -> None:
    node = on_disk(1, 6, 6, budget=8)
    node.handle(ev.Started(), 0.0)
    warm(node, 1.0, "a")
    warm(node, 2.0, "b")
    # a is the oldest, but b alone makes the room, and a alone does not.
    assert node.handle(ev.Wanted("c", 60.0), 6.0) == [ev.Unload("b")]


def test_legs_leases_and_pins_protect_and_the_refusal_says_when_to_come_back() -> None:
    node = on_disk(4, 4, budget=4)
    node.handle(ev.Started(), 0.0)
    assert "in use" in node.why_refused("b", 1.0)  # a is being loaded
    warm(node, 3.0, "a")
    assert node.why_refused("b", 3.0) == ""
    node.handle(ev.Legs("a", 2), 3.0)
    (refusal,) = node.handle(ev.Wanted("b", 60.0), 4.0)
    assert isinstance(refusal, ev.Refuse)
    assert refusal.retry_after_s > 0
    node.handle(ev.Legs("a", 0), 5.0)
    node.handle(ev.Held("a", 35.0), 5.0)
    assert node.handle(ev.Held("b", 60.0), 5.0) == []
    (refusal,) = node.handle(ev.Wanted("b", 60.0), 5.0)
    assert isinstance(refusal, ev.Refuse)
    assert refusal.retry_after_s == 30.0
    assert node.handle(ev.Held("b", 60.0), 35.0) == [ev.Unload("a")]
    pinned = on_disk(4, 4, budget=4, pinned=("a",))
    pinned.handle(ev.Started(), 0.0)
    warm(pinned, 3.0, "a")
    (refusal,) = pinned.handle(ev.Wanted("b", 60.0), 5.0)
    assert isinstance(refusal, ev.Refuse)
    assert refusal.retry_after_s == 0.0
    assert "0.0 GB are not pinned" in refusal.why


def test_one_that_is_wanted_while_it_leaves_comes_back() -> None:
    node = on_disk(4, 4, 4, budget=8)
    node.handle(ev.Started(), 0.0)
    warm(node, 1.0, "a", "b")
    assert node.handle(ev.Wanted("c", 60.0), 2.0) == [ev.Unload("a")]
    assert node.handle(ev.Wanted("a", 60.0), 3.0) == [ev.Unload("b")]
    assert node.handle(ev.Left("b"), 4.0) == [ev.Load("c")]
    assert node.handle(ev.Left("a"), 5.0) == [ev.Load("a")]


def test_an_engine_that_does_not_come_up_gives_its_place_back_unless_it_is_pinned() -> None:
    for pinned in (("a",), ()):
        node = on_disk(4, 4, budget=4, pinned=pinned)
        node.handle(ev.Started(), 0.0)
        node.handle(ev.Wanted("a", 60.0), 0.0)
        assert [type(e) for e in node.handle(ev.Exited("a"), 1.0)] == [ev.Refuse]
        for _ in range(MAX_FAILURES - 2):
            assert node.handle(ev.Exited("a"), 2.0) == []
        assert node.handle(ev.Exited("a"), 3.0) == ([] if pinned else [ev.Unload("a")])
        node.handle(ev.Left("a"), 3.0)
        assert ("does not come up" in node.why_refused("a", 3.0)) is not bool(pinned)
        assert node.why_refused("a", 3.0 + RETRY_FIRST_S) == ""


def test_last_words_of_an_engine_are_passed_on_until_one_comes_up() -> None:
    node = on_disk(4, budget=4, pinned=("a",))
    node.handle(ev.Started(), 0.0)
    assert node.state("a").why_not_up == ""
    node.handle(ev.Wanted("a", 60.0), 0.0)
    (refusal,) = node.handle(ev.Exited("a", "chunk 3 is damaged"), 1.0)
    why = "the engine of a does not come up: chunk 3 is damaged"
    assert isinstance(refusal, ev.Refuse)
    assert refusal.why == node.state("a").why_not_up == why
    warm(node, 2.0, "a")
    node.handle(ev.Exited("a", "killed"), 3.0)
    assert node.state("a").why_not_up == ""  # it was up, and has not failed to come back


def test_a_crash_keeps_the_place() -> None:
    node = on_disk(4, 4, budget=4)
    node.handle(ev.Started(), 0.0)
    warm(node, 1.0, "a")
    node.handle(ev.Legs("a", 1), 2.0)
    assert node.handle(ev.Exited("a"), 2.0) == []
    node.handle(ev.Legs("a", 0), 2.0)
    assert node.state("a").memory == "loading"
    assert node.why_refused("b", 2.0)
    assert node.handle(ev.Ready("a", 1.0), 3.0) == []


def test_missing_models_are_fetched_the_wanted_ones_first() -> None:
    node = Residency("abcd", fetchable="abc", budget_bytes=4 * GB)
    assert node.handle(ev.Started(), 0.0) == [ev.Fetch("a")]
    assert node.handle(ev.Wanted("c", 60.0), 0.0) == [ev.Fetch("c")]
    (refusal,) = node.handle(ev.Wanted("d", 60.0), 0.0)
    assert isinstance(refusal, ev.Refuse)
    assert "nowhere to fetch" in refusal.why
    # Room is free: it comes though nobody asks. b waits for its turn on the line.
    assert node.handle(ev.Fetched("a", 3 * GB, GB), 1.0) == [ev.Load("a")]
    warm(node, 2.0, "a")
    assert node.handle(ev.Fetched("c", 3 * GB, GB), 3.0) == [ev.Unload("a"), ev.Fetch("b")]
    assert node.handle(ev.Fetched("b", 3 * GB, GB), 4.0) == []


def test_an_engine_begins_while_the_rest_arrives_if_somebody_asks() -> None:
    node = Residency("ab", fetchable="ab", budget_bytes=4 * GB)
    node.handle(ev.Started(), 0.0)
    assert node.handle(ev.Arriving("a", 3 * GB, GB), 1.0) == []
    assert node.handle(ev.Wanted("a", 60.0), 1.0) == [ev.Load("a")]
    assert node.handle(ev.Fetched("a", 3 * GB, GB), 2.0) == [ev.Fetch("b")]
    warm(node, 3.0, "a")
    node.handle(ev.Held("b", 60.0), 4.0)
    assert node.handle(ev.Arriving("b", 3 * GB, GB), 5.0) == [ev.Unload("a")]
    assert node.handle(ev.Left("a"), 6.0) == [ev.Load("b")]
    assert node.handle(ev.FetchFailed("b", "a broken line"), 7.0) == [ev.Unload("b")]
    node.handle(ev.Left("b"), 8.0)
    assert node.why_refused("b", 8.0) == "a broken line"


def test_what_does_not_fit_the_disk_comes_when_somebody_asks() -> None:
    node = Residency("ab", fetchable="ab", budget_bytes=4 * GB)
    node.handle(ev.Started(), 0.0)
    assert node.handle(ev.PutOff("a"), 1.0) == [ev.Fetch("b")]
    assert node.next_deadline() is None
    assert node.why_refused("a", 1.0) == ""
    assert node.handle(ev.Held("a", 60.0), 1.0) == [ev.Fetch("a")]


def test_what_failed_and_does_not_fit_the_disk_is_not_tried_over_and_over() -> None:
    node = Residency("a", fetchable="a", budget_bytes=4 * GB)
    node.handle(ev.Started(), 0.0)
    node.handle(ev.FetchFailed("a", "nobody has it"), 0.0)
    assert node.handle(ev.Tick(), RETRY_FIRST_S) == [ev.Fetch("a")]
    assert node.handle(ev.PutOff("a"), RETRY_FIRST_S + 1) == []
    assert node.next_deadline() is None
    assert node.handle(ev.Tick(), RETRY_FIRST_S + 1) == []
    assert node.handle(ev.Held("a", 60.0), RETRY_FIRST_S + 2) == [ev.Fetch("a")]


def test_a_failed_fetch_is_told_and_tried_again_later_and_later() -> None:
    node = Residency("a", fetchable="a")
    node.handle(ev.Started(), 0.0)
    node.handle(ev.Wanted("a", 600.0), 0.0)
    now, waits = 0.0, []
    (refusal,) = node.handle(ev.FetchFailed("a", "nobody has it"), 0.0)
    assert refusal == ev.Refuse("a", "nobody has it", RETRY_FIRST_S)
    for _ in range(4):
        at = node.next_deadline()
        assert at is not None
        assert node.why_refused("a", now) == "nobody has it"
        waits.append(at - now)
        now = at
        assert node.handle(ev.Tick(), now) == [ev.Fetch("a")]
        node.handle(ev.FetchFailed("a", "nobody has it"), now)
    assert waits == [RETRY_FIRST_S * 2**n for n in range(4)]


def test_who_waits_too_long_is_told() -> None:
    node = on_disk(4, budget=4)
    node.handle(ev.Started(), 0.0)
    node.handle(ev.Wanted("a", 9.0), 0.0)
    assert node.next_deadline() == 9.0
    assert node.handle(ev.Tick(), 8.0) == []
    (refusal,) = node.handle(ev.Tick(), 9.0)
    assert isinstance(refusal, ev.Refuse)
    assert node.next_deadline() is None


def test_a_drill_takes_a_model_down_after_its_legs_and_keeps_its_place() -> None:
    node = on_disk(4, 4, budget=4)
    node.handle(ev.Started(), 0.0)
    warm(node, 1.0, "a")
    node.handle(ev.Legs("a", 1), 2.0)
    assert node.handle(ev.TakeDown("a"), 2.0) == []
    assert "drill" in node.why_refused("a", 2.0)
    assert node.handle(ev.Legs("a", 0), 3.0) == [ev.Unload("a")]
    assert node.handle(ev.Left("a"), 4.0) == []
    assert node.why_refused("b", 4.0)
    assert node.handle(ev.BringBack("a"), 5.0) == [ev.Load("a")]


def test_how_long_it_would_take() -> None:
    node = Residency("abc", fetchable="abc", budget_bytes=8 * GB)
    node.handle(ev.Fetched("a", 4 * GB, 3 * GB), 0.0)
    node.handle(ev.Fetched("b", 4 * GB, 6 * GB), 0.0)
    node.handle(ev.Started(), 0.0)
    node.handle(ev.Ready("a", 3.0), 3.0)  # a GB per second
    assert node.eta_s("a", 3.0) == 0.0
    assert node.eta_s("b", 3.0) == 2.0 + 6.0 - 3.0  # it began at 0
    assert node.eta_s("b", 900.0) == 0.8
    node.handle(ev.Progress("c", 2 * GB, 6 * GB, GB / 2), 3.0)
    assert node.eta_s("c", 3.0) == 8.0 + 2.0


# ---- any order ---------------------------------------------------------------------------------

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
        self.node = Residency(
            list(SIZES), pinned=PINNED, fetchable="abde", budget_bytes=BUDGET * GB
        )

    @initialize(there=st.sets(models))
    def start(self, there: set[str]) -> None:
        self.disk = set()
        for model in there:
            self.disk.add(model)
            self.node.handle(ev.Fetched(model, SIZES[model] * GB, GB), 0.0)
        self.feed(ev.Started())

    def feed(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.node.handle(event, self.now)
        for effect in effects:
            model = effect.model
            match effect:
                case ev.Fetch():
                    assert model not in self.fetching | self.disk
                    self.fetching.add(model)
                case ev.Load():
                    assert model in self.disk | self.arriving
                    assert model not in self.engines
                    self.engines[model] = "starting"
                case ev.Unload():
                    assert self.engines[model] in ("starting", "ready")
                    if self.engines[model] == "ready":
                        assert model not in PINNED
                        assert not self.legs[model], "one with legs is unloaded"
                        assert self.held.get(model, -1.0) <= self.now, "a lease is broken"
                    self.engines[model] = "ending"
                case ev.Refuse():
                    del self.waiting[model]
        return effects

    @rule(model=models, wait_s=st.floats(0.5, 50))
    def want(self, model: str, wait_s: float) -> None:
        if self.engines.get(model) != "ready":
            self.waiting[model] = max(self.waiting.get(model, 0.0), self.now + wait_s)
        why = self.node.why_refused(model, self.now)
        self.feed(ev.Wanted(model, self.now + wait_s))
        assert bool(why) == (model not in self.waiting and self.engines.get(model) != "ready")

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

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), works=st.booleans())
    def fetch_ends(self, data: st.DataObject, works: bool) -> None:
        model = data.draw(st.sampled_from(sorted(self.fetching)))
        self.fetching.remove(model)
        self.arriving.discard(model)
        if works:
            self.disk.add(model)
            self.feed(ev.Fetched(model, SIZES[model] * GB, GB))
        else:
            self.feed(ev.FetchFailed(model, "a broken line"))

    @precondition(lambda self: self.fetching - self.arriving)
    @rule(data=st.data())
    def enough_is_there(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.fetching - self.arriving)))
        self.arriving.add(model)
        self.feed(ev.Arriving(model, SIZES[model] * GB, GB))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), works=st.booleans())
    def engine_moves(self, data: st.DataObject, works: bool) -> None:
        model = data.draw(st.sampled_from(sorted(self.engines)))
        match self.engines[model]:
            case "ending":
                del self.engines[model]
                self.legs[model] = 0
                self.feed(ev.Left(model))
            case "starting" if works and model in self.disk:
                self.engines[model] = "ready"
                self.waiting.pop(model, None)
                self.feed(ev.Ready(model, 1.0))
            case "starting":
                self.feed(ev.Exited(model))
            case "ready" if not works:
                self.engines[model] = "starting"
                self.feed(ev.Exited(model))
                self.legs[model] = 0
                self.feed(ev.Legs(model, 0))

    @rule(model=models)
    def collected(self, model: str) -> None:
        if model in self.disk and self.node.state(model).memory == "out":
            self.disk.remove(model)
            self.feed(ev.Gone(model))

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
    def whoever_waits_has_a_deadline(self) -> None:
        at = self.node.next_deadline()
        assert not self.waiting or (at is not None and at <= min(self.waiting.values()))

    def teardown(self) -> None:
        """Once the node obeys in time, everybody is served or told; pinned ones come back."""
        for _ in range(200):
            for model in list(self.engines):
                if self.engines[model] == "ending":
                    del self.engines[model]
                    self.feed(ev.Left(model))
                elif self.engines[model] == "starting" and model in self.disk:
                    self.engines[model] = "ready"
                    self.waiting.pop(model, None)
                    self.feed(ev.Ready(model, 1.0))
            for model in list(self.fetching):
                self.fetching.remove(model)
                self.arriving.discard(model)
                self.disk.add(model)
                self.feed(ev.Fetched(model, SIZES[model] * GB, GB))
            if not self.fetching and set(self.engines.values()) <= {"ready"}:
                break
        else:
            raise AssertionError(f"no rest: {self.engines}, {self.fetching} on the way")
        assert not self.waiting, "somebody waits for ever"
        assert all(self.node.state(m).memory in ("out", "warm") for m in SIZES)


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
