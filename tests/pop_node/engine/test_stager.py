"""Bytes between cache and slots: every bit arrives, and nothing lands where it must not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_node.engine.messages import Import, Staged, StageFrom
from pop_node.engine.staging.kv_mover import HostMover
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.errors import ConfigError

T = b"t" * 16
SPEC = KvSpec(
    (
        KvGroup(
            "tokens",
            (0, 2),
            (KvComponent("k", "bfloat16", (2, 3)), KvComponent("v", "float32", (5,))),
        ),
        KvGroup("tokens", (1,), (KvComponent("latent", "float16", (7,)),)),
    )
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
COMPONENTS = [(group, component) for group in SPEC.groups for component in group.components]


class Site:
    """One engine's memory: a cache of random bits, staging and a stager."""

    def __init__(self, num_blocks: int, block_tokens: int, layout: StagingLayout) -> None:
        self.block_tokens = block_tokens
        self.cache = tuple(
            random_bits(len(g.layers), num_blocks, block_tokens, *c.shape, dtype=c.dtype)
            for g, c in COMPONENTS
        )
        self.staging = Staging.create(layout)
        self.generations = [0] * num_blocks
        self.woken = 0
        self.stager = Stager(
            SPEC, self.cache, block_tokens, self.staging, self.generations, self.wake, HostMover()
        )

    def wake(self) -> None:
        self.woken += 1

    def tokens(self, index: int, blocks: tuple[int, ...], lo: int, hi: int) -> bytes:
        """Raw bytes of tokens ``[lo, hi)`` of one component over all layers."""
        gathered = self.cache[index][:, list(blocks)].flatten(1, 2)[:, lo:hi]
        return gathered.contiguous().view(torch.uint8).numpy().tobytes()

    def everything(self) -> list[bytes]:
        return [c.view(torch.uint8).numpy().tobytes() for c in self.cache]


def random_bits(*shape: int, dtype: str) -> torch.Tensor:
    """Any bit pattern, NaNs with payloads included."""
    size = torch.empty(shape, dtype=DTYPES[dtype]).numel() * DTYPES[dtype].itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8)
    return raw.view(DTYPES[dtype]).view(shape)


def import_of(staged: Staged, slot: int) -> Import:
    return Import(staged.transfer, slot, *staged.piece.numbers)


def carry(source: Site, target: Site) -> int:
    """Stage, copy and import until nothing is left; returns the number of pieces."""
    pieces = 0
    import_slot = target.staging.layout.export_slots
    while (staged := source.stager.stage_one()) is not None:
        payload = bytes(source.staging.slot(staged.slot)[: staged.nbytes])
        source.stager.free_slot(staged.slot)
        target.staging.slot(import_slot)[: staged.nbytes] = payload
        target.stager.take_in(import_of(staged, import_slot))
        pieces += 1
    return pieces


def compute(site: Site, tokens: int) -> None:
    """Pretend that a pass over all layers has just written up to ``tokens``."""
    site.stager.begin_step([(T, tokens)])
    for layer in range(3):
        site.stager.layer_done(layer)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bits_arrive_whatever_the_block_sizes_and_boundaries(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    slot_bytes = data.draw(st.sampled_from([20, 64, 4096]))
    layout = StagingLayout(slot_bytes=slot_bytes, export_slots=2, import_slots=2)
    source = Site(9, data.draw(st.integers(1, 5)), layout)
    target = Site(9, data.draw(st.integers(1, 5)), layout)
    total = data.draw(st.integers(1, 9 * min(source.block_tokens, target.block_tokens)))
    held = data.draw(st.integers(0, total))
    asked = data.draw(st.integers(0, held))  # a peer that sends more than asked does no harm
    blocks_out = tuple(data.draw(st.permutations(range(9))))
    blocks_in = tuple(data.draw(st.permutations(range(9))))
    before = [target.tokens(i, blocks_in, 0, held) for i in range(3)]
    rest = [target.tokens(i, blocks_in, total, 9 * target.block_tokens) for i in range(3)]
    source.stager.open_export(T, total)
    source.stager.bind("export", T, blocks_out, 0, total)
    target.stager.bind("import", T, blocks_in, held, total)
    assert source.stager.grant(StageFrom(T, asked))
    middle = data.draw(st.integers(0, total))
    compute(source, middle)
    carry(source, target)
    compute(source, total)
    carry(source, target)
    for i in range(3):
        assert target.tokens(i, blocks_in, held, total) == source.tokens(i, blocks_out, held, total)
        assert target.tokens(i, blocks_in, 0, held) == before[i]
        assert target.tokens(i, blocks_in, total, 9 * target.block_tokens) == rest[i]


LAYOUT = StagingLayout(slot_bytes=4096, export_slots=1, import_slots=1)
PIECE = Import(T, 1, 0, 0, 0, 2, 0, 6)


@pytest.fixture
def site() -> Site:
    return Site(4, 3, LAYOUT)


def test_an_import_for_a_closed_transfer_touches_nothing(site: Site) -> None:
    site.stager.bind("import", T, (0, 1), 0, 6)
    site.stager.close("import", T)
    before = site.everything()
    site.stager.take_in(PIECE)
    assert site.everything() == before


def test_an_import_into_a_block_that_changed_hands_touches_nothing(site: Site) -> None:
    site.stager.bind("import", T, (0, 1), 0, 6)
    site.generations[1] += 1
    before = site.everything()
    site.stager.take_in(PIECE)
    assert site.everything() == before


@pytest.mark.parametrize(
    "piece",
    [
        Import(T, 0, 0, 0, 0, 2, 0, 6),  # an export slot
        Import(T, 2, 0, 0, 0, 2, 0, 6),  # no slot at all
        Import(T, 1, 2, 0, 0, 1, 0, 6),
        Import(T, 1, -1, 0, 0, 1, 0, 6),
        Import(T, 1, 0, 2, 0, 2, 0, 6),
        Import(T, 1, 0, 0, 1, 3, 0, 6),
        Import(T, 1, 0, 0, 1, 1, 0, 6),
        Import(T, 1, 0, 0, 0, 2, 0, 7),
        Import(T, 1, 0, 0, 0, 2, -1, 6),
        Import(T, 1, 0, 0, 0, 2, 6, 6),
    ],
)
def test_a_piece_outside_the_transfer_touches_nothing(site: Site, piece: Import) -> None:
    site.stager.bind("import", T, (0, 1), 0, 6)
    before = site.everything()
    site.stager.take_in(piece)
    assert site.everything() == before


def test_a_valid_piece_is_written(site: Site) -> None:
    """The counterpart of the tests above: the piece they vary does arrive."""
    site.stager.bind("import", T, (0, 1), 0, 6)
    before = site.everything()
    site.stager.take_in(PIECE)
    assert site.everything() != before


def test_staging_stops_without_a_free_slot_and_goes_on_with_one(site: Site) -> None:
    site.stager.open_export(T, 6)
    site.stager.bind("export", T, (0, 1), 6, 6)
    assert site.stager.stage_one() is None
    assert site.stager.grant(StageFrom(T, 0))
    first = site.stager.stage_one()
    assert first is not None
    assert site.stager.stage_one() is None
    site.stager.free_slot(99)
    assert site.stager.stage_one() is None
    site.stager.free_slot(first.slot)
    site.stager.free_slot(first.slot)  # said twice: still one slot
    assert site.stager.stage_one() is not None
    assert site.stager.stage_one() is None


def test_a_closed_export_stages_nothing(site: Site) -> None:
    site.stager.open_export(T, 6)
    site.stager.bind("export", T, (0, 1), 6, 6)
    site.stager.grant(StageFrom(T, 0))
    site.stager.close("export", T)
    assert site.stager.stage_one() is None
    assert not site.stager.grant(StageFrom(T, 0))


def test_layers_wake_the_port_only_once_granted(site: Site) -> None:
    site.stager.open_export(T, 6)
    site.stager.bind("export", T, (0, 1), 0, 6)
    woken = site.woken
    compute(site, 3)
    assert site.woken == woken
    site.stager.grant(StageFrom(T, 0))
    compute(site, 6)
    assert site.woken > woken


def test_a_slot_must_hold_a_token() -> None:
    with pytest.raises(ConfigError, match="cannot hold one token"):
        Site(1, 1, StagingLayout(slot_bytes=16, export_slots=1, import_slots=1))
