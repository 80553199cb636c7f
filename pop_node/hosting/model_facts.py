"""What routers are told about one model on this node: the offer, the load, the prefix directory.

Plain state; ``pop_node.hosting.model_host`` feeds it with what its engine says.
"""

from __future__ import annotations

from pop_node.engine.messages import Ready, StepDone
from pop_node.hosting.prefix_directory import PrefixDirectory
from pop_node.kv_stream.statistics import KvStatistics
from wire.messages import EngineLoad, ModelOffer

QUEUED_TOKENS_STEP = 512
"""A change of the prefill queue by this much (one step's budget) is worth telling routers at once.
"""

_NO_LOAD = StepDone([], 0, 0, 0, 0, 0, 0.0, 0.0, 0)


class ModelFacts:
    """``offer`` is None before the first ready.

    It holds for every engine that follows: a router that comes while one restarts hears that the
    model is served here, and from the load when it is ready again.
    """

    def __init__(self, model: str, kv_tokens: int) -> None:
        self.offer: ModelOffer | None = None
        self.directory = PrefixDirectory(model, kv_tokens)
        self._model = model
        self._last = self._told = _NO_LOAD

    def engine_gone(self) -> None:
        """Nothing runs, nothing is cached, nothing is measured any more."""
        self._last = self._told = _NO_LOAD
        self.directory.clear()

    def step_done(self, step: StepDone) -> bool:
        """Take the load after a step; True when routers should hear of it at once."""
        self._last, told = step, self._told
        moved = abs(step.queued_prefill_tokens - told.queued_prefill_tokens)
        return moved >= QUEUED_TOKENS_STEP or (step.waiting == 0) != (told.waiting == 0)

    def load(self, ready: Ready | None, kv: KvStatistics | None, streams: int) -> EngineLoad:
        """The load to tell routers now; ``ready`` and ``kv`` are None while no engine is ready."""
        self._told = last = self._last
        return EngineLoad(
            model=self._model,
            ready=ready is not None,
            queued_prefill_tokens=last.queued_prefill_tokens,
            running=last.running,
            waiting=last.waiting,
            free_blocks=last.free_blocks,
            cached_blocks=last.cached_blocks,
            total_blocks=ready.total_blocks if ready is not None else 0,
            prefill_tokens_per_s=last.prefill_tokens_per_s,
            decode_step_ms=last.decode_step_ms,
            transfers_in=kv.incoming_now if kv is not None else 0,
            transfers_out=kv.outgoing_now if kv is not None else 0,
            streams=streams,
            drafted_tokens=last.drafted,
            accepted_tokens=last.accepted,
            kv_sent_bytes=kv.sent_bytes if kv is not None else 0,
            kv_wire_bytes=kv.sent_wire_bytes if kv is not None else 0,
            kv_packed_pieces=kv.packed_pieces if kv is not None else 0,
            kv_raw_pieces=kv.raw_pieces if kv is not None else 0,
        )
