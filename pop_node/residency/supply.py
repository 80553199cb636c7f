"""The node's disk: models are brought to it, given to other nodes, and removed for others.

A thin shell around ``pop_node.peers``; what is brought when is ``residency``'s to decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from pop_node.agent_config import AgentConfig
from pop_node.authorization import Authorization
from pop_node.peers.bring import Bringing
from pop_node.peers.bringer import Bringer, Via
from pop_node.peers.client import Dialing
from pop_node.peers.giver import Giver
from pop_node.peers.neighbours import BUNDLES_KEY, BUNDLES_SERVICE
from pop_node.registration import keeper
from pop_node.store.holding import Hold
from pop_node.store.store import Bundle, Store
from registry.client import Registry
from registry.entries import ServiceEntry
from registry.keeper import Keeper
from topology.budget import disk_budget
from topology.model import BYTES_PER_MBIT, Node
from wire.address import is_loopback, parse_address
from wire.errors import ConfigError
from wire.messages import Giving

log = logging.getLogger(__name__)


def gives_bundles(node: Node) -> bool:
    """Whether other nodes can reach this one's bundles: its listener may be left on loopback, the
    default, while its others are not."""
    return not is_loopback(node.bundles.host) or is_loopback(node.mesh.host)


def can_be_fetched(config: AgentConfig, model: str) -> bool:
    """Is there somebody to bring it from: another node, or where it is from?"""
    nodes = config.topology.nodes.values()
    others = any(model in node.models and node.name != config.node.name for node in nodes)
    return others or config.topology.models[model].source is not None


class Supply:
    """One per node."""

    def __init__(
        self, config: AgentConfig, registry: Registry, is_busy: Callable[[], bool]
    ) -> None:
        node, credentials = config.node, config.credentials
        self._mesh = config.topology.mesh
        authorization = Authorization(config.topology, credentials)
        self._node = node
        self._registry = registry
        self._server_ssl = credentials.server_context() if credentials else None
        self.store = Store(config.store)
        self._bringer = Bringer(
            self.store,
            node,
            config.topology,
            self._entries,
            Dialing(
                node.name,
                config.dialer,
                credentials.client_context() if credentials else None,
                authorization.check_node,
            ),
        )
        self._giver = Giver(
            self.store,
            node=node.name,
            rate_bytes_per_s=node.give_mbps * BYTES_PER_MBIT,
            is_busy=is_busy,
            authorize=authorization.check_node,
            wanting=self._bringer.wanted,
            bringing=self._bringer.from_origin,
        )
        self._keeper: Keeper | None = None

    async def _entries(self) -> tuple[ServiceEntry, ...]:
        return (await self._registry.services(BUNDLES_SERVICE)).entries

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Give from now on, and say so. Raises ``ConfigError`` if the address is taken."""
        node = self._node
        if not gives_bundles(node):
            return
        told = await self._giver.start(node.bundles.host, node.bundles.port, self._server_ssl)
        meta = {"mesh": self._mesh, "name": node.name, "site": node.site, BUNDLES_KEY: told}
        name = f"{self._mesh}:{node.name}:bundles"
        self._keeper = keeper(self._registry, name, BUNDLES_SERVICE, parse_address(told), meta)
        tasks.create_task(self._keeper.run(), name="registration of bundles")

    async def bring(
        self,
        model: str,
        on_progress: Callable[[Bringing], None] = lambda bringing: None,
        via: Via = "any",
    ) -> None:
        """Have the model on the disk. Raises ``ConfigError`` when it cannot be had."""
        await self._bringer.bring(model, on_progress, via)

    def giving(self) -> Giving:
        """What other nodes take from this one."""
        now = self._giver.statistics()
        return Giving(now.given_bytes, now.turned_away, now.takers, now.bytes_per_s)

    def arriving(self, model: str) -> Bundle | None:
        """What an engine can begin to load of a model that is being brought; looks at the disk."""
        return self._bringer.arriving(model)

    async def free_bytes(self) -> int | None:
        """Room for more bundles within ``disk_gb``; None without a bound, or if nobody knows."""
        budget = disk_budget(self._node)
        if budget is None:
            return None
        try:
            rows = await asyncio.to_thread(self.store.rows)
        except ConfigError as exc:
            log.warning("the store cannot be measured: %s", exc)
            return None
        return budget - sum({row.entry.bundle: row.nbytes for row in rows}.values())

    async def make_room(self, newest: Path) -> list[str]:
        """Remove the least recently used models beyond ``disk_gb``, but not the bundle ``newest``;
        returns the node's models that are gone."""
        budget = disk_budget(self._node)
        if budget is None:
            return []
        try:
            hold = Hold(newest)
            try:
                collected = await asyncio.to_thread(self.store.gc, budget, abandoned=False)
            finally:
                hold.close()
        except ConfigError as exc:
            log.error("the store cannot be cleared: %s", exc)
            return []
        if collected.kept_bytes > budget:
            log.warning(
                "models take %.1f GB of the disk, %.1f are allowed: the rest is in use or pinned",
                collected.kept_bytes / 1e9,
                budget / 1e9,
            )
        gone = {name for bundle in collected.bundles for name in bundle.names}
        return [name for name in self._node.models if name in gone]

    async def close(self) -> None:
        """Nothing is given any more; call when every ``bring`` has ended."""
        if self._keeper is not None:
            await self._keeper.close()
        await self._giver.close()
        self._bringer.close()
