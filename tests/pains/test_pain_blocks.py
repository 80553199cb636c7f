"""KV blocks that leak, or go to others while a transfer still uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pop_node.engine.loop import EngineLoop
from pop_node.engine.messages import Add, Allocated, Drop, Release, StageFrom, Stop
from pop_node.engine.scheduling.schedule import Schedule
from pop_node.engine.staging.kv_mover import HostMover
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream import liveness
from pop_node.kv_stream.frames import Data, Deny
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.kv_stream.staging import Staging, StagingLayout
from pop_node.store.store import Store
from tests.fakes.fake_model import VOCABULARY, chain
from tests.pains.pain_parts import T, let_time_pass
from tests.pop_node.engine.engine_builders import a_scheduler, an_add
from tests.pop_node.hand_router import a_submit
from tests.pop_node.kv_stream.kv_content import Plan, altered
from tests.pop_node.kv_stream.kv_pair import Pair
from tests.pop_node.node_mesh import tiny_mesh
from wire.messages import Failed, Finished, Transfer

BLOCK_TOKENS = 4
SPEC = KvSpec((KvGroup("tokens", (0,), (KvComponent("kv", "float32", (2,)),)),))


class ScriptedEngine:
    """The real engine loop, scheduler and stager; a fake model whose KV of a token is a hash of
    all tokens up to it, so that bytes of another sequence show.

    ``script`` maps a step to the commands that arrive before it. One piece leaves every
    ``stage_every`` steps, always *after* the step wrote its own KV: as late as it can be.
    """

    def __init__(self, num_blocks: int, script: dict[int, list[object]], stage_every: int) -> None:
        scheduler, self.pool = a_scheduler(num_blocks, BLOCK_TOKENS, token_budget=3)
        cache = torch.zeros(1, num_blocks, BLOCK_TOKENS, 2)
        self._memory = cache.view(torch.int64).view(-1)
        self._staging = Staging.create(StagingLayout(8 * BLOCK_TOKENS, 1, 1))
        generations = self.pool.generations
        self.stager = Stager(
            SPEC, (cache,), BLOCK_TOKENS, self._staging, generations, _nothing, HostMover()
        )
        self._script, self._stage_every = dict(script), stage_every
        self._commands: deque[object] = deque()
        self._steps = 0
        self.said: list[object] = []
        self.staged: dict[bytes, dict[int, int]] = {}
        self._loop = EngineLoop(scheduler, self, self.stager, self, last_layer=0)  # type: ignore[arg-type]

    def live(self) -> None:
        """Run the script to its end and stage what is left."""
        self._loop.run()
        while self._stage():
            pass
        self._staging.close()

    # ---- the port ------------------------------------------------------------------------------

    def take(self, *, wait: bool) -> object:
        self._commands.extend(self._script.pop(self._steps, ()))
        if self._commands:
            return self._commands.popleft()
        if not wait:
            return None
        if not self._script:
            return Stop()
        self._steps = min(self._script)  # idle: on to what comes next
        return self.take(wait=True)

    def send(self, message: object) -> None:
        self.said.append(message)

    def wake(self) -> None:
        pass

    # ---- the model -----------------------------------------------------------------------------

    depth = 1

    def prepare(self) -> bool:
        return False

    def launch(
        self, schedule: Schedule, on_layer: Callable[[int], None] | None
    ) -> Callable[[], list[int]]:
        for row in schedule.rows:
            values = chain(list(row.sequence.ids)[: row.end])
            for position in range(row.end):
                block = row.sequence.blocks[position // BLOCK_TOKENS]
                at = block * BLOCK_TOKENS + position % BLOCK_TOKENS
                if position >= row.start:
                    self._memory[at] = values[position]
                assert self._memory[at] == values[position], "computed on another one's KV"
        if on_layer is not None:
            on_layer(0)
        self._steps += 1
        if self._steps % self._stage_every == 0:
            self._stage()
        sampled = [schedule.rows[index].sequence for index in schedule.sampled]
        ids = [chain(list(sequence.ids))[-1] % VOCABULARY for sequence in sampled]
        return lambda: ids

    def _stage(self) -> bool:
        piece = self.stager.stage_one()
        if piece is None:
            return False
        raw = bytes(self._staging.slot(piece.slot)[: piece.nbytes])
        tokens = self.staged.setdefault(piece.transfer, {})
        for number, position in enumerate(range(piece.token_lo, piece.token_hi)):
            assert position not in tokens, "a token left twice"
            tokens[position] = int.from_bytes(raw[8 * number : 8 * number + 8], "little")
        self.stager.free_slot(piece.slot)
        return True


def _nothing() -> None:
    pass


def kv_of(ids: list[int]) -> dict[int, int]:
    return dict(enumerate(chain(ids)))


async def test_vllm_46283_decode_blocks_come_back_when_no_prefill_ever_reports(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm-project/vllm 46283: a decode request that was aborted while it waited for remote KV kept
    its blocks until the prefill node reported the end of the transfer; a prefill node that had
    crashed never did, and in the end nothing could be admitted any more."""
    monkeypatch.setattr(liveness, "MIN_WAIT_S", 0.3)
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        b = mesh.routers["b"]
        streams = [mesh.stream() for _ in range(12)]
        for stream in streams:  # nobody tells node a: its half of the hand-over never begins
            transfer = Transfer(stream.to_bytes(16, "big"), "a", "")
            b.send(a_submit(stream, "decode", transfer=transfer))
        await b.until(lambda: all(stream in b.accepted for stream in streams))
        for stream in streams[:6]:
            mesh.cancel(stream, "b")
        for stream in streams[:6]:
            ending = await b.ending(stream)
            assert isinstance(ending, Finished)
            assert ending.reason == "cancelled"
        for stream in streams[6:]:
            ending = await b.ending(stream)
            assert isinstance(ending, Failed)
            assert ending.retryable
        await mesh.at_rest()  # every block is free or cached again
        assert (await b.ending(mesh.whole("b"))).reason == "length"


@pytest.mark.parametrize("stage_every", [1, 5, 9])
def test_vllm_52360_preempted_blocks_are_not_read_by_a_transfer_any_more(stage_every: int) -> None:
    """vllm-project/vllm 52360: a background thread still copied the blocks of a request that had
    just been preempted; by then they held another request's KV, which was then served under the
    first one's key."""
    prompt = list(range(24))
    older = an_add(1, prompt_ids=[7] * 8, max_tokens=30)
    export = an_add(2, leg="prefill", prompt_ids=prompt, max_tokens=5)
    grant = StageFrom(export.transfer, 0)
    engine = ScriptedEngine(10, {0: [older], 3: [export, grant]}, stage_every)
    preempted: list[bytes] = []
    unbind = engine.stager.unbind_export

    def unbind_and_count(transfer: bytes) -> None:
        preempted.append(transfer)
        unbind(transfer)

    engine.stager.unbind_export = unbind_and_count  # type: ignore[method-assign]
    engine.live()
    assert preempted, "the pool was too large for this test"
    assert engine.staged == {export.transfer: kv_of(prompt)}


def test_vllm_44238_blocks_in_flight_are_pinned_until_the_transfer_lets_go() -> None:
    """vllm-project/vllm 44238: blocks were given back while a transfer still read them. Here the
    decode node's grant comes late, after other requests went through all the blocks there are."""
    prompt = list(range(12))
    export = an_add(1, leg="prefill", prompt_ids=prompt, max_tokens=5)
    others: list[Add] = [
        an_add(n, prompt_ids=[n] * 17, max_tokens=4, salt=b"%d" % n) for n in range(2, 10)
    ]
    script: dict[int, list[object]] = {
        0: [export],
        6: [*others],
        500: [StageFrom(export.transfer, 0)],
    }
    engine = ScriptedEngine(10, script, 1)
    engine.live()
    assert engine.staged == {export.transfer: kv_of(prompt)}
    assert engine.pool.available == 10 - 3  # the three blocks of the transfer are nobody else's


def test_vllm_44238_a_transfer_that_lets_go_gives_all_back() -> None:
    """vllm-project/vllm 44238, the other way round: what is pinned is not pinned for ever."""
    export = an_add(1, leg="prefill", prompt_ids=list(range(12)), max_tokens=5)
    engine = ScriptedEngine(10, {0: [export], 50: [Release(export.transfer)]}, 1)
    engine.live()
    assert engine.pool.available == 10


@pytest.mark.parametrize("damaged", range(4))
def test_vllm_52234_damaged_kv_is_an_error_and_never_an_answer(damaged: int) -> None:
    """vllm-project/vllm 52234: KV that failed to arrive was decoded from all the same, and the
    client got nonsense with status 200."""
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.commit(plan)
    seen = 0
    while pair.stage_one() or pair.write_one() or pair.deliver_down() or pair.up:
        if not pair.up:
            continue
        if isinstance(pair.up[0][0], Data):
            if seen == damaged:
                pair.up[0] = altered(pair.up[0], 1)
            seen += 1
        pair.deliver_up()
        pair.finish_one()
        pair.import_one()
    let_time_pass(pair, plan.deadline)
    assert seen > damaged
    assert pair.committed == {}
    assert pair.errors_d[T].code == pair.errors_p[T].code == "checksum_mismatch"
    pair.check_at_rest()


def test_vllm_52234_half_a_prompt_of_kv_is_no_prefix_hit() -> None:
    """vllm-project/vllm 52234, the next request: blocks of a hand-over that failed are not offered
    to prompts with the same beginning."""
    prompt = list(range(16))
    receiving = an_add(1, leg="decode", prompt_ids=prompt)
    again = an_add(2, prompt_ids=prompt)
    engine = ScriptedEngine(10, {0: [receiving], 5: [Drop(1)], 9: [again]}, 1)
    engine.live()
    allocations = [m for m in engine.said if isinstance(m, Allocated)]
    assert allocations == [Allocated(1, 0), Allocated(2, 0)]


def test_vllm_52234_a_reference_is_good_for_one_transfer() -> None:
    """vllm-project/vllm 52234: a reference to KV that had been fetched already, or whose blocks
    had been used again since, was taken once more, and one prompt got another one's answer."""
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.commit(plan)
    pair.run()
    assert pair.committed == {T: plan.ids}
    pair.ended_p.clear()
    pair.open(plan)  # the same transfer id a second time
    pair.deliver_up()
    assert [type(message) for message in pair.down] == [Deny]
    pair.run()
    assert (pair.ended_p, pair.ended_d) == ({T: 1}, {T: 1})
    pair.check_at_rest()
