"""KV to and from a fake device whose copies come late: nothing is offered before it has arrived,
and nothing is read or written out of turn."""

from __future__ import annotations

import math

import pytest
import torch

from pop_node.engine.messages import Import, Staged, StageFrom
from pop_node.engine.staging.kv_mover import DeviceMover
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.kv_stream.staging import Staging, StagingLayout
from tests.fakes.late_device import LateDevice, LateEvent, LateLane, reference_move

T, LAYERS, BLOCK_TOKENS, BLOCKS, WIDTH = b"t" * 16, 2, 3, 6, 4
SPEC = KvSpec((KvGroup("tokens", (0, 1), (KvComponent("k", "float16", (WIDTH,)),)),))
LAYOUT = StagingLayout(slot_bytes=LAYERS * 4 * WIDTH * 2, export_slots=2, import_slots=1)


class RememberingDevice(LateDevice):
    """Says which lane it made."""

    def lane(self) -> LateLane:
        self.made = super().lane()
        return self.made


class Site:
    def __init__(self) -> None:
        self.cache = torch.randn(LAYERS, BLOCKS, BLOCK_TOKENS, WIDTH).half()
        self.staging = Staging.create(LAYOUT)
        device = RememberingDevice()
        mover = DeviceMover(device, reference_move, LAYOUT.slot_bytes)
        self.stager = Stager(
            SPEC,
            (self.cache,),
            BLOCK_TOKENS,
            self.staging,
            [0] * BLOCKS,
            lambda: None,
            mover,
        )
        self.lane = device.made

    def in_slot(self, staged: Staged) -> torch.Tensor:
        shape = staged.layer_hi - staged.layer_lo, staged.token_hi - staged.token_lo, WIDTH
        slot, count = self.staging.slot(staged.slot), math.prod(shape)
        return torch.frombuffer(slot, dtype=torch.float16, count=count).view(shape).clone()

    def tokens(self, blocks: tuple[int, ...], lo: int, hi: int) -> torch.Tensor:
        return self.cache[:, list(blocks)].flatten(1, 2)[:, lo:hi].clone()

    def export(self, blocks: tuple[int, ...], tokens: int) -> None:
        self.stager.open_export(T, tokens)
        self.stager.bind("export", T, blocks, tokens, tokens)
        assert self.stager.grant(StageFrom(T, 0))


@pytest.fixture
def site() -> Site:
    torch.manual_seed(3)
    return Site()


def test_a_piece_is_offered_once_it_has_arrived(site: Site) -> None:
    blocks = (4, 1, 3)
    site.export(blocks, 8)
    assert not site.stager.under_way
    assert site.stager.stage_one() is None  # both pieces are begun, neither is there
    assert site.stager.under_way
    site.lane.catch_up(site.lane.queued // 2)
    first = site.stager.stage_one()
    assert first is not None
    assert torch.equal(site.in_slot(first), site.tokens(blocks, 0, 8)[:1])  # a layer fills a slot
    assert site.stager.stage_one() is None
    site.lane.catch_up(site.lane.queued)
    second = site.stager.stage_one()
    assert second is not None
    assert torch.equal(site.in_slot(second), site.tokens(blocks, 0, 8)[1:])
    assert not site.stager.under_way


@pytest.mark.parametrize("how", ["close", "unbind"])
def test_blocks_are_copied_before_they_are_computed_anew(site: Site, how: str) -> None:
    blocks = (0, 5)
    site.export(blocks, 4)
    assert site.stager.stage_one() is None
    before = site.tokens(blocks, 0, 4)
    if how == "close":
        site.stager.close("export", T)
    else:
        site.stager.unbind_export(T)
    site.cache.fill_(7)  # a step of somebody who was given the blocks
    staged = site.stager.stage_one()
    assert staged is not None
    assert torch.equal(site.in_slot(staged), before)


class DatedEvent(LateEvent):
    """Remembers how much was queued to be computed when it was set."""

    queued = 0
    at = -1

    def record(self, lane: LateLane | None = None) -> None:
        super().record(lane)
        self.at = DatedEvent.queued


class DatedLane(LateLane):
    """Remembers what it was told to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[int] = []

    def wait(self, event: LateEvent) -> None:
        assert isinstance(event, DatedEvent)
        self.waited.append(event.at)
        super().wait(event)


def test_what_comes_in_waits_for_nothing_that_was_queued_after_its_blocks_were_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LateDevice, "event", lambda self: DatedEvent())
    monkeypatch.setattr(LateDevice, "lane", lambda self: DatedLane())
    site = Site()
    other = b"o" * 16
    DatedEvent.queued = 1
    site.stager.bind("import", T, (2, 0), 0, 5)
    DatedEvent.queued = 2
    site.stager.bind("import", other, (3, 4), 0, 5)
    site.export((1, 5), 4)
    DatedEvent.queued = 3
    for transfer in (other, T):
        site.stager.take_in(Import(transfer, LAYOUT.export_slots, 0, 0, 0, LAYERS, 0, 4))
    site.stager.stage_one()
    assert isinstance(site.lane, DatedLane)
    assert site.lane.waited == [2, 1, 2]


def test_a_piece_that_came_is_in_the_cache_when_its_slot_is_given_back(site: Site) -> None:
    blocks = (2, 0)
    site.stager.bind("import", T, blocks, 1, 5)
    slot = LAYOUT.export_slots
    sent = torch.randn(LAYERS, 4, WIDTH).half()
    site.staging.slot(slot)[:] = sent.numpy().tobytes()
    held, rest = site.tokens(blocks, 0, 1), site.tokens(blocks, 4, 6)
    site.stager.take_in(Import(T, slot, 0, 0, 0, LAYERS, 0, 4))
    site.staging.slot(slot)[:] = bytes(LAYOUT.slot_bytes)  # used again
    site.lane.catch_up(site.lane.queued)
    assert torch.equal(site.tokens(blocks, 1, 4), sent[:, 1:])
    assert torch.equal(site.tokens(blocks, 0, 1), held)  # shared with others: left alone
    assert torch.equal(site.tokens(blocks, 4, 6), rest)
