"""Watching one service: what to ask the registry next, and what view to keep meanwhile.

Pure: events and the time in, effects out; ``registry.watcher`` is the shell. Three things make it
more than a loop:

- an index only means something to the server that gave it out, so after any failure, and when an
  index goes backwards, the next question starts from index 0;
- a registry that comes back may have forgotten everything. Instances that an answer after such a
  break no longer mentions stay in the view for ``hold_s``, the time their nodes need to register
  again. A dead node among them costs little: routers see the broken connection themselves;
- an answer is published only if its content differs: an index also moves for reasons that do not
  concern us.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.backoff import backoff_s
from registry.entries import ServiceEntry, Snapshot

WAIT_S = 10.0
"""Length of a blocking query. Guess: bounds how long a hanging registry goes unnoticed (wait + 10%
+ 2 s), at a price of six small answers a minute."""

HOLD_S = 15.0
"""How long the view survives a registry that lost its state: a heartbeat interval (TTL/3) plus the
longest backoff and call, at the default TTL of 10 s."""

MIN_GAP_S = 0.1
"""Least time between two questions. Guess: merges the changes of a mesh that starts all at once."""

STABLE_S = 10.0
"""A registry that answered for so long without a failure has the backoff forgiven. Guess."""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin to watch."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The registry answered the question that was out."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Failed:
    """The question that was out got no answer; ``jitter`` is uniform in [0, 1)."""

    jitter: float


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline passed."""


Event = Start | Answered | Failed | Tick


@dataclass(frozen=True, slots=True)
class Query:
    """Ask for the service; ``index`` 0 means at once, otherwise wait for news up to ``wait_s``."""

    index: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Publish:
    """The view changed."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Stale:
    """The view could not be confirmed; it is ``age_s`` seconds old (None: there is none yet)."""

    age_s: float | None


Effect = Query | Publish | Stale


class Watch:
    """The state of one watch. At most one ``Query`` is out at a time."""

    def __init__(self, *, wait_s: float = WAIT_S, hold_s: float = HOLD_S) -> None:
        self._wait_s = wait_s
        self._hold_s = hold_s
        self._index = 0
        self._asking = False
        self._asked_at = 0.0
        self._ask_at: float | None = None
        self._failures = 0
        self._failed_at = 0.0
        self._broken = False
        self._answer: tuple[ServiceEntry, ...] = ()
        self._answer_index = 0
        self._answered_at: float | None = None
        # By service id: what the last answer lacks, and until when it stays in the view.
        self._held: dict[str, tuple[ServiceEntry, float]] = {}
        self._view: Snapshot | None = None

    @property
    def view(self) -> Snapshot | None:
        """What was published last."""
        return self._view

    def age_s(self, now: float) -> float | None:
        """Seconds since the registry last confirmed the view; None before the first answer."""
        return None if self._answered_at is None else now - self._answered_at

    def next_deadline(self) -> float | None:
        """When to call ``handle(Tick(), now)``; None while only an answer can change anything."""
        deadlines = [until for _, until in self._held.values()]
        if not self._asking and self._ask_at is not None:
            deadlines.append(self._ask_at)
        return min(deadlines, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, monotonic)."""
        effects: list[Effect] = []
        match event:
            case Start():
                self._ask_at = now
            case Answered(snapshot):
                self._take_answer(snapshot, now)
            case Failed(jitter):
                self._take_failure(jitter, now)
                effects.append(Stale(self.age_s(now)))
            case Tick():
                pass
        self._held = {key: held for key, held in self._held.items() if held[1] > now}
        effects.extend(self._publish())
        effects.extend(self._ask(now))
        return effects

    def _take_answer(self, snapshot: Snapshot, now: float) -> None:
        assert self._asking, "an answer to no question"
        self._asking = False
        went_back = snapshot.index < self._index
        self._index = 0 if went_back else snapshot.index
        known = {entry.service_id for entry in snapshot.entries}
        for service_id in known & self._held.keys():
            del self._held[service_id]
        if (self._broken or went_back) and self._view is not None:
            for entry in self._view.entries:
                if entry.service_id not in known:
                    self._held.setdefault(entry.service_id, (entry, now + self._hold_s))
        self._broken = False
        self._answer, self._answer_index = snapshot.entries, snapshot.index
        self._answered_at = now
        if now - self._failed_at >= STABLE_S:
            self._failures = 0
        self._ask_at = max(now, self._asked_at + MIN_GAP_S)

    def _take_failure(self, jitter: float, now: float) -> None:
        assert self._asking, "a failure of no question"
        self._asking = False
        self._index = 0
        self._broken = True
        self._failures += 1
        self._failed_at = now
        self._ask_at = now + backoff_s(self._failures, jitter)

    def _publish(self) -> list[Effect]:
        """The view as it is now: the last answer and what is held; nothing if that is no news."""
        if self._answered_at is None:
            return []
        entries = self._answer + tuple(entry for entry, _ in self._held.values())
        entries = tuple(sorted(entries, key=lambda entry: entry.service_id))
        if self._view is not None and self._view.entries == entries:
            return []
        self._view = Snapshot(self._answer_index, entries)
        return [Publish(self._view)]

    def _ask(self, now: float) -> list[Effect]:
        if self._asking or self._ask_at is None or now < self._ask_at:
            return []
        self._asking = True
        self._asked_at = now
        self._ask_at = None
        return [Query(self._index, self._wait_s)]
