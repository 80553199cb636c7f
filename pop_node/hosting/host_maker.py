"""From a bundle in the store to the host of its model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from pop_node.agent_config import AgentConfig
from pop_node.authorization import Authorization
from pop_node.engine.config import Ahead, EngineConfig
from pop_node.engine.spawn import Launch
from pop_node.hosting.generation import HostSettings
from pop_node.hosting.memory import cold_offer, model_memory, model_size
from pop_node.hosting.model_host import ModelHost
from pop_node.store.bundle import UnusableTextError
from pop_node.store.store import Bundle, Store
from pop_node.text.tokenizer import TextCodec
from topology.cores import engine_threads, usable_cores
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle with what the agent needs of it; ``memory_bytes`` while its model is warm."""

    bundle: Bundle
    codec: TextCodec
    memory_bytes: int
    load_bytes: int


@dataclass(frozen=True, slots=True)
class Told:
    """Whom hosts tell, by model."""

    ready: Callable[[str], None]
    exited: Callable[[str], None]
    load_changed: Callable[[], None]
    legs: Callable[[str], None]


class HostMaker:
    """Knows what all hosts of a node have in common."""

    def __init__(
        self,
        config: AgentConfig,
        incarnation: str,
        executor: Executor,
        launch: Launch,
        must_work: Callable[[], bool],
        told: Told,
    ) -> None:
        """``executor`` is for text; the others are as in ``HostSettings``."""
        self._config = config
        self._incarnation = incarnation
        self._executor = executor
        self._launch = launch
        self._must_work = must_work
        self._told = told
        node = config.node
        self._threads = engine_threads(node, usable_cores(), len(node.models))
        self._authorization = Authorization(config.topology, config.credentials)

    def open(self, name: str) -> Opened:
        """Read what the agent needs of a model; takes its time, from any thread.

        Raises ``UnusableTextError`` when its text files are damaged or not understood,
        ``ConfigError`` when it is not in the store, otherwise damaged, or not the one pinned.
        """
        return self.open_bundle(name, Store(self._config.store).get(name))

    def open_bundle(self, name: str, bundle: Bundle) -> Opened:
        """As ``open``, of a bundle that may still be arriving."""
        _check_bundle(bundle, self._config.topology.models[name].digest, name)
        try:
            codec = TextCodec.load(bundle.path)
        except ConfigError as exc:
            raise UnusableTextError(str(exc)) from exc
        memory_bytes = model_memory(bundle.manifest, self._config.node)
        weights_bytes = model_size(bundle.manifest).weights_on(self._config.node)
        return Opened(bundle, codec, memory_bytes, weights_bytes)

    def ahead(self, memory_bytes: int, touched_bytes: int) -> Ahead:
        """What an engine of any of the node's models can have ready."""
        node = self._config.node
        invariant = node.batch_invariant
        return Ahead(node.backend, self._threads, invariant, memory_bytes, touched_bytes)

    def make(self, name: str, opened: Opened) -> ModelHost:
        """A host that was not started yet, with its offer."""
        config, node = self._config, self._config.node
        model, manifest = config.topology.models[name], opened.bundle.manifest
        credentials = config.credentials
        position = node.models.index(name)
        settings = HostSettings(
            mesh=config.topology.mesh,
            node=node.name,
            site=node.site,
            incarnation=self._incarnation,
            model=name,
            identity=manifest.identity,
            engine=EngineConfig(
                model_dir=opened.bundle.path,
                dtype=model.dtype,
                backend=node.backend,
                threads=self._threads,
                kv_tokens=node.kv_tokens,
                context_tokens=model.context_tokens,
                batch_invariant=node.batch_invariant,
                weights=node.weights,
            ),
            kv_host=node.kv.host,
            kv_port=node.kv.port + position if node.kv.port else 0,
            dialer=config.dialer,
            server_ssl=credentials.server_context() if credentials else None,
            client_ssl=credentials.client_context() if credentials else None,
            authorize_peer=self._authorization.check_node,
            detection_s=config.topology.detection_s,
            launch=self._launch,
            must_work=self._must_work,
        )
        host = ModelHost(
            settings,
            opened.codec,
            self._executor,
            on_ready=self._told.ready,
            on_exited=self._told.exited,
            on_load_changed=self._told.load_changed,
            on_legs=self._told.legs,
        )
        host.facts.offer = cold_offer(
            name, manifest, settings.engine, settings.kv_host, settings.kv_port
        )
        return host


def _check_bundle(bundle: Bundle, digest: str | None, name: str) -> None:
    if digest is not None and bundle.manifest.identity != digest:
        raise ConfigError(
            f"model {name} in the store has digest {bundle.manifest.identity}, the topology pins "
            f"{digest}",
            where=str(bundle.path),
            suggestion="add the pinned model again with 'popmesh model add'",
        )
