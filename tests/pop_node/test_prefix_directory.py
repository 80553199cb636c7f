"""The prefix directory publishes what it holds, no more, no less."""

from hypothesis import given
from hypothesis import strategies as st

from pop_node.hosting.prefix_directory import MAX_ENTRIES, PrefixDirectory
from wire.prefix import SPAN_BYTES, prefix_chain


def chain_of(text: bytes) -> list[bytes]:
    return prefix_chain(b"root" * 4, text)


def apply(known: dict[bytes, int], delta) -> dict[bytes, int]:
    known = {} if delta.reset else dict(known)
    for value in delta.removed:
        known.pop(value, None)
    known.update(dict(delta.added))
    return known


def test_longer_spans_stand_for_more_tokens():
    directory = PrefixDirectory("m", 1000)
    chain = chain_of(b"x" * (SPAN_BYTES * 4))
    directory.record(chain, SPAN_BYTES * 4, 200)
    delta = directory.take_delta()
    assert delta is not None
    assert [tokens for _, tokens in delta.added] == [50, 100, 150, 200]
    assert directory.take_delta() is None


def test_of_a_part_only_the_spans_within_it_are_held():
    directory = PrefixDirectory("m", 1000)
    chain = chain_of(b"x" * (SPAN_BYTES * 4))
    directory.record(chain, SPAN_BYTES * 4, 200, held_tokens=149)
    assert [tokens for _, tokens in directory.take_delta().added] == [50, 100]
    directory.record(chain, SPAN_BYTES * 4, 200, held_tokens=49)
    assert directory.take_delta() is None


def test_old_prefixes_leave_when_the_pool_is_full():
    directory = PrefixDirectory("m", 300)
    first, second = (chain_of(letter * SPAN_BYTES * 2) for letter in (b"a", b"b"))
    directory.record(first, SPAN_BYTES * 2, 200)
    directory.record(second, SPAN_BYTES * 2, 200)
    known = apply({}, directory.take_delta())
    assert set(second) <= set(known)
    assert not set(first) <= set(known)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.binary(max_size=3), st.integers(0, 6), st.integers(1, 500)),
            st.just("take"),
            st.just("clear"),
        ),
        max_size=40,
    )
)
def test_deltas_add_up_to_the_whole(steps):
    directory, known = PrefixDirectory("m", 600), {}
    for step in steps:
        if step == "take":
            delta = directory.take_delta()
            known = apply(known, delta) if delta else known
        elif step == "clear":
            directory.clear()
        else:
            seed, spans, tokens = step
            text = (seed or b"-") * (SPAN_BYTES * spans)
            text = text[: SPAN_BYTES * spans]
            directory.record(chain_of(text), max(len(text), 1), tokens)
    delta = directory.take_delta()
    known = apply(known, delta) if delta else known
    assert known == dict(directory.whole().added)
    assert len(known) <= MAX_ENTRIES
