"""Scheduling one step further while a step is under way: what it will have changed is taken as
given, but for the tokens that it draws.

So the next step may have a row for a token that is not known here, and, if that token ends its
sequence, a row in vain: what it draws is dropped, and its KV goes where nobody reads it before it
is written again, since a device computes steps in order.
"""

from __future__ import annotations

from pop_node.engine.scheduling.schedule import Schedule


class Ahead:
    """At most one step that others were scheduled ahead of."""

    def __init__(self) -> None:
        self._step: Schedule | None = None

    def begin(self, schedule: Schedule) -> None:
        """Its rows count as computed from here on, and what it draws as pending."""
        assert self._step is None, "two steps under way are unknown"
        assert schedule.num_drafts == 0, "who guesses has to know what was right"
        assert not schedule.awaited, "who counts tokens has to know them"
        self._step = schedule
        for row in schedule.rows:
            if row.sequence.phase != "ended":
                row.sequence.computed = row.end
        for index in schedule.sampled:
            schedule.rows[index].sequence.pending = 1

    def settle(self, schedule: Schedule) -> None:
        """The step is done. A sequence that gave way meanwhile stays as it is."""
        known = schedule is self._step
        if known:
            self._step = None
        for sequence, start, count, drafts in schedule.rows:
            if not known and sequence.phase != "ended":
                sequence.computed = start + count - len(drafts)
            sequence.pending = 0
