"""Bytes of a request body -> ``ParsedRequest``, or a ``RequestError`` that names the parameter.

Pure. Every parameter is either understood, refused with ``unsupported_parameter``, or known to ask
for nothing: null, or the value that the API defines as that parameter's default. Only ``user``,
``metadata`` and ``store`` pass unread, because they do not concern the answer.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from router.api.types import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    ParsedRequest,
)
from wire.errors import RequestError
from wire.messages import ChatInput, ChatTurn, Input, TextInput, TokensInput

SILENT = frozenset({"user", "metadata", "store"})

COMPLETION_MAX_TOKENS = 16
"""Default of ``max_tokens`` for ``/v1/completions``. Source: OpenAI API reference."""

_NEUTRAL_BOTH: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logit_bias": ({},),
}
# Values of unsupported parameters that ask for nothing. Source: defaults of the OpenAI API
# reference.
_NEUTRAL: dict[type[GenerationBody], dict[str, tuple[Any, ...]]] = {
    ChatBody: {
        **_NEUTRAL_BOTH,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "verbosity": ("medium",),
    },
    CompletionBody: {**_NEUTRAL_BOTH, "best_of": (1,), "echo": (False,), "suffix": ("",)},
}

_AT_PATH = re.compile(r" - at `\$\.?(.*)`$")
_FIELD = re.compile(r"field `([^`]*)`")
_PART_TYPE = re.compile(r"\.content\[.*\]\.type$")

Body = TypeVar("Body", bound=GenerationBody)


def parse_chat(data: bytes) -> ParsedRequest:
    """Body of ``/v1/chat/completions``; raises ``RequestError``."""
    fields = _load_object(data)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [_without_empty(m) if isinstance(m, dict) else m for m in messages]
    body = _typed(fields, ChatBody)
    if not body.messages:
        raise RequestError("messages is empty", code="empty_prompt", param="messages")
    if None not in (body.max_tokens, body.max_completion_tokens) and (
        body.max_tokens != body.max_completion_tokens
    ):
        raise RequestError(
            f"max_tokens is {body.max_tokens} but max_completion_tokens is "
            f"{body.max_completion_tokens}; send one of them",
            code="invalid_value",
            param="max_tokens",
        )
    turns = [ChatTurn(message.role, message.text()) for message in body.messages]
    max_tokens = body.max_completion_tokens or body.max_tokens
    return _parsed("chat", body, ChatInput(turns), max_tokens)


def parse_completion(data: bytes) -> ParsedRequest:
    """Body of ``/v1/completions``; raises ``RequestError``."""
    fields = _load_object(data)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and any(isinstance(item, (str, list)) for item in prompt):
        raise RequestError(
            "a list of prompts is not supported; send one string or one list of token ids",
            code="unsupported_parameter",
            param="prompt",
        )
    body = _typed(fields, CompletionBody)
    if not body.prompt:
        raise RequestError("prompt is empty", code="empty_prompt", param="prompt")
    prompt_input = (
        TextInput(body.prompt) if isinstance(body.prompt, str) else TokensInput(body.prompt)
    )
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return _parsed("completion", body, prompt_input, max_tokens)


def _load_object(data: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise RequestError(
            f"the body must be a JSON object, not {type(value).__name__}", code="invalid_type"
        )
    return {name: item for name, item in value.items() if item is not None}


def _without_empty(message: dict[str, Any]) -> dict[str, Any]:
    """A message without fields that say nothing (null, or an empty list such as no tool calls)."""
    return {
        name: item
        for name, item in message.items()
        if item is not None and (item != [] or name == "content")
    }


def _typed(fields: dict[str, Any], body_type: type[Body]) -> Body:
    known = body_type.__struct_fields__
    neutral = _NEUTRAL[body_type]
    supported: dict[str, Any] = {}
    for name, value in fields.items():
        if name in known:
            supported[name] = value
        elif name not in SILENT:
            _refuse_unless_neutral(name, value, neutral.get(name, ()))
    try:
        return msgspec.convert(supported, body_type)
    except msgspec.ValidationError as exc:
        raise _explained(str(exc)) from exc


def _refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    for harmless in neutral:
        if value == harmless and isinstance(value, bool) == isinstance(harmless, bool):
            return
    shown = name if len(name) <= 64 else name[:61] + "..."
    allowed = " or ".join(msgspec.json.encode(item).decode() for item in neutral)
    detail = f"; only {allowed} is accepted" if neutral else ""
    raise RequestError(
        f"{shown} is not supported{detail}", code="unsupported_parameter", param=shown
    )


def _explained(text: str) -> RequestError:
    """msgspec's message -> an error whose ``param`` is a path such as ``messages[0].role``."""
    found = _AT_PATH.search(text)
    path = found.group(1) if found else ""
    reason = _AT_PATH.sub("", text)
    field = _FIELD.search(reason)
    if field is not None:
        name = f"{path}.{field.group(1)}" if path else field.group(1)
        if "unknown" in reason:
            return RequestError(
                f"{name} is not supported", code="unsupported_parameter", param=name
            )
        return RequestError(f"{name} is missing", code="invalid_value", param=name)
    if _PART_TYPE.search(path):
        return RequestError(
            f"{path}: only parts of type text are supported",
            code="unsupported_parameter",
            param=path,
        )
    code = "invalid_type" if ", got " in reason else "invalid_value"
    return RequestError(f"{path}: {reason}", code=code, param=path or None)


def _parsed(
    kind: Any, body: GenerationBody, prompt: Input, max_tokens: int | None
) -> ParsedRequest:
    stop = body.stop
    if body.seed is not None and not -(2**63) <= body.seed < 2**64:
        raise RequestError("seed must fit in 64 bits", code="invalid_value", param="seed")
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "stream_options needs stream: true", code="invalid_value", param="stream_options"
        )
    return ParsedRequest(
        kind=kind,
        model=body.model,
        input=prompt,
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=None if body.seed is None else body.seed % 2**64,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        ignore_eos=body.ignore_eos,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
    )
