"""Detokeniser, stop strings and their combination against whole-text models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pop_node.text.detokenizer import Detokenizer, TokenTable
from pop_node.text.stop import StopMatcher
from pop_node.text.stream import TextDelta, TextStream, escape_json
from pop_node.text.tokenizer import TextCodec
from wire.errors import ConfigError, RequestError

VOCABULARY = 49152
AWKWARD = "👩🏽‍🚀 naïve e\u0301 漢字 🇩🇪 \u202eمرحبا\u202c ﷽ \U0010ffff"

ids_lists = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
texts = st.text(st.characters(codec="utf-8"), max_size=50)


@pytest.fixture(scope="module")
def codec(smollm2_dir: Path) -> TextCodec:
    return TextCodec.load(smollm2_dir)


def cut(items: Sequence[int], cuts: list[int]) -> list[Sequence[int]]:
    """``items`` in pieces; some may be empty."""
    edges = sorted({0, len(items), *(c % (len(items) + 1) for c in cuts)})
    return [items[a:b] for a, b in itertools.pairwise(edges)]


# ---- detokeniser -------------------------------------------------------------------------------


@given(ids_lists, st.lists(st.integers(0, 100), max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_ids_give_the_text_of_decoding_all(
    codec: TextCodec, ids: list[int], cuts: list[int]
) -> None:
    detokenizer = Detokenizer(codec.token_table)
    parts = [detokenizer.push(piece) for piece in cut(ids, cuts)]
    assert "".join(parts) + detokenizer.flush() == codec.tokenizer.decode(ids)


@given(texts)
@example(AWKWARD)
@settings(max_examples=200, deadline=None)
def test_valid_text_grows_by_whole_characters(codec: TextCodec, text: str) -> None:
    ids = codec.tokenizer.encode(text).ids
    whole = codec.tokenizer.decode(ids)
    detokenizer = Detokenizer(codec.token_table)
    shown = ""
    for number in ids:
        shown += detokenizer.push([number])
        assert whole.startswith(shown)
    assert detokenizer.flush() == ""
    assert shown == whole


@given(ids_lists, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_rebuilt_from_forced_ids_it_goes_on_alike(
    codec: TextCodec, ids: list[int], handoff: int
) -> None:
    first, second = Detokenizer(codec.token_table), Detokenizer(codec.token_table)
    for number in ids[:handoff]:
        first.push([number])
    second.push(ids[:handoff])
    assert first.push(ids[handoff:]) + first.flush() == second.push(ids[handoff:]) + second.flush()


def test_a_character_in_many_tokens_comes_out_once_whole(codec: TextCodec) -> None:
    one = codec.tokenizer.encode("\U0010fffd").ids
    assert len(one) == 4, "the test wants a character of one token per byte"
    detokenizer = Detokenizer(codec.token_table)
    assert [detokenizer.push([i]) for i in one] == ["", "", "", "\U0010fffd"]
    assert [detokenizer.push([i]) for i in one[:3]] == ["", "", ""]
    assert detokenizer.push(codec.tokenizer.encode("x").ids) == "\ufffdx"


def test_special_and_unknown_ids_have_no_text(codec: TextCodec) -> None:
    a, b = codec.tokenizer.encode("\u00e9").ids, codec.tokenizer.encode("!").ids
    detokenizer = Detokenizer(codec.token_table)
    assert detokenizer.push([0, 1, 2, VOCABULARY, 10**9, -1]) == ""
    assert detokenizer.push([*a[:1], 2, *a[1:], *b]) == "\u00e9!"


def sentencepiece(strip: bool) -> Tokenizer:
    """A vocabulary as Llama 2 spells it: words with U+2581, single bytes, special tokens."""
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "\u2581Hello", "\u2581w", "orld", "\u00e9", "\u2581\u2581", "<0x4", "!"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("strip", [True, False])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_sentencepiece_vocabularies(strip: bool, data: st.DataObject) -> None:
    tokenizer = sentencepiece(strip)
    character = st.characters(codec="utf-8").map(lambda c: [1 + byte for byte in c.encode()])
    word = st.sampled_from([0, *range(257, 265)]).map(lambda number: [number])
    drawn = data.draw(st.lists(word | character, max_size=12))
    ids = list(itertools.chain.from_iterable(drawn))
    detokenizer = Detokenizer(TokenTable.of(tokenizer))
    shown = "".join(detokenizer.push([number]) for number in ids) + detokenizer.flush()
    assert shown == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    ],
)
def test_unknown_decoders_are_refused(decoder: decoders.Decoder | None) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(ConfigError, match="not supported"):
        TokenTable.of(tokenizer)


def test_plain_added_tokens_keep_their_text() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think> 漢"])
    assert Detokenizer(TokenTable.of(tokenizer)).push([0, 1, 0]) == tokenizer.decode([0, 1, 0])


# ---- stop strings ------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> str | None:
    """Model: the text before the stop string that is complete first, None without one."""
    for end in range(1, len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))]
    return None


short = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


@given(short, stop_lists, st.lists(st.integers(0, 30), max_size=10))
@settings(max_examples=500)
def test_stops_are_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown = "".join(matcher.feed(piece) for piece in pieces)
    expected = first_stop(text, stops)
    assert matcher.stopped == (expected is not None)
    assert shown + matcher.flush() == (text if expected is None else expected)


@given(short, stop_lists)
@settings(max_examples=300)
def test_exactly_what_may_become_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        shown += matcher.feed(text[end - 1])
        if matcher.stopped:
            return
        suffixes = [text[i:end] for i in range(end)]
        held = max((len(s) for s in suffixes if any(t.startswith(s) for t in stops)), default=0)
        assert shown == text[: end - held]


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("text EN") == "text "
    assert matcher.feed("D and more") == ""
    assert matcher.stopped
    assert matcher.feed("END again") == ""
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        StopMatcher(["a", ""])
    assert (caught.value.code, caught.value.param) == ("invalid_value", "stop")


# ---- both --------------------------------------------------------------------------------------


@given(texts, st.lists(st.text("aeо 漢.", min_size=1, max_size=3), max_size=3), ids_lists)
@settings(max_examples=200, deadline=None)
def test_streams_show_the_text_before_the_first_stop(
    codec: TextCodec, text: str, stops: list[str], tail: list[int]
) -> None:
    ids = codec.tokenizer.encode(text).ids + tail
    whole = codec.tokenizer.decode(ids)
    stream = TextStream(codec, stops)
    deltas = [stream.push([number]) for number in ids]
    shown = "".join(delta.text for delta in deltas) + stream.flush()
    expected = first_stop(whole, stops)
    assert shown == (whole if expected is None else expected)


def test_a_stop_across_tokens_ends_the_stream(codec: TextCodec) -> None:
    stream = TextStream(codec, ["wor"])
    hello, world = codec.tokenizer.encode("Hello,").ids, codec.tokenizer.encode(" world!").ids
    assert stream.push(hello) == TextDelta("Hello,", False)
    assert stream.push(world) == TextDelta(" ", True)
    assert stream.push(hello) == TextDelta("", True)
    assert stream.flush() == ""


def test_flush_gives_the_held_text(codec: TextCodec) -> None:
    stream = TextStream(codec, ["\n\nUser:"])
    assert stream.push(codec.tokenizer.encode("done\n\nUs").ids) == TextDelta("done", False)
    assert stream.flush() == "\n\nUs"


@given(texts)
@example('"\\\x00\u2028</script>' + AWKWARD)
def test_escaped_text_stands_in_a_json_string(text: str) -> None:
    escaped = escape_json(text)
    assert json.loads(b'"' + escaped + b'"') == text
    assert not any(byte < 0x20 for byte in escaped)
