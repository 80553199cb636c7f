"""Where the chunks of a packed file lie, and of which pieces each is made."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pop_node.store import layout
from pop_node.store.layout import ALIGNMENT, TensorEntry
from pop_node.store.manifest import DataFile, KvGeometry, Manifest, Packing
from pop_node.store.packing import PIECE_BYTES, chunk_pieces

CHUNK = 4 * ALIGNMENT


@given(st.lists(st.integers(1, 4), max_size=12), st.data())
def test_chunks_of_a_range_are_those_that_touch_it(pages: list[int], drawn: st.DataObject) -> None:
    lengths = [count * ALIGNMENT for count in pages]
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    packing = Packing(CHUNK * len(ends), ends)
    data = DataFile("w", sum(lengths), "exponent", CHUNK, [""] * len(ends), packing)
    assert [span[1] for span in data.spans()] == lengths
    assert data.longest_chunk == max(lengths, default=0)
    if not lengths:
        return
    start = drawn.draw(st.integers(0, data.nbytes - 1))
    stop = drawn.draw(st.integers(start + 1, data.nbytes))
    touched = [
        index
        for index, (offset, nbytes) in enumerate(data.spans())
        if offset < stop and offset + nbytes > start
    ]
    assert list(data.chunks_of(start, stop)) == touched


@given(
    st.lists(
        st.tuples(
            st.integers(0, 900_000).map(lambda n: 8 * n),
            st.sampled_from(["BF16", "F32", "U8"]),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_pieces_are_the_chunk_and_never_of_two_dtypes(
    drawn: list[tuple[int, str, bool]],
) -> None:
    entries: list[TensorEntry] = []
    at = 0
    for number, (nbytes, dtype, begins) in enumerate(drawn):
        if begins or not entries or entries[-1].dtype != dtype:
            at = layout.aligned(at)
        entries.append(TensorEntry(f"t{number}", dtype, (), at, nbytes, None, number, ""))
        at += nbytes
    manifest = manifest_of(entries) if entries else manifest_of([], 3 * ALIGNMENT)
    chunks = list(chunk_pieces(manifest))
    assert len(chunks) == len(manifest.data.chunks)
    for index, pieces in enumerate(chunks):
        start, nbytes = manifest.data.decoded_span(index)
        at = 0
        for piece in pieces:
            assert (piece.offset, piece.nbytes > 0) == (at, True)
            assert piece.nbytes <= PIECE_BYTES
            at += piece.nbytes
            for entry in entries:
                end = entry.offset + entry.nbytes
                if entry.offset < start + at and start + piece.offset < end and entry.nbytes:
                    assert entry.dtype == piece.dtype
        assert at == nbytes


def manifest_of(entries: list[TensorEntry], slack: int = 0) -> Manifest:
    """Only what a plan of pieces is made from is filled in; in chunks of 4 MiB."""
    end = entries[-1].offset + entries[-1].nbytes if entries else 0
    nbytes = layout.aligned(end) + slack
    chunks = [""] * -(-nbytes // (4 << 20))
    data = DataFile("weights.bin", nbytes, "raw", 4 << 20, chunks)
    kv = KvGeometry(1, 1, 1)
    return Manifest(2, "m", "", "", "bfloat16", 1, entries, data, [], "", "", kv, 8, "the tests")
