"""The words between a link and the rest of the router: what streams hear, where facts about a node
go, who this router says it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from wire.address import Dialer
from wire.errors import MeshError
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Accepted,
    CacheDelta,
    Detached,
    Failed,
    Finished,
    Hello,
    Load,
    Loading,
    ModelOffer,
    Refused,
    StepEntry,
)
from wire.tls import Credentials

StreamMessage = Accepted | Loading | Refused | Finished | Failed | Detached
"""What a node says about one stream, tokens apart."""


class StreamListener(Protocol):
    """Who hears what is said about one stream. Calls come from the event loop, must not block."""

    def tokens(self, node: str, entry: StepEntry) -> None:
        """New tokens."""

    def said(self, node: str, message: StreamMessage) -> None:
        """A control message."""

    def link_lost(self, node: str) -> None:
        """The link went away while the stream was open on it."""


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """Where a link reports facts about its node; ``closed`` carries why."""

    up: Callable[[str, Hello], None]
    down: Callable[[str, MeshError], None]
    rtt: Callable[[str, float], None]
    load: Callable[[str, Load], None]
    cache: Callable[[str, CacheDelta], None]
    draining: Callable[[str], None]
    offers: Callable[[str, list[ModelOffer]], None]


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """Who this router says it is, and how it reaches nodes."""

    mesh: str
    name: str
    site: str
    incarnation: str
    dialer: Dialer
    credentials: Credentials | None

    def hello(self) -> Hello:
        """This router's greeting."""
        return Hello(
            min_version=MIN_VERSION,
            max_version=MAX_VERSION,
            mesh=self.mesh,
            kind="router",
            name=self.name,
            site=self.site,
            incarnation=self.incarnation,
            roles=[],
            models=[],
        )
