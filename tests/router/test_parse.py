"""What clients may send, and the exact refusal for everything else."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.errors import error_body, error_headers, status_of
from router.api.parse import parse_chat, parse_completion
from router.api.render import StreamRenderer, Usage, whole_answer
from wire.errors import (
    DeadlineError,
    MeshError,
    OverloadError,
    PeerError,
    RequestError,
)
from wire.messages import ChatInput, ChatTurn, TextInput, TokensInput

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": USER} | fields).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi"} | fields).encode()


def test_defaults() -> None:
    parsed = parse_chat(chat())
    assert parsed.input == ChatInput([ChatTurn("user", "hi")])
    assert (parsed.temperature, parsed.top_p, parsed.seed) == (1.0, 1.0, None)
    assert (parsed.max_tokens, parsed.stop, parsed.stream) == (None, (), False)
    assert parse_completion(completion()).max_tokens == 16


def test_everything_supported_at_once() -> None:
    parsed = parse_chat(
        chat(
            max_completion_tokens=5,
            temperature=0,
            top_p=0.5,
            seed=-1,
            stop=["a", "b"],
            stream=True,
            stream_options={"include_usage": True},
            ignore_eos=True,
            user="u",
            metadata={"a": "b"},
            store=True,
        )
    )
    sampling = parsed.sampling(drawn_seed=3)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.0, 0.5)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (2**64 - 1, ["a", "b"], True)
    assert parsed.include_usage
    assert parse_chat(chat()).sampling(3).seed == 3


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parsed = parse_chat(chat(messages=[{"role": "user", "content": parts}]))
    assert parsed.input == ChatInput([ChatTurn("user", "ab")])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "developer", "tool"])
def test_roles(role: str) -> None:
    assert parse_chat(chat(messages=[{"role": role, "content": "x"}]))


def test_an_answer_may_come_back_as_a_message() -> None:
    message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}
    assert parse_chat(chat(messages=[*USER, message]))


@pytest.mark.parametrize(
    "harmless",
    [
        {"n": 1},
        {"n": None},
        {"frequency_penalty": 0},
        {"presence_penalty": 0.0},
        {"logprobs": False},
        {"response_format": {"type": "text"}},
        {"temperature": None},
        {"stop": None},
        {"stop": []},
        {"tools": []},
        {"logit_bias": {}},
        {"some_future_thing": None},
    ],
)
def test_what_asks_for_nothing_passes(harmless: dict[str, Any]) -> None:
    assert parse_chat(chat(**harmless))


def test_completion_inputs() -> None:
    assert parse_completion(completion(prompt="x")).input == TextInput("x")
    assert parse_completion(completion(prompt=[1, 2])).input == TokensInput([1, 2])
    assert parse_completion(completion(best_of=1, echo=False, suffix=None, n=1))


BAD_CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": None}, "invalid_value", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"model": 3}, "invalid_type", "model"),
    ({"messages": []}, "empty_prompt", "messages"),
    ({"messages": None}, "invalid_value", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
    ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 4}]}, "invalid_type", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "name": "n"}]},
        "unsupported_parameter",
        "messages[0].name",
    ),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": -5}, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**30}, "invalid_value", "max_tokens"),
    ({"max_tokens": 2.5}, "invalid_type", "max_tokens"),
    ({"max_tokens": "9"}, "invalid_type", "max_tokens"),
    ({"max_tokens": True}, "invalid_type", "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "invalid_value", "max_tokens"),
    ({"temperature": -0.1}, "invalid_value", "temperature"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_p": 1.01}, "invalid_value", "top_p"),
    ({"seed": 2**64}, "invalid_value", "seed"),
    ({"seed": -(2**63) - 1}, "invalid_value", "seed"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stop": ["a"] * 5}, "invalid_value", "stop"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop[0]"),
    ({"stop": [1]}, "invalid_type", "stop[0]"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    (
        {"stream": True, "stream_options": {"chunk": 1}},
        "unsupported_parameter",
        "stream_options.chunk",
    ),
    ({"n": 2}, "unsupported_parameter", "n"),
    ({"n": 0}, "unsupported_parameter", "n"),
    ({"n": True}, "unsupported_parameter", "n"),
    ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
    ({"logprobs": True}, "unsupported_parameter", "logprobs"),
    ({"logprobs": 0}, "unsupported_parameter", "logprobs"),
    ({"tools": [{}]}, "unsupported_parameter", "tools"),
    ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    ({"frobnicate": 1}, "unsupported_parameter", "frobnicate"),
    ({"prompt": "x"}, "unsupported_parameter", "prompt"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD_CHAT)
def test_refusals_name_the_parameter(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(chat(**fields))
    assert (caught.value.code, caught.value.param) == (code, param)
    assert status_of(caught.value) == 400


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "empty_prompt"),
        ([], "empty_prompt"),
        (["a", "b"], "unsupported_parameter"),
        ([[1], [2]], "unsupported_parameter"),
        ([1.5], "invalid_type"),
        ([-1], "invalid_value"),
        ([2**31], "invalid_value"),
        (7, "invalid_type"),
        (None, "invalid_value"),
    ],
)
def test_prompt_refusals(prompt: Any, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion(completion(prompt=prompt))
    assert caught.value.code == code
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"temperature": 1e999}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"model":"m"}x',
    ],
)
def test_what_is_no_json_object(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(RequestError):
            parse(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["model", "messages", "prompt", "stop", "seed", "temperature", "stream", "n", "max_tokens"]


@given(st.dictionaries(st.sampled_from(NAMES), json_values))
def test_any_json_is_parsed_or_refused(fields: dict[str, Any]) -> None:
    body = msgspec.json.encode(fields)
    for parse in (parse_chat, parse_completion):
        refusal: RequestError | None = None
        try:
            parse(body)
        except RequestError as error:
            refusal = error
        if refusal is not None:
            assert msgspec.json.decode(error_body(refusal))["error"]["message"]


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(body)


# ---- the way back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x"), 400),
        (RequestError("x", code="context_length_exceeded"), 400),
        (RequestError("x", code="model_not_found"), 404),
        (RequestError("x", code="request_too_large"), 413),
        (RequestError("x", code="request_timeout"), 408),
        (RequestError("x", code="invalid_api_key"), 401),
        (RequestError("x", code="forbidden"), 403),
        (OverloadError("x"), 503),
        (OverloadError("x", code="too_many_requests"), 429),
        (PeerError("x"), 502),
        (DeadlineError("x"), 504),
        (MeshError("x"), 500),
    ],
)
def test_status_map(error: MeshError, status: int) -> None:
    assert status_of(error) == status
    body = msgspec.json.decode(error_body(error))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert ("Retry-After" in error_headers(error)) == (status in (429, 503))


def test_retry_after_rounds_up() -> None:
    assert error_headers(OverloadError("x", retry_after_s=1.2)) == {"Retry-After": "2"}


@given(text=st.text(), kind=st.sampled_from(["chat", "completion"]), usage=st.booleans())
def test_events_are_json_whatever_the_text(text: str, kind: Any, usage: bool) -> None:
    text = text.encode("utf-8", "replace").decode()
    escaped = msgspec.json.encode(text)[1:-1]
    renderer = StreamRenderer(kind, 'id"', "mo\\del", 5, usage)
    stream = renderer.opening() + renderer.text(escaped, b"1")
    stream += renderer.closing("stop", Usage(3, 2, 1), None)
    *events, done, end = stream.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    ids, data = zip(*(event.split(b"\ndata: ") for event in events), strict=True)
    opening = [b'id: id":0~0.00000000'] if kind == "chat" else []
    assert list(ids) == opening + [b'id: id":1'] * (len(ids) - len(opening))
    chunks = [json.loads(event) for event in data]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    got = "".join(c["delta"].get("content", "") if kind == "chat" else c["text"] for c in choices)
    assert got == text
    assert choices[-1]["finish_reason"] == "stop"
    assert (chunks[-1].get("usage") is not None) == usage
    whole = json.loads(whole_answer(kind, "i", "m", 5, escaped, "length", Usage(3, 2, 1)))
    choice = whole["choices"][0]
    assert (choice["message"]["content"] if kind == "chat" else choice["text"]) == text
    assert whole["usage"]["total_tokens"] == 4
