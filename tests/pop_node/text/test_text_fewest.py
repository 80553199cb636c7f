"""Prompts that can never fit are refused by their bytes; the bound never exceeds the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from pop_node.text.fewest import FewestTokens
from pop_node.text.tokenizer import TextCodec
from wire.errors import RequestError
from wire.messages import TextInput


@pytest.fixture(scope="module")
def codec(smollm2_dir: Path) -> TextCodec:
    return TextCodec.load(smollm2_dir)


SPECIALS = ["<|endoftext|>", "\x04", "\xa0", " " * 90, "=" * 90, "def f(x):\n    ", "123"]
PIECES = st.one_of(st.text(max_size=20), st.sampled_from(SPECIALS))


@given(pieces=st.lists(PIECES, max_size=12))
def test_no_text_has_fewer_tokens(codec: TextCodec, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert codec.fewest.of_text(text) <= len(codec.tokenizer.encode(text).ids)


def test_every_token_by_itself_is_at_most_the_longest(codec: TextCodec) -> None:
    assert codec.fewest.longest == max(map(len, codec.token_table.spellings))
    worst = max(codec.token_table.spellings, key=len).decode()
    assert len(codec.tokenizer.encode(worst).ids) == codec.fewest.of_text(worst) == 1


def test_a_huge_prompt_is_refused_before_it_is_tokenised(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Untouched:
        def encode(self, *_: object, **__: object) -> None:
            raise AssertionError("it is tokenised")

    untouched: Any = Untouched()
    text = TextInput("hello world " * 250_000)
    with pytest.raises(RequestError, match="the prompt has at least") as caught:
        replace(codec, tokenizer=untouched).encode_input(text)
    assert caught.value.code == "context_length_exceeded"


def tokenizer(model: Any = None, **parts: Any) -> Tokenizer:
    """Byte-level BPE of single bytes and one merge, with other parts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"ab": len(letters)}
    found = Tokenizer(BPE(vocabulary, [("a", "b")]) if model is None else model)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(found, name, part)
    return found


def fewest(of: Tokenizer) -> FewestTokens:
    return FewestTokens.of(of, [b"a", b"ab"])


def test_what_may_shrink_a_text_leaves_nothing_known() -> None:
    assert fewest(tokenizer()).longest == 2
    removing = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    isolating = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert fewest(tokenizer(pre_tokenizer=isolating)).longest == 2
    stripping = tokenizer()
    stripping.add_special_tokens([AddedToken("<s>", lstrip=True)])
    for unknown in (
        tokenizer(normalizer=normalizers.NFC()),
        tokenizer(pre_tokenizer=removing),
        tokenizer(pre_tokenizer=pre_tokenizers.Whitespace()),
        tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")),
        tokenizer(BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
        stripping,
    ):
        assert fewest(unknown) == FewestTokens()
        assert fewest(unknown).of_text("x" * 10**6) == 0


def test_bytes_that_no_token_stands_for_do_not_count() -> None:
    known = FewestTokens.of(tokenizer(), [b"a", b"bb"])
    assert known.of_text("c" * 100) == 0
    assert known.of_text("a" * 100 + "c" * 50) == 50
