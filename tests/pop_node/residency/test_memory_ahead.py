"""How much memory a process that waits for the next load may use before there is one."""

from __future__ import annotations

from pop_node.residency import events as ev
from pop_node.residency.residency import Residency
from pop_node.residency.room import memory_ahead

GB = 10**9


def a_node(budget: int | None, **weights: int) -> Residency:
    """Models that take a gigabyte more than their weights, all on the disk; not started."""
    node = Residency(list(weights), budget_bytes=budget and budget * GB)
    for name, size in weights.items():
        node.handle(ev.Fetched(name, (size + 1) * GB, size * GB), 0.0)
    return node


def ahead(node: Residency, budget: int | None) -> tuple[int, int]:
    nbytes, touched = memory_ahead(node.models().values(), budget and budget * GB)
    return nbytes // GB, touched // GB


def test_it_suits_the_largest_that_may_come_and_takes_what_is_free() -> None:
    node = a_node(10, a=4, b=7, c=6)
    assert ahead(node, 10) == (7, 7)
    node.handle(ev.Started(), 0.0)  # a has 5 of 10 now
    assert ahead(node, 10) == (7, 5)
    node.handle(ev.Ready("a", 1.0), 1.0)
    node.handle(ev.Wanted("b", 60.0), 2.0)  # was promised the place of a, which leaves
    assert ahead(node, 10) == (6, 2)


def test_what_is_nowhere_near_needs_none() -> None:
    node = Residency(["a", "b"], fetchable=["b"], budget_bytes=10 * GB)
    node.handle(ev.Fetched("a", 5 * GB, 4 * GB), 0.0)
    node.handle(ev.Started(), 0.0)
    assert ahead(node, 10) == (0, 0)


def test_it_never_exceeds_the_budget_of_a_full_node() -> None:
    node = a_node(5, a=4, b=4)
    node.handle(ev.Started(), 0.0)
    assert ahead(node, 5) == (4, 0)
