"""Machines broken on purpose: each of these mistakes must be noticed by the simulation.

A mutation is a context in which one product method does something a little wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.schedule import TransferBound
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream.credit import SlotPool
from pop_node.kv_stream.events import ReceiveInto
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.legs import events as lev
from pop_node.legs.leg import Leg
from pop_node.lifecycle import NodeLifecycle
from registry.watch import Watch
from router.api.event_id import TextProof
from router.http.again import UnheardSink
from router.request import attempt as attempts
from router.request.events import SendSubmit
from router.request.machine import RequestMachine
from router.request.token_relay import TokenRelay
from router.routing.view_builder import ViewBuilder

Mutation = Callable[[], Any]
MUTATIONS: dict[str, Mutation] = {}


def _mutation(function: Callable[[], Iterator[None]]) -> Mutation:
    context = contextmanager(function)
    MUTATIONS[function.__name__.strip("_")] = context
    return context


@_mutation
def _relay_repeats_an_index() -> Iterator[None]:
    """The router relays every fifth entry twice."""
    right = TokenRelay.add

    def wrong(self: TokenRelay, node: str, entry: Any, may_wait: bool) -> Any:
        ready = right(self, node, entry, may_wait)
        return [*ready, *ready[-1:]] if entry.index % 5 == 4 else ready

    with patch.object(TokenRelay, "add", wrong):
        yield


@_mutation
def _late_imports_land() -> Iterator[None]:
    """A closed import is not forgotten, and nobody looks at block generations."""
    right = Stager.close

    def wrong(self: Any, side: str, transfer: bytes) -> None:
        if side == "export":
            right(self, "export", transfer)
        elif transfer in self._incoming:
            held = self._incoming[transfer]
            self._generations = _Same(held.generations[0] if held.generations else 0)

    with patch.object(Stager, "close", wrong):
        yield


class _Same(list[int]):
    """Generations that always look the same."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self._value = value

    def __getitem__(self, index: Any) -> Any:
        return self._value


@_mutation
def _import_slot_is_forgotten() -> Iterator[None]:
    """A slot whose payload came for an ended transfer is not given back."""
    right = SlotPool.release

    def wrong(self: Any, slot: int) -> None:
        if self._owner[slot] in self._promised:
            right(self, slot)

    with patch.object(SlotPool, "release", wrong):
        yield


@_mutation
def _old_attempts_are_heard() -> Iterator[None]:
    """The receiver takes frames of any attempt of a transfer."""

    def wrong(self: Any, peer: str, transfer: bytes, attempt: int, link: int = 0) -> Any:
        return self._incoming.get(transfer)

    with patch.object(Receiver, "_live", wrong):
        yield


@_mutation
def _checksums_are_not_compared() -> Iterator[None]:
    """Whatever arrives is what was sent."""
    seen: dict[tuple[int, int], bytes] = {}
    begins, ended = Receiver._data_begins, Receiver._data_ended

    def remember(self: Any, event: Any, now: float) -> Any:
        effects = begins(self, event, now)
        for effect in effects:
            if isinstance(effect, ReceiveInto):
                seen[id(self), effect.slot] = event.data.checksum
        return effects

    def wrong(self: Any, slot: int, checksum: bytes, now: float) -> Any:
        return ended(self, slot, seen[id(self), slot], now)

    with (
        patch.object(Receiver, "_data_begins", remember),
        patch.object(Receiver, "_data_ended", wrong),
    ):
        yield


@_mutation
def _a_block_is_lost() -> Iterator[None]:
    """The last block of a long table is not given back."""
    right = BlockPool.release

    def wrong(self: BlockPool, blocks: Any) -> None:
        right(self, blocks[:-1] if len(blocks) > 4 else blocks)

    with patch.object(BlockPool, "release", wrong):
        yield


@_mutation
def _prefixes_are_confused() -> Iterator[None]:
    """A hit takes the right number of blocks, but the last one is another."""
    right = BlockPool.match

    def wrong(self: BlockPool, hashes: Any) -> list[int]:
        hits = right(self, hashes)
        return [*hits[:-1], hits[0]] if len(hits) > 1 else hits

    with patch.object(BlockPool, "match", wrong):
        yield


@_mutation
def _credit_is_ignored() -> Iterator[None]:
    """The sender believes that it was granted far more than it was."""
    right = Sender._granted

    def wrong(self: Any, transfer: Any, grant: Any, now: float) -> Any:
        more = replace(grant, credit_bytes=grant.credit_bytes + 100 * 128 * 1024)
        return right(self, transfer, more, now)

    with patch.object(Sender, "_granted", wrong):
        yield


@_mutation
def _forced_ids_are_left_out() -> Iterator[None]:
    """A new attempt does not know what the client has read."""
    right = attempts.begin

    def wrong(*args: Any, **kwargs: Any) -> Any:
        attempt, effects = right(*args, **kwargs)
        submits: list[Any] = effects
        blank = [SendSubmit(e.node, replace(e.message, forced_ids=[])) for e in submits]
        return attempt, blank

    with patch("router.request.machine.begin", wrong):
        yield


@_mutation
def _transfers_outlive_their_leg() -> Iterator[None]:
    """A leg that ends does not give up its transfer."""

    def wrong(self: Any, code: str, message: str) -> list[lev.Effect]:
        self._transfer_open = False
        return []

    with patch.object(Leg, "_cancel_transfer", wrong):
        yield


@_mutation
def _link_loss_is_not_heard() -> Iterator[None]:
    """A request whose node's link broke goes on waiting."""

    def wrong(self: Any, node: str, now: float) -> list[Any]:
        return []

    with patch.object(RequestMachine, "_on_link_lost", wrong):
        yield


@_mutation
def _reservations_stay() -> Iterator[None]:
    """What was reserved for a leg is released neither at its end nor by a Load."""
    right = ViewBuilder.set_load

    def wrong(self: Any, name: str, load: Any, now: float) -> None:
        right(self, name, load, now - 1e6)

    with (
        patch.object(ViewBuilder, "set_load", wrong),
        patch.object(ViewBuilder, "release", lambda self, name, stream: None),
    ):
        yield


@_mutation
def _engines_stay_dead() -> Iterator[None]:
    """An engine that exits is not started again."""
    right = NodeLifecycle._engine_exited

    def wrong(self: Any, model: str, now: float) -> None:
        right(self, model, now)
        self._engines[model].restart_at = None

    with patch.object(NodeLifecycle, "_engine_exited", wrong):
        yield


@_mutation
def _the_watch_gives_up() -> Iterator[None]:
    """After a failure the registry is not asked again."""
    right = Watch._take_failure

    def wrong(self: Any, jitter: float, now: float) -> None:
        right(self, jitter, now)
        self._ask_at = None

    with patch.object(Watch, "_take_failure", wrong):
        yield


@_mutation
def _blocks_are_told_before_they_are_bound() -> Iterator[None]:
    """The engine says ``Allocated`` while nothing stands behind the transfer yet."""

    def wrong_order(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(self: Scheduler, *args: Any) -> Any:
            schedule, effects = right(self, *args)
            return schedule, sorted(effects, key=lambda effect: isinstance(effect, TransferBound))

        return wrong

    with patch.object(Scheduler, "schedule", wrong_order(Scheduler.schedule)):
        yield


@_mutation
def _what_was_read_comes_again() -> Iterator[None]:
    """An answer that is computed again is sent from its beginning."""

    def wrong(self: Any, escaped: bytes, upto: int) -> None:
        self._sink.text(escaped, upto)

    with patch.object(UnheardSink, "text", wrong):
        yield


@_mutation
def _who_joins_hears_too_much() -> Iterator[None]:
    """Who comes back while an answer is computed again is sent all that comes from then on."""
    right = UnheardSink.__init__

    def wrong(self: Any, *args: Any) -> None:
        right(self, *args)
        if self._so_far != TextProof():
            self._state = "heard"

    with patch.object(UnheardSink, "__init__", wrong):
        yield
