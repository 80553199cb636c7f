"""What an endpoint tells the agent."""

from __future__ import annotations

from typing import Protocol

from pop_node.kv_stream.spec import Piece
from wire.errors import MeshError
from wire.messages import TransferReport


class KvEvents(Protocol):
    """What the agent is told. Called on the event loop; must neither block nor raise.

    Every transfer ends with exactly one of ``on_done`` (prefill side), ``on_committed`` (decode
    side) and ``on_failed`` (either), also after ``cancel``. Calls into the endpoint from here are
    safe.
    """

    def on_stage_from(
        self, transfer: bytes, have_tokens: int, arrived: list[int], resume: int
    ) -> None:
        """Prefill side: granted; stage all tokens but [0, have_tokens).

        Called again with the next ``resume`` when the transfer goes on after its connection broke:
        stage what comes after ``arrived`` tokens per group, component and layer, if they are given.
        """

    def on_slot_free(self, slot: int) -> None:
        """Prefill side: the export slot may be overwritten; once for every ``staged``."""

    def on_import(self, transfer: bytes, slot: int, piece: Piece) -> None:
        """Decode side: a verified piece lies in the import slot; ``imported`` answers."""

    def on_committed(self, transfer: bytes, ids: list[int]) -> None:
        """Decode side: everything is imported; decode on after ``ids``."""

    def on_done(self, transfer: bytes, report: TransferReport) -> None:
        """Prefill side: the peer decodes on."""

    def on_failed(self, transfer: bytes, error: MeshError, kept_tokens: int) -> None:
        """Either side: the transfer is over.

        Decode side: the first ``kept_tokens`` tokens are complete in all layers by what
        ``on_import`` was told before.
        """

    def on_broken(self) -> None:
        """The endpoint cannot go on, for a reason that is in the log: close it, make another. Said
        once; transfers do not end by it."""
