"""Messages of the mesh wire (router <-> node).

Owns what is said; ``wire.framing`` owns how it is cut into frames. Every message is a msgspec
struct encoded as a msgpack array ``[tag, field, field, ...]``, so a newer peer may append fields
with defaults and an older one ignores them. Durations travel, wall-clock times never do: a field
that ends in ``_ms`` or ``_s`` is a length of time.

A *stream* is a number minted by one router for one (attempt, choice); it is never reused while that
router process lives. Both legs of an attempt carry the same stream number.
"""

from __future__ import annotations

from wire.messages.base import (
    MAX_VERSION,
    MIN_VERSION,
    FinishReason,
    Leg,
    Role,
)
from wire.messages.from_node import (
    Accepted,
    Attached,
    Detached,
    DrillReport,
    DrillStarted,
    Failed,
    Finished,
    Loading,
    Refused,
    Step,
    StepEntry,
    TransferReport,
)
from wire.messages.from_router import (
    COLD_START,
    DRILL_FAULTS,
    LOSE_AGENT,
    MAX_AWAY_MS,
    MAX_COLD_START_MS,
    MAX_FREEZE_MS,
    NO_FAULT,
    Attach,
    Cancel,
    Drill,
    Retarget,
    Submit,
    Transfer,
    Warm,
)
from wire.messages.inputs import (
    ChatInput,
    ChatTurn,
    Input,
    Sampling,
    TextInput,
    TokensInput,
)
from wire.messages.link import (
    Goodbye,
    Hello,
    ModelOffer,
    Part,
    Ping,
    Pong,
)
from wire.messages.load import (
    CacheDelta,
    Draining,
    EngineLoad,
    Giving,
    LinkRate,
    Load,
    Offers,
    Warmth,
)

RouterMessage = (
    Hello | Goodbye | Ping | Pong | Part | Submit | Cancel | Retarget | Attach | Drill | Warm
)
NodeMessage = (
    Hello
    | Goodbye
    | Ping
    | Pong
    | Part
    | Accepted
    | Refused
    | Step
    | Finished
    | Failed
    | Load
    | CacheDelta
    | Draining
    | Detached
    | Attached
    | DrillStarted
    | Offers
    | Loading
    | DrillReport
)
Message = RouterMessage | NodeMessage

__all__ = [
    "COLD_START",
    "DRILL_FAULTS",
    "LOSE_AGENT",
    "MAX_AWAY_MS",
    "MAX_COLD_START_MS",
    "MAX_FREEZE_MS",
    "MAX_VERSION",
    "MIN_VERSION",
    "NO_FAULT",
    "Accepted",
    "Attach",
    "Attached",
    "CacheDelta",
    "Cancel",
    "ChatInput",
    "ChatTurn",
    "Detached",
    "Draining",
    "Drill",
    "DrillReport",
    "DrillStarted",
    "EngineLoad",
    "Failed",
    "FinishReason",
    "Finished",
    "Giving",
    "Goodbye",
    "Hello",
    "Input",
    "Leg",
    "LinkRate",
    "Load",
    "Loading",
    "Message",
    "ModelOffer",
    "NodeMessage",
    "Offers",
    "Part",
    "Ping",
    "Pong",
    "Refused",
    "Retarget",
    "Role",
    "RouterMessage",
    "Sampling",
    "Step",
    "StepEntry",
    "Submit",
    "TextInput",
    "TokensInput",
    "Transfer",
    "TransferReport",
    "Warm",
    "Warmth",
]
