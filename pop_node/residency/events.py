"""What goes into and comes out of ``pop_node.residency.residency``: frozen values."""

from __future__ import annotations

from dataclasses import dataclass

# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The node is up: load what fits, fetch what is missing."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody waits for the model, no longer than ``until``: it becomes ready, or ``Refuse``."""

    model: str
    until: float


@dataclass(frozen=True, slots=True)
class Held:
    """A router wants the model in memory until then; nobody waits."""

    model: str
    until: float


@dataclass(frozen=True, slots=True)
class Legs:
    """So many legs of the model are there now whose ending was not said."""

    model: str
    count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A fetch goes on; ``bytes_per_s`` 0: not measured yet."""

    model: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """The model is on the disk.

    ``memory_bytes`` is what it takes while it is warm, ``load_bytes`` what is read to get there.
    """

    model: str
    memory_bytes: int
    load_bytes: int


@dataclass(frozen=True, slots=True)
class Arriving:
    """So much of the model is on the disk that an engine can begin to load it; the rest comes."""

    model: str
    memory_bytes: int
    load_bytes: int


@dataclass(frozen=True, slots=True)
class FetchFailed:
    model: str
    why: str


@dataclass(frozen=True, slots=True)
class PutOff:
    """The disk has no room for a model that nobody asks for: it comes when somebody does."""

    model: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The model's bundle is not among those of the disk: it was removed, or has not come yet."""

    model: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Its engine has produced a token, ``took_s`` after it was told to start."""

    model: str
    took_s: float


@dataclass(frozen=True, slots=True)
class Exited:
    """Its engine ended without being told to, or did not come up; it is started again. ``why``: its
    last words, if it said any, which no client is told."""

    model: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    """Its engine is gone after ``Unload``; so is its memory."""

    model: str


@dataclass(frozen=True, slots=True)
class TakeDown:
    """Out of memory as soon as its legs have ended, for a drill; its place stays reserved."""

    model: str


@dataclass(frozen=True, slots=True)
class BringBack:
    """The drill is over: load it again."""

    model: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The timer armed for ``next_deadline`` fired."""


Event = (
    Started
    | Wanted
    | Held
    | Legs
    | Progress
    | Fetched
    | Arriving
    | FetchFailed
    | PutOff
    | Gone
    | Ready
    | Exited
    | Left
    | TakeDown
    | BringBack
    | Tick
)


# ---- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the model to the disk; ``Fetched`` or ``FetchFailed`` follows."""

    model: str


@dataclass(frozen=True, slots=True)
class Load:
    """Start an engine and keep it running; ``Ready`` or ``Exited`` follows, any number of times."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """End the engine and start none; ``Left`` follows."""

    model: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Whoever waits for the model waits in vain; ``retry_after_s`` 0: nobody knows."""

    model: str
    why: str
    retry_after_s: float


Effect = Fetch | Load | Unload | Refuse
