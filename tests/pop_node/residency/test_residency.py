"""Which models are in memory: examples, one after the other."""

from __future__ import annotations

from pop_node.residency import events as ev
from pop_node.residency.fetch_queue import RETRY_FIRST_S
from pop_node.residency.residency import MAX_FAILURES, Residency

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


def test_last_words_of_an_engine_are_kept_for_operators_until_one_comes_up() -> None:
    node = on_disk(4, budget=4, pinned=("a",))
    node.handle(ev.Started(), 0.0)
    assert node.state("a").why_not_up == ""
    node.handle(ev.Wanted("a", 60.0), 0.0)
    (refusal,) = node.handle(ev.Exited("a", "no such file: /srv/a/chunk-3"), 1.0)
    why = "the engine of a does not come up"
    assert isinstance(refusal, ev.Refuse)
    assert refusal.why == why  # clients read it
    assert node.state("a").why_not_up == f"{why}: no such file: /srv/a/chunk-3"
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


def test_what_is_put_off_is_not_loaded_from_what_had_arrived_of_it() -> None:
    node = Residency("a", fetchable="a", budget_bytes=4 * GB)
    node.handle(ev.Started(), 0.0)
    node.handle(ev.Held("a", 10.0), 0.0)
    assert node.handle(ev.Arriving("a", 3 * GB, GB), 1.0) == [ev.Load("a")]
    assert node.handle(ev.PutOff("a"), 11.0) == [ev.Unload("a")]
    node.handle(ev.Left("a"), 12.0)
    assert node.committed_bytes == 0
    assert node.handle(ev.Held("a", 60.0), 13.0) == [ev.Fetch("a")]
    # Asked for at the moment at which it is put off, it comes again.
    node.handle(ev.Arriving("a", 3 * GB, GB), 14.0)
    assert node.handle(ev.PutOff("a"), 15.0) == [ev.Unload("a"), ev.Fetch("a")]
    assert node.handle(ev.Arriving("a", 3 * GB, GB), 16.0) == []
    assert node.handle(ev.Left("a"), 17.0) == [ev.Load("a")]


def test_a_pinned_model_whose_bundle_was_removed_is_fetched_again() -> None:
    for fetchable in ("a", ""):
        node = Residency("a", fetchable=fetchable)
        node.handle(ev.Fetched("a", 4 * GB, GB), 0.0)
        assert node.handle(ev.Started(), 0.0) == [ev.Load("a")]
        assert node.handle(ev.Exited("a", "chunk 3 is damaged"), 1.0) == []
        assert node.handle(ev.Gone("a"), 2.0) == [ev.Unload("a")]
        assert node.handle(ev.Left("a"), 3.0) == [ev.Fetch("a")]  # or is found where it was mended
        node.handle(ev.FetchFailed("a", "nobody has it"), 4.0)
        at = node.next_deadline()
        assert at is not None
        assert at > 4.0
        assert node.handle(ev.Tick(), at) == [ev.Fetch("a")]
        assert node.handle(ev.Fetched("a", 4 * GB, GB), 20.0) == [ev.Load("a")]


def test_what_is_gone_is_not_waited_for_in_the_queue() -> None:
    node = on_disk(4, 4, budget=4)
    node.handle(ev.Started(), 0.0)
    warm(node, 1.0, "a")
    assert node.handle(ev.Wanted("b", 60.0), 2.0) == [ev.Unload("a")]
    assert node.handle(ev.Gone("b"), 3.0) == [ev.Fetch("b")]
    assert node.handle(ev.Left("a"), 4.0) == []
    assert node.handle(ev.Fetched("b", 4 * GB, GB), 5.0) == [ev.Load("b")]


def test_an_engine_that_ends_while_its_model_still_arrives_ends_no_fetch() -> None:
    node = Residency("a", fetchable="a", budget_bytes=4 * GB)
    node.handle(ev.Started(), 0.0)
    node.handle(ev.Wanted("a", 60.0), 0.0)
    assert node.handle(ev.Arriving("a", 3 * GB, GB), 1.0) == [ev.Load("a")]
    for _ in range(MAX_FAILURES):
        node.handle(ev.Exited("a"), 2.0)
    node.handle(ev.Left("a"), 3.0)
    assert node.handle(ev.Gone("a"), 3.0) == []
    assert node.state("a").disk == "fetching"
    assert node.handle(ev.Tick(), 3.0 + RETRY_FIRST_S) == []


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
