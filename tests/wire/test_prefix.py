"""The prefix chain: equal beginnings give equal values, everything else does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wire.messages import ChatInput, ChatTurn, TextInput, TokensInput
from wire.prefix import CHAIN_BYTES, SPAN_BYTES, canonical_bytes, chain_root, prefix_chain

ROOT = chain_root(b"k" * 32, "acme", "ab" * 32)
TURNS = st.lists(
    st.builds(ChatTurn, st.sampled_from(["user", "assistant"]), st.text(max_size=400)), max_size=5
)


def common(a: list[bytes], b: list[bytes]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_chains_agree_exactly_as_far_as_the_spans_do(a, b):
    spans = common(
        [a[i : i + SPAN_BYTES] for i in range(0, len(a) - SPAN_BYTES + 1, SPAN_BYTES)],
        [b[i : i + SPAN_BYTES] for i in range(0, len(b) - SPAN_BYTES + 1, SPAN_BYTES)],
    )
    assert common(prefix_chain(ROOT, a), prefix_chain(ROOT, b)) == spans


@given(st.binary(min_size=SPAN_BYTES, max_size=1000))
def test_a_chain_has_one_value_per_full_span(data):
    chain = prefix_chain(ROOT, data)
    assert len(chain) == len(data) // SPAN_BYTES
    assert all(len(value) == CHAIN_BYTES for value in chain)


@given(TURNS, st.text(max_size=300))
def test_a_conversation_that_grows_keeps_its_beginning(turns, more):
    before = canonical_bytes(ChatInput(turns))
    after = canonical_bytes(ChatInput([*turns, ChatTurn("user", more)]))
    assert after.startswith(before)


@given(TURNS.filter(bool), st.text(min_size=1, max_size=300))
def test_a_last_turn_that_grows_keeps_what_it_had(turns, more):
    shorter = canonical_bytes(ChatInput(turns))
    longer = ChatInput([*turns[:-1], ChatTurn(turns[-1].role, turns[-1].content + more)])
    end = len(b"\x00\x01")
    assert canonical_bytes(longer).startswith(shorter[:-end])


def test_tenants_models_and_meshes_never_share_a_value():
    data = b"x" * SPAN_BYTES
    roots = [
        chain_root(key, tenant, model)
        for key in (b"k" * 32, b"l" * 32)
        for tenant in ("a", "b")
        for model in ("m", "n")
    ]
    assert len({prefix_chain(root, data)[0] for root in roots}) == len(roots)


def test_kinds_of_input_are_told_apart():
    assert len({canonical_bytes(i) for i in (TextInput(""), TokensInput([]), ChatInput([]))}) == 3
    assert canonical_bytes(TokensInput([1, 2])).startswith(canonical_bytes(TokensInput([1])))
