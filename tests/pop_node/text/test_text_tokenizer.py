"""The codec on the real model, with transformers as the oracle."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pop_node.text.template import MAX_RENDERED_CHARS, ChatTemplate
from pop_node.text.tokenizer import TextCodec
from wire.errors import ConfigError, RequestError
from wire.messages import ChatInput, ChatTurn, TextInput, TokensInput

TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

texts = st.text(st.characters(codec="utf-8"), max_size=60)
turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def codec(smollm2_dir: Path) -> TextCodec:
    return TextCodec.load(smollm2_dir)


@pytest.fixture(scope="module")
def oracle(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture
def model_dir(smollm2_dir: Path, tmp_path: Path) -> Path:
    """A copy of the text files that a test may damage."""
    for name in TEXT_FILES:
        shutil.copyfile(smollm2_dir / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


@given(turns)
@settings(max_examples=150, deadline=None)
def test_chat_agrees_with_transformers(codec: TextCodec, oracle: Any, talk: list[Any]) -> None:
    expected = oracle.apply_chat_template(
        [{"role": role, "content": content} for role, content in talk],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert codec.encode_input(ChatInput([ChatTurn(*turn) for turn in talk])) == expected


@given(texts.filter(bool))
@settings(max_examples=200, deadline=None)
def test_text_agrees_with_transformers(codec: TextCodec, oracle: Any, text: str) -> None:
    expected = oracle(text)["input_ids"]
    if expected:
        assert codec.encode_input(TextInput(text)) == expected
    else:  # a few control characters are not in the vocabulary
        with pytest.raises(RequestError, match="no tokens"):
            codec.encode_input(TextInput(text))


def test_facts_of_the_model(codec: TextCodec) -> None:
    assert (codec.vocab_size, codec.context_tokens) == (49152, 8192)
    assert codec.eos_ids == {2}


def test_special_tokens_are_single_ids(codec: TextCodec) -> None:
    ids = codec.encode_input(ChatInput([ChatTurn("user", "Hi")]))
    assert ids.count(1) == 3  # <|im_start|>: the default system turn, the user's, the assistant's
    assert ids.count(2) == 2


def test_ids_are_used_as_they_are(codec: TextCodec) -> None:
    assert codec.encode_input(TokensInput([5, 49151, 0])) == [5, 49151, 0]


@pytest.mark.parametrize("bad", [-1, 49152, 2**40])
def test_ids_outside_the_vocabulary_are_refused(codec: TextCodec, bad: int) -> None:
    with pytest.raises(RequestError) as caught:
        codec.encode_input(TokensInput([1, bad]))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "prompt")


@pytest.mark.parametrize("empty", [ChatInput([]), TextInput(""), TokensInput([])])
def test_empty_prompts_are_refused(codec: TextCodec, empty: Any) -> None:
    with pytest.raises(RequestError) as caught:
        codec.encode_input(empty)
    assert caught.value.code == "empty_prompt"


def test_lone_surrogates_are_refused(codec: TextCodec) -> None:
    for bad in (TextInput("a\ud800b"), ChatInput([ChatTurn("user", "\udfff")])):
        with pytest.raises(RequestError) as caught:
            codec.encode_input(bad)
        assert caught.value.code == "invalid_value"


def test_text_gets_the_tokenizers_own_bos_and_chat_does_not(model_dir: Path) -> None:
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    tokenizer["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (model_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(
        model_dir / "tokenizer_config.json",
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    codec = TextCodec.load(model_dir)
    words = "one two three four five six"
    plain = codec.tokenizer.encode(words, add_special_tokens=False).ids
    assert len(plain) > 3, "truncation written into tokenizer.json must not apply"
    assert codec.encode_input(TextInput(words)) == [1, *plain]
    assert codec.encode_input(ChatInput([ChatTurn("user", words)])) == [1, *plain]


def test_end_tokens_are_collected_from_all_files(model_dir: Path) -> None:
    edit(model_dir / "generation_config.json", eos_token_id=[2, 7])
    edit(model_dir / "config.json", eos_token_id=9)
    edit(model_dir / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    assert TextCodec.load(model_dir).eos_ids == {0, 2, 7, 9}


def test_template_file_wins_over_settings(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("file:{{ messages[0].content }}")
    codec = TextCodec.load(model_dir)
    assert codec.template is not None
    assert codec.template.render([ChatTurn("user", "x")]) == "file:x"


def test_default_of_several_templates(model_dir: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(model_dir / "tokenizer_config.json", chat_template=several)
    codec = TextCodec.load(model_dir)
    assert codec.template is not None
    assert codec.template.render([ChatTurn("user", "x")]) == "yes"


def test_model_without_template_takes_text_only(model_dir: Path) -> None:
    edit(model_dir / "tokenizer_config.json", chat_template=...)
    codec = TextCodec.load(model_dir)
    assert codec.encode_input(TextInput("hello"))
    with pytest.raises(RequestError, match="no chat template") as caught:
        codec.encode_input(ChatInput([ChatTurn("user", "hello")]))
    assert caught.value.code == "template_error"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"[]", b"{\xff", b"{}", b"[" * 100_000],
    ids=["none", "empty", "list", "no text", "no keys", "deep"],
)
def test_damaged_directories_are_refused(model_dir: Path, name: str, content: bytes | None) -> None:
    (model_dir / name).unlink()
    if content is not None:
        (model_dir / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        TextCodec.load(model_dir)


# ---- the template alone ------------------------------------------------------------------------


def render(source: str, content: str = "hi", **special: str) -> str:
    template = ChatTemplate(source, special, lambda: datetime(2031, 2, 3, tzinfo=UTC))
    return template.render([ChatTurn("user", content)])


def test_helpers_of_the_environment() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ strftime_now('%d %b %Y') }}") == "03 Feb 2031"
    assert render("{{ eos_token }}", eos_token="</s>") == "</s>"
    assert (
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}") == "1"
    assert (
        render("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}")
        == "TrueTrueTrue"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[5].content.strip() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'x'.nothing() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%d' | format('x') }}",
    ],
)
def test_whatever_fails_in_a_template_is_a_template_error(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert (caught.value.code, caught.value.param) == ("template_error", "messages")


def test_output_is_bounded() -> None:
    loop = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(RequestError) as caught:
        render(loop, "x" * 1000)
    assert caught.value.code == "request_too_large"
    assert len(render("{{ messages[0].content }}", "x" * MAX_RENDERED_CHARS)) == MAX_RENDERED_CHARS


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 150 + "{% endif %}" * 150,
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    ],
    ids=["no expression", "parentheses", "indentation", "blocks"],
)
def test_a_template_that_does_not_compile_is_a_configuration_error(source: str) -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate(source, {})


def test_contents_are_never_taken_for_template_code() -> None:
    assert render("{{ messages[0].content }}", "{{ 1 + 1 }}{% raw %}") == "{{ 1 + 1 }}{% raw %}"
