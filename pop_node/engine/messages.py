"""What agent and engine process say to each other over their local socket.

Plain frozen dataclasses, carried by ``pop_node.engine.boundary`` as msgpack arrays ``[tag,
*fields]``. Needs neither torch nor msgspec: both sides import it. Bulk KV bytes never travel here:
they lie in the shared staging memory and messages name its slots.

``seq`` is a number minted by the agent, one per leg, never reused while the engine process lives.
``transfer`` is the 16-byte transfer id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pop_node.kv_stream.spec import Piece

Leg = Literal["prefill", "decode", "both"]


@dataclass(frozen=True, slots=True)
class InSlot:
    """What is said of a piece in staging slot ``slot``; the numbers are those of ``Piece``."""

    transfer: bytes
    slot: int
    group: int
    component: int
    layer_lo: int
    layer_hi: int
    token_lo: int
    token_hi: int

    @property
    def piece(self) -> Piece:
        """Which one it is."""
        return Piece(
            self.group, self.component, self.layer_lo, self.layer_hi, self.token_lo, self.token_hi
        )


# ---- agent -> engine ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Add:
    """Queue a sequence.

    A prefill leg computes the prompt, samples (or is forced to) the tokens up to the hand-off,
    then keeps its blocks pinned until ``Release``. A decode leg allocates blocks, answers
    ``Allocated`` and waits for its KV (``Import`` .. ``Commit``). ``max_tokens`` counts forced ids
    too and is already capped to the context. ``salt`` separates tenants in the prefix cache.
    ``top_k`` 0 keeps every token, like ``min_p`` 0; penalties that do nothing are 0, 0 and 1.
    """

    seq: int
    leg: Leg
    prompt_ids: list[int]
    forced_ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: list[int]
    salt: bytes
    transfer: bytes
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Drop:
    """Cancel a sequence at whatever stage; its blocks and its transfer are freed, ``Ended``
    follows.

    ``kept_tokens`` is for a decode leg whose KV was coming in: so many tokens at the beginning are
    complete in all layers by the ``Import`` messages sent before this one. Their full blocks stay
    in the prefix cache.
    """

    seq: int
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StageFrom:
    """Prefill side: the decode site granted the transfer and already holds tokens [0,
    have_tokens).

    ``resume`` counts how often the transfer was resumed after its connection broke. With each of
    them staging starts again: ``arrived`` holds, per group, component and layer of the ``KvSpec``
    in this order, how many tokens at the beginning the decode site has by now; empty means
    ``have_tokens`` everywhere.
    """

    transfer: bytes
    have_tokens: int
    arrived: list[int] = field(default_factory=list)
    resume: int = 0


@dataclass(frozen=True, slots=True)
class Retarget:
    """Prefill side: the KV of ``transfer`` goes to another decode site as ``new_transfer``.

    The old transfer is over, nothing is granted yet under the new one, and what is computed stays.
    """

    transfer: bytes
    new_transfer: bytes


@dataclass(frozen=True, slots=True)
class SlotFree:
    """Prefill side: staging slot ``slot`` may be overwritten."""

    slot: int


@dataclass(frozen=True, slots=True)
class Release:
    """Prefill side: the transfer is over (done or failed); unpin its blocks. ``Ended`` follows."""

    transfer: bytes


@dataclass(frozen=True, slots=True)
class Import(InSlot):
    """Decode side: staging slot ``slot`` holds this piece, verified; scatter it, answer
    ``Imported``.
    """


@dataclass(frozen=True, slots=True)
class Commit:
    """Decode side: all KV of the prompt (and of ids[:-1]) is in; go on after ``ids``."""

    transfer: bytes
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process cleanly."""


# ---- engine -> agent ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and a token was produced.

    ``kv_spec`` is ``KvSpec.to_dict()`` of the model. ``phases_ms`` times the start: ``import``,
    ``load``, ``warm``, and of a bundle's ``load`` the parts, which overlap: ``read``, ``verify``,
    ``decode``, ``pack``, ``to_device``, ``bind``. ``phase_bytes`` says how much went through each.

    ``phases`` is the same start as (phase, start_s, end_s, bytes), counted from the start of the
    process and ordered by start: ``process_start`` (until our first line ran), ``imports``,
    ``standby`` (waiting for a set-up), ``setup``, ``load`` (a bundle is read beside the imports,
    with ``read``, ``verify``, ``decode``, ``pack``, ``to_device`` inside), ``kernels``, ``bind``,
    ``warm``, and inside it ``first_token``, at whose end the first token was there.
    """

    pid: int
    block_tokens: int
    total_blocks: int
    context_tokens: int
    backend: str
    kv_spec: dict[str, Any]
    phases_ms: dict[str, float]
    phase_bytes: dict[str, int] = field(default_factory=dict)
    phases: list[tuple[str, float, float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Allocated:
    """The sequence entered the running set: ``cached_tokens`` of its prompt came from the cache.

    For a decode leg this is the moment to ``Grant``: all blocks of the prompt and of the forced ids
    are allocated, and ``cached_tokens``, which may reach into the forced ids, need not be sent.
    """

    seq: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Declined:
    """The engine will never run this sequence (e.g. it exceeds all blocks). Nothing is held."""

    seq: int
    code: str
    message: str


class Token(NamedTuple):
    """Token ``id`` of ``seq`` at output ``index``; ``finish`` is "", "stop", "length" or
    "handoff".
    """

    seq: int
    index: int  # type: ignore[assignment]  # of the output; nobody looks for fields of a token
    id: int
    finish: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """Results of one engine step, with the load after it. Rates: 0 means not measured yet.

    ``tokens`` holds the fields of ``Token``. ``pinned`` counts sequences that hold blocks only for
    a transfer: prefill legs until ``Release`` and decode legs until ``Commit``. Also sent without
    tokens when the load changed between steps. ``drafted`` tokens were guessed since the engine
    began, ``accepted`` of them rightly.
    """

    tokens: list[tuple[int, int, int, str]]
    queued_prefill_tokens: int
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    prefill_tokens_per_s: float
    decode_step_ms: float
    pinned: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The last layer of the last prompt token is computed; token 0 follows. Where the step streams
    no KV it is told after the draw, just before token 0, and ``compute_ms`` counts that.
    """

    seq: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class Staged(InSlot):
    """Prefill side: staging slot ``slot`` holds ``nbytes`` bytes of this piece.

    ``resume`` is that of the ``StageFrom`` that it was staged for.
    """

    nbytes: int
    resume: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """Decode side: the slot is free: its piece is in its blocks or its transfer is gone."""

    transfer: bytes
    slot: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The sequence is gone from the engine and holds nothing any more."""

    seq: int


@dataclass(frozen=True, slots=True)
class Beat:
    """Sign of life of the thread beside the main loop. That has been at its present turn (a command
    or a step) for ``busy_s`` seconds; 0.0 while it has nothing to do."""

    busy_s: float


@dataclass(frozen=True, slots=True)
class Crashed:
    """Last words of an engine that cannot go on; the process exits afterwards."""

    message: str


AgentMessage = Add | Drop | Retarget | StageFrom | SlotFree | Release | Import | Commit | Stop
EngineMessage = (
    Ready | Allocated | Declined | StepDone | PrefillDone | Staged | Imported | Ended | Crashed
)
"""What an engine has to say. ``Beat`` is none of it: the client keeps it to itself."""
