"""Brings one model into the store: from peers as long as they have it, from its origin last.

Blocks its thread; ``stop`` ends it from another one. What has arrived stays in the store, and the
next attempt goes on from there.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pop_node.peers.choice import START_S, Offer, best_offer, origin_wait_s
from pop_node.peers.client import Dialing, PeerBusyError, PeerLacksError, PeerSource
from pop_node.peers.gathering import Gathering
from pop_node.peers.neighbours import Peer
from pop_node.peers.patience import least_bytes_per_s
from pop_node.peers.survey import Survey
from pop_node.store.adding import check_identity
from pop_node.store.bundle import FalseClaimError
from pop_node.store.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    decode_manifest,
)
from pop_node.store.origin import InterruptedReadError
from pop_node.store.partial import Partial
from pop_node.store.store import Store
from topology.model import Model, Node, Topology
from wire.errors import ConfigError

FIRST_ANSWERS_S = 1.5
"""Guess: how long to wait for the slowest of the nearest peers before choosing among the others."""

ANSWERS_S = 10.0
"""Guess: how long to wait for any of the nearest peers to say that it has the model, while some did
not answer yet."""

LOOK_S = 0.25
"""How often a node that waits for its turn looks around."""

Peers = Callable[[], Sequence[Peer]]
"""The peers known now, the quickest first; may be called from any thread."""


class StoppedError(Exception):
    """Nobody wants the model any more."""


class _NobodyError(ConfigError):
    """The peers that may be asked cannot bring the rest."""


@dataclass(frozen=True, slots=True)
class Bringing:
    """How far it is.

    ``phase``: ``look`` (who has it), ``wait`` (for others that bring it), those of ``Store.add``,
    or ``done``. ``rate_bytes_per_s`` since the phase began. ``sources``: bytes of data by peer,
    "origin" for the origin.
    """

    model: str
    phase: str = "look"
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    sources: dict[str, int] = field(default_factory=dict)

    @property
    def eta_s(self) -> float | None:
        """Until the phase ends at this rate; None if not known."""
        if self.rate_bytes_per_s <= 0 or self.total_bytes <= 0:
            return None
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_per_s


class Bring:
    """One model on its way; ``run`` once."""

    def __init__(
        self,
        store: Store,
        model: Model,
        node: Node,
        topology: Topology,
        peers: Peers,
        dialing: Dialing,
        rng: random.Random,
        on_progress: Callable[[Bringing], None],
    ) -> None:
        """``on_progress`` is called in threads of this object, one at a time."""
        self._store = store
        self._model = model
        self._node = node
        self._topology = topology
        self._peers = peers
        self._dialing = dialing
        self._rng = rng
        self._on_progress = on_progress
        self._stop = threading.Event()
        self._telling = threading.RLock()
        self._state = Bringing(model.name)
        self._phase_began = (time.monotonic(), 0)
        self._gathering: Gathering | None = None
        self._survey = Survey(dialing)
        self._refused: set[str] = set()  # bundles that are not what they claim to be
        self._passed_over: set[str] = set()  # peers that are not asked again
        self._problems: list[str] = []
        self.from_origin = False
        self.rates: dict[str, float] = {}

    def stop(self) -> None:
        """From any thread: ``run`` raises ``StoppedError`` soon."""
        self._stop.set()
        gathering = self._gathering
        if gathering is not None:
            gathering.abort()

    def run(self) -> Manifest:
        """The manifest of the model, which is in the store now.

        Raises ``ConfigError`` if nobody has it, what there is is another model, or the disk is full
        or read-only; ``StoppedError``.
        """
        try:
            self._check_stop()
            if self._store.has(self._model.name):
                manifest = self._store.get(self._model.name).manifest
                check_identity(manifest, self._model.digest)
                return manifest
            self._survey.refresh(self._peers())
            self._survey.wait(FIRST_ANSWERS_S)
            began = time.monotonic()
            brought = None
            while brought is None:
                self._check_stop()
                offer = self._offer()
                if offer is not None:
                    brought = self._from_peers(offer)
                elif self._survey.is_undecided() and time.monotonic() - began < ANSWERS_S:
                    self._stop.wait(LOOK_S)
                elif not self._wait_for_others():
                    brought = self._from_origin()
            self._tell(phase="done")
            return brought
        finally:
            self._survey.close()

    # ---- peers ---------------------------------------------------------------------------------

    def _offer(self) -> Offer | None:
        peers = [peer for peer in self._peers() if peer.name not in self._passed_over]
        self._survey.refresh(peers)
        begun = {manifest.bundle for _, manifest in self._store.partials()}
        return best_offer(self._model, peers, self._survey.found(), begun, self._refused)

    def _from_peers(self, offer: Offer) -> Manifest | None:
        """None if these peers cannot bring it: they are not to be offered again.

        Raises ``ConfigError`` where others would not help: the disk is full, the name is taken.
        """
        manifest = self._manifest(offer)
        if manifest is None:
            return None
        try:
            return self._store.receive(
                manifest,
                self._model.name,
                self._model.source or f"mesh:{self._topology.mesh}",
                lambda partial: self._fill(partial, offer),
                self._report,
            )
        except _NobodyError as exc:
            self._problems.append(str(exc))
            self._passed_over.update(peer.name for peer in offer.holders)
        except FalseClaimError as exc:
            self._problems.append(str(exc))
            self._refused.add(offer.bundle)
        return None

    def _manifest(self, offer: Offer) -> Manifest | None:
        """From the first holder that gives the right one; None if none does."""
        for peer in offer.holders:
            self._check_stop()
            source = PeerSource(peer, offer.bundle, self._dialing)
            try:
                data = source.read(MANIFEST_FILE, MAX_MANIFEST_BYTES)
                manifest = decode_manifest(data, where=f"{peer.name}/{MANIFEST_FILE}")
                if manifest.bundle != offer.bundle:
                    raise ConfigError(f"{peer.name} gave another bundle's manifest")
                check_identity(manifest, self._model.digest)
                return manifest
            except (InterruptedReadError, PeerBusyError, PeerLacksError, ConfigError) as exc:
                self._problems.append(f"{peer.name}: {exc}")
                self._passed_over.add(peer.name)
            finally:
                source.close()
        return None

    def _fill(self, partial: Partial, offer: Offer) -> None:
        missing = partial.missing_chunks(self._report)
        data = partial.manifest.data
        done = data.nbytes - sum(data.span(index)[1] for index in missing)
        self._tell(phase="fetch", done_bytes=done, total_bytes=data.nbytes)
        gathering = Gathering(
            partial,
            lambda: self._holders(partial.manifest.bundle),
            self._must_hold_out,
            self._least_bytes_per_s,
            self._dialing,
            self._arrived,
            self._rng,
        )
        self._gathering = gathering
        with ThreadPoolExecutor(1, thread_name_prefix="texts") as pool:
            texts = pool.submit(self._texts, partial, offer)
            texts.add_done_callback(lambda done: gathering.abort() if done.exception() else None)
            try:
                self._check_stop()
                complete = gathering.run()
            finally:
                self._gathering = None
                self.rates.update(gathering.rates())
            texts.result()
        self._check_stop()
        if not complete:
            reasons = "; ".join(f"{name}: {why}" for name, why in gathering.reasons().items())
            raise _NobodyError(f"no peer brings the rest of the bundle ({reasons or 'too slow'})")

    def _texts(self, partial: Partial, offer: Offer) -> None:
        """Text files, each from the first holder that gives the right one, beside the chunks: some
        round trips. With them the manifest's claims can be checked."""
        for peer in offer.holders:
            source = PeerSource(peer, offer.bundle, self._dialing)
            try:
                for entry in partial.missing_texts():
                    self._check_stop()
                    if not partial.put_text(entry, source.read(entry.name, entry.nbytes)):
                        self._passed_over.add(peer.name)
                        break
                else:
                    partial.check_claims()
                    return
            except (InterruptedReadError, PeerBusyError, PeerLacksError) as exc:
                self._problems.append(f"{peer.name}: {exc}")
            finally:
                source.close()
        raise _NobodyError("no peer gives the text files of the bundle")

    def _holders(self, bundle: str) -> Sequence[Peer]:
        offer = self._offer()
        if offer is None or offer.bundle != bundle:
            return ()
        return [peer for peer in offer.holders if peer.name not in self._passed_over]

    def _least_bytes_per_s(self, holders: Sequence[Peer]) -> float:
        """Slow peers are better than nobody."""
        if self._model.source is None:
            return 0.0
        return least_bytes_per_s(self._topology, self._node, (peer.name for peer in holders))

    # ---- the origin ----------------------------------------------------------------------------

    def _must_hold_out(self) -> bool:
        """Whether peers will have what is missing, because one of this site brings it."""
        return self._model.source is not None and self._origin_wait_s(START_S) > 0

    def _origin_wait_s(self, waited_s: float) -> float:
        found, peers = self._survey.found(), self._peers()
        seen = {self._node.name, *(peer.name for peer in peers)}
        unseen = {
            name
            for name, node in self._topology.nodes.items()
            if self._model.name in node.models and name not in seen
        }
        return origin_wait_s(self._model, self._node, peers, found, waited_s, unseen)

    def _wait_for_others(self) -> bool:
        """Wait until it is this node's turn; True if there is an offer before that."""
        began = time.monotonic()
        while self._model.source is not None:
            if self._origin_wait_s(time.monotonic() - began) <= 0:
                if self._goes_alone():
                    return False
                began = time.monotonic()
            self._tell(phase="wait")
            self._stop.wait(LOOK_S)
            self._check_stop()
            if self._offer() is not None:
                return True
        return False

    def _goes_alone(self) -> bool:
        """Say that this node goes to the origin, then ask the others of its site what they do: of
        two that go at the same moment at least one hears of the other, and turns back."""
        self.from_origin = True
        said_at = time.monotonic()
        while time.monotonic() < said_at + ANSWERS_S:
            peers = self._peers()
            self._survey.refresh(peers, since=said_at)
            near = [peer for peer in peers if peer.site == self._node.site]
            if self._survey.has_heard(near, said_at):
                break
            self._survey.wait(LOOK_S)
            self._check_stop()
        if self._offer() is None and self._origin_wait_s(math.inf) <= 0:
            return True
        self.from_origin = False
        return False

    def _from_origin(self) -> Manifest:
        model = self._model
        if model.source is None:
            problems = "; ".join(self._problems[-5:])
            raise ConfigError(
                f"no node gives {model.name}, and the topology names no source of it"
                + (f": {problems}" if problems else ""),
                suggestion="add a source to the model, or start a node that has it",
            )
        self.from_origin = True
        try:
            return self._store.add(
                model.source, model.name, model.dtype, self._report, model.digest
            )
        finally:
            self.from_origin = False

    # ---- progress ------------------------------------------------------------------------------

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StoppedError

    def _report(self, phase: str, done: int, total: int) -> None:
        """As ``Progress``; also where an origin's threads notice that nobody waits any more."""
        self._check_stop()
        with self._telling:
            sources = self._state.sources
            if self.from_origin and phase in ("fetch", "download", "convert"):
                before = self._state.done_bytes if self._state.phase == phase else done
                brought = sources.get("origin", 0) + max(0, done - before)
                sources = {**sources, "origin": brought}
            self._tell(phase=phase, done_bytes=done, total_bytes=total, sources=sources)

    def _arrived(self, peer: str, nbytes: int) -> None:
        with self._telling:
            sources = self._state.sources
            self._tell(
                done_bytes=self._state.done_bytes + nbytes,
                sources={**sources, peer: sources.get(peer, 0) + nbytes},
            )

    def _tell(
        self,
        phase: str | None = None,
        done_bytes: int | None = None,
        total_bytes: int | None = None,
        sources: dict[str, int] | None = None,
    ) -> None:
        with self._telling:
            state = self._state
            now = time.monotonic()
            if phase is not None and phase != state.phase:
                self._phase_began = (now, done_bytes or 0)
            done = state.done_bytes if done_bytes is None else done_bytes
            began, first = self._phase_began
            self._state = replace(
                state,
                phase=phase or state.phase,
                done_bytes=done,
                total_bytes=state.total_bytes if total_bytes is None else total_bytes,
                rate_bytes_per_s=(done - first) / (now - began) if now > began else 0.0,
                sources=state.sources if sources is None else sources,
            )
            with suppress(RuntimeError):  # the loop that listened is closed
                self._on_progress(self._state)
