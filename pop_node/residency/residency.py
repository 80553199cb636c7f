"""Which models are in this node's memory, decided without IO.

    absent --Fetch--> fetching --Fetched--> on the disk
    out --room is made--> queued --it is free--> loading --Ready--> warm --Unload--> leaving --> out

Disk (``fetch_queue``) and memory (``places``) are told apart, as a model may be loaded while the
rest of it still arrives. A model gets a place at once or is refused at once: room is what is free
and what models take that may leave, the least recently used first. None leaves that is pinned, has
legs, or is asked for: a lease that runs is kept, whoever asks for another model.

An engine that ends by itself is started again by the node's lifecycle; one that does not come up
``MAX_FAILURES`` times gives its place back, unless it is pinned. Without a budget every model is
pinned in effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

from pop_node.residency import events as ev
from pop_node.residency.fetch_queue import RETRY_FIRST_S, FetchQueue, backoff_s
from pop_node.residency.places import Places
from pop_node.residency.room import BUSY_S
from pop_node.residency.state import ModelState
from topology.budget import by_precedence, first_fit

MAX_FAILURES = 3
"""Starts in a row without a token until a model gives its place back. Guess: one may be bad luck,
such as memory that another process had for a moment."""


class Residency:
    """State machine of one node. ``budget_bytes`` None: no bound."""

    def __init__(
        self,
        models: Sequence[str],
        *,
        pinned: Iterable[str] = (),
        fetchable: Iterable[str] = (),
        budget_bytes: int | None = None,
    ) -> None:
        """``models`` in the order of precedence after ``pinned`` ones; ``fetchable`` are those that
        can be had from elsewhere. What is on the disk already is told by ``Fetched`` before
        ``Started``."""
        stays = set(models if budget_bytes is None else pinned)
        can_come = set(fetchable)
        self._models = {name: ModelState(name, name in stays, name in can_come) for name in models}
        self._budget = budget_bytes
        self._places = Places(self._models, budget_bytes)
        self._fetches = FetchQueue(self._models)
        self._is_started = False

    # ---- questions -----------------------------------------------------------------------------

    def state(self, model: str) -> ModelState:
        """What is known of a model; not to be changed."""
        return self._models[model]

    def models(self) -> Mapping[str, ModelState]:
        """All models by name; not to be changed."""
        return self._models

    def eta_s(self, model: str, now: float) -> float:
        """Seconds until the model could answer if it were wanted now."""
        return self._models[model].eta_s(now, self._places.load_bytes_per_s)

    def first(self) -> list[str]:
        """The models that ``Started`` loads: as many as fit of those on the disk."""
        here = {m.name: m.memory_bytes for m in self._models.values() if m.disk == "here"}
        return first_fit(self._by_precedence(), here, self._budget)

    def _by_precedence(self) -> list[str]:
        pinned = [m.name for m in self._models.values() if m.pinned]
        return by_precedence(list(self._models), pinned)

    def why_refused(self, model: str, now: float) -> str:
        """Why the model would be refused if it were wanted now, for who looks after nodes; empty
        when it would not be."""
        refusal, state = self.refusal(model, now), self._models[model]
        if refusal is None:
            return ""
        return state.problem if refusal.why == state.why_failed else refusal.why

    def refusal(self, model: str, now: float) -> ev.Refuse | None:
        """What ``Wanted`` would be told now; None when the model can come, or is here."""
        return self._places.refusal(self._models[model], now)

    @property
    def committed_bytes(self) -> int:
        """Memory of models that have a place or were promised one."""
        return self._places.committed_bytes

    @property
    def resident_bytes(self) -> int:
        """Memory of models that have an engine."""
        return self._places.resident_bytes

    def next_deadline(self) -> float | None:
        """When the shell must send ``Tick``."""
        times = [m.wanted_until for m in self._models.values() if m.is_waited_for]
        times += [m.retry_at for m in self._fetches.retries()]
        return min(times, default=None)

    # ---- events --------------------------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Advance by one event."""
        effects = self._handle(event, now)
        return effects + self._bring_pinned(now) if self._is_started else effects

    def _handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        match event:
            case ev.Started():
                return self._started(now)
            case ev.Wanted(model, until):
                return self._wanted(self._models[model], until, now)
            case ev.Held(model, until):
                return self._held(self._models[model], until, now)
            case ev.Legs(model, count):
                return self._legs(self._models[model], count, now)
            case ev.Progress(model, done, total, rate):
                state = self._models[model]
                state.left_bytes, state.fetch_bytes_per_s = max(0, total - done), rate
                return []
            case ev.Fetched():
                return self._fetched(event, now)
            case ev.Arriving():
                return self._arriving(event, now)
            case ev.FetchFailed(model, why):
                return self._fetch_failed(self._models[model], why, now)
            case ev.PutOff(model):
                return self._put_off(self._models[model], now)
            case ev.Gone(model):
                return self._gone(self._models[model], now)
            case ev.Ready(model, took_s):
                return self._ready(self._models[model], took_s, now)
            case ev.Exited(model, why):
                return self._exited(self._models[model], why, now)
            case ev.Left(model):
                return self._places.left(self._models[model], now)
            case ev.TakeDown(model):
                self._models[model].barred = True
                return self._let_go(self._models[model], now)
            case ev.BringBack(model):
                return self._bring_back(self._models[model], now)
            case ev.Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _started(self, now: float) -> list[ev.Effect]:
        self._is_started = True
        for name in self.first():
            self._places.promise(self._models[name])
        self._fetches.add(
            name
            for name in self._by_precedence()
            if self._models[name].disk == "absent" and self._models[name].fetchable
        )
        return [*self._places.admit(now), *self._fetches.begin(now)]

    def _wanted(self, model: ModelState, until: float, now: float) -> list[ev.Effect]:
        model.used_at = now
        if model.memory == "warm" and not model.barred:
            return []
        refusal = self._places.refusal(model, now)
        if refusal is not None:
            return [refusal]
        model.wanted_until = max(model.wanted_until, until)
        return self._come(model, now)

    def _held(self, model: ModelState, until: float, now: float) -> list[ev.Effect]:
        if self._places.refusal(model, now) is not None:
            return []  # routers read why in the load
        model.held_until = max(model.held_until, until)
        return self._come(model, now)

    def _legs(self, model: ModelState, count: int, now: float) -> list[ev.Effect]:
        model.legs, model.used_at = count, now
        return self._let_go(model, now)

    def _ready(self, model: ModelState, took_s: float, now: float) -> list[ev.Effect]:
        if model.memory != "loading":
            return []
        model.memory, model.since, model.used_at = "warm", now, now
        model.last_load_s, model.failures = took_s, 0
        model.why_failed = model.engine_said = ""
        model.wanted_until = -math.inf
        if model.load_bytes and took_s > 0:
            self._places.load_bytes_per_s = model.load_bytes / took_s
        return self._let_go(model, now)

    def _exited(self, model: ModelState, why: str, now: float) -> list[ev.Effect]:
        if model.memory == "warm":
            model.memory, model.since = "loading", now
            return self._let_go(model, now)
        if model.memory != "loading":
            return []
        model.since = now
        model.failures += 1
        model.why_failed, model.engine_said = f"the engine of {model.name} does not come up", why
        effects = self._refuse_waiting(model, model.why_failed, RETRY_FIRST_S)
        if model.failures >= MAX_FAILURES and not model.pinned:
            model.retry_at = now + backoff_s(model.failures - MAX_FAILURES)
            effects += self._places.leave(model)
        return effects

    def _tick(self, now: float) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        for model in self._models.values():
            if model.is_waited_for and model.wanted_until <= now:
                why = f"{model.name} did not come in time"
                effects += self._refuse_waiting(model, why, self.eta_s(model.name, now))
        self._fetches.add([m.name for m in self._fetches.retries() if m.retry_at <= now])
        return effects + self._fetches.begin(now)

    # ---- disk ----------------------------------------------------------------------------------

    def _fetched(self, event: ev.Fetched, now: float) -> list[ev.Effect]:
        model = self._models[event.model]
        model.disk, model.arriving = "here", False
        model.failures, model.retry_at = 0, -math.inf
        model.why_failed = model.engine_said = ""
        model.memory_bytes, model.load_bytes = event.memory_bytes, event.load_bytes
        effects: list[ev.Effect] = []
        if self._is_started and not model.is_committed:
            asked = model.pinned or model.is_asked_for(now)
            victims = self._places.room(model, now)
            if victims is not None and (asked or (not victims and model.memory == "out")):
                effects += self._places.make_room(model, victims, now)
            elif refusal := self._places.refusal(model, now):
                effects += self._refuse_waiting(model, refusal.why, refusal.retry_after_s)
        return effects + self._fetches.begin(now)

    def _arriving(self, event: ev.Arriving, now: float) -> list[ev.Effect]:
        """Only what is asked for takes memory before all of it is here."""
        model = self._models[event.model]
        if model.disk != "fetching":
            return []
        model.arriving = True
        model.memory_bytes, model.load_bytes = event.memory_bytes, event.load_bytes
        asked = model.pinned or model.is_asked_for(now)
        return self._come(model, now) if asked else []

    def _fetch_failed(self, model: ModelState, why: str, now: float) -> list[ev.Effect]:
        model.failures += 1
        wait_s = backoff_s(model.failures - 1)
        model.retry_at, model.why_failed, model.engine_said = now + wait_s, why, ""
        effects = self._refuse_waiting(model, why, wait_s)
        return [*effects, *self._comes_no_more(model), *self._fetches.begin(now)]

    def _put_off(self, model: ModelState, now: float) -> list[ev.Effect]:
        model.failures = 0
        effects = self._comes_no_more(model)
        if model.is_asked_for(now):  # since just now
            self._fetches.add([model.name])
        return effects + self._fetches.begin(now)

    def _comes_no_more(self, model: ModelState) -> list[ev.Effect]:
        """A fetch is over: nobody loads what has arrived of it, unless it was read in time."""
        model.disk, model.arriving = "absent", False
        return self._places.take_back(model) if model.memory != "warm" else []

    def _gone(self, model: ModelState, now: float) -> list[ev.Effect]:
        """Nobody loads what is not there; who has it in memory already is not harmed."""
        if model.disk != "here" or model.memory == "warm":
            return []
        model.disk = "absent"
        effects = self._places.take_back(model)
        if model.is_asked_for(now) and not model.barred:
            self._fetches.add([model.name])
        return effects + self._fetches.begin(now)

    # ---- memory --------------------------------------------------------------------------------

    def _come(self, model: ModelState, now: float) -> list[ev.Effect]:
        """Bring a model in that is not refused."""
        if model.is_committed:
            return []
        if model.is_loadable:
            victims = self._places.room(model, now)
            return [] if victims is None else self._places.make_room(model, victims, now)
        if model.disk == "absent":
            self._fetches.add([model.name])
        return self._fetches.begin(now)

    def _bring_pinned(self, now: float) -> list[ev.Effect]:
        """Pinned models that are not in memory, for whatever reason, come when they can."""
        effects: list[ev.Effect] = []
        for model in self._models.values():
            lost = model.pinned and model.memory == "out" and not model.barred
            due = model.disk == "here" or (model.disk == "absent" and model.retry_at <= now)
            if lost and due:
                effects += self._come(model, now)
        return effects

    def _let_go(self, model: ModelState, now: float) -> list[ev.Effect]:
        """A model that a drill wants down goes when nobody uses it any more."""
        if not model.barred or model.legs:
            return []
        effects = self._refuse_waiting(model, f"a drill has {model.name}", BUSY_S)
        return effects + self._places.take_back(model)

    def _bring_back(self, model: ModelState, now: float) -> list[ev.Effect]:
        if not model.barred:
            return []
        model.barred = False
        return self._places.bring_back(model, now)

    def _refuse_waiting(self, model: ModelState, why: str, retry_after_s: float) -> list[ev.Effect]:
        if not model.is_waited_for:
            return []
        model.wanted_until = -math.inf
        return [ev.Refuse(model.name, why, retry_after_s)]
