"""What goes into and comes out of a leg: frozen values, decided on by ``pop_node.legs.leg``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pop_node.engine import messages as engine
from wire.errors import MeshError
from wire.messages import NodeMessage, StepEntry, Transfer, TransferReport


class TextDeltas(Protocol):
    """Incremental text of one stream (``pop_node.text.stream.TextStream``)."""

    def push(self, ids: list[int]) -> TextDelta: ...

    def flush(self) -> str: ...


class TextDelta(Protocol):
    """What ``push`` made printable, and whether a stop string was completed."""

    @property
    def text(self) -> str: ...

    @property
    def stopped(self) -> bool: ...


class Escape(Protocol):
    """JSON-escape a text, without the quotes."""

    def __call__(self, text: str, /) -> bytes: ...


# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prompt is rendered and tokenised; ``max_tokens`` is capped to the context."""

    prompt_ids: list[int]
    max_tokens: int
    text: TextDeltas


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    error: MeshError


@dataclass(frozen=True, slots=True)
class TransferCommitted:
    """Decode side: all KV is here; ``ids``, at least one, follow the forced ids."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class TransferDone:
    """Prefill side: the decode site has everything."""

    report: TransferReport


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """``kept_tokens``, decode side: so many at the beginning are complete in the engine's blocks,
    counting pieces that it was told to import."""

    error: MeshError
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Retargeted:
    """Prefill side: the KV shall go to another decode node instead."""

    attempt: int
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class WaitedEnough:
    """Prefill side: nobody said where a detached leg's KV shall go."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The router wants no more of it; ``kept_tokens`` as in ``TransferFailed``."""

    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Broken:
    """The leg cannot go on: deadline passed, engine died, router link lost, node shutting down.

    ``engine_gone`` says that the engine forgot everything already; ``kept_tokens`` as in
    ``TransferFailed``.
    """

    error: MeshError
    engine_gone: bool = False
    kept_tokens: int = 0


EngineEvent = engine.Allocated | engine.Declined | engine.Token | engine.PrefillDone | engine.Ended
Event = (
    Prepared
    | PrepareFailed
    | TransferCommitted
    | TransferDone
    | TransferFailed
    | Retargeted
    | WaitedEnough
    | Cancelled
    | Broken
    | EngineEvent
)


# ---- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToEngine:
    message: engine.Add | engine.Drop | engine.Retarget | engine.Commit | engine.Release


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the router."""

    message: NodeMessage


@dataclass(frozen=True, slots=True)
class Emit:
    """Put this into the router's next ``Step`` frame, before anything said later."""

    entry: StepEntry


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """Prefill side: offer the KV of ``ids``, prompt and forced ids, to the decode node."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class ExpectTransfer:
    """Decode side: the KV of ``ids``, prompt and forced ids, is wanted."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class GrantTransfer:
    """Decode side: blocks are allocated, the first ``have_tokens`` are already here."""

    have_tokens: int


@dataclass(frozen=True, slots=True)
class ComputeStarted:
    """Prefill side: the prompt has its blocks and is being computed."""


@dataclass(frozen=True, slots=True)
class ComputeEnded:
    """Prefill side: the last layer of the prompt is computed."""


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """Prefill side: ``ids`` follow the forced ids, which both sides were given."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class CancelTransfer:
    """``transfer`` is the id that it had when it began: the leg may have another one by now."""

    code: str
    message: str
    transfer: bytes


@dataclass(frozen=True, slots=True)
class RecordPrefix:
    """KV of the first ``held_tokens`` tokens of the prompt is in this node's cache now."""

    prompt_tokens: int
    held_tokens: int


@dataclass(frozen=True, slots=True)
class AwaitRetarget:
    """Prefill side: send ``WaitedEnough`` after a while, unless ``StopWaiting`` comes first."""


@dataclass(frozen=True, slots=True)
class StopWaiting:
    """Nobody waits for a ``Retarget`` any more."""


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing of this leg is left anywhere; forget it."""


TransferEffect = (
    OpenTransfer
    | ExpectTransfer
    | GrantTransfer
    | ComputeStarted
    | ComputeEnded
    | CommitTransfer
    | CancelTransfer
)
Effect = ToEngine | Say | Emit | TransferEffect | RecordPrefix | AwaitRetarget | StopWaiting | Over
