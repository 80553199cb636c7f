"""A model's chat template, rendered in a sandbox.

Owns how a conversation becomes one text; must not know tokens. Templates are written for
transformers, so its environment is the contract: block trimming, loop controls, ``tojson`` without
HTML escapes, ``raise_exception``, ``strftime_now`` and the ``generation`` tag. The template is the
model author's and the conversation is the client's: whatever goes wrong while rendering is a
``RequestError``, and the output is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from wire.errors import ConfigError, RequestError
from wire.messages import ChatTurn

MAX_RENDERED_CHARS = 8 * 1024 * 1024
"""Guess: two million tokens at four characters each; a template that loops stops here."""

_RENDER_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
"""What an expression inside a template can raise on values it did not expect."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; in serving just a scope."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def utc_now() -> datetime:
    """The clock of ``strftime_now``: UTC, so that two sites render the same prompt alike."""
    return datetime.now(UTC)


class ChatTemplate:
    """A compiled template; ``render`` may be called from several threads at once."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """Compile ``source``; ``special_tokens`` maps ``bos_token`` and the like to their text.

        Raises ``ConfigError`` if the template is not valid jinja2.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: clock().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as exc:
            # The last two: nested deeper than Python takes what jinja2 makes of it, or jinja2.
            raise ConfigError(f"the chat template does not compile: {exc}") from exc

    def render(self, turns: Sequence[ChatTurn]) -> str:
        """The conversation as text, open for the assistant's next turn.

        Raises ``RequestError``: ``template_error`` if the template refuses the turns or fails
        on it, ``request_too_large`` if the result exceeds ``MAX_RENDERED_CHARS``.
        """
        parts: list[str] = []
        total = 0
        try:
            for part in self._template.generate(
                self._special_tokens,
                messages=[{"role": turn.role, "content": turn.content} for turn in turns],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            ):
                total += len(part)
                if total > MAX_RENDERED_CHARS:
                    raise RequestError(
                        f"the conversation renders to more than {MAX_RENDERED_CHARS} characters",
                        code="request_too_large",
                        param="messages",
                    )
                parts.append(part)
        except _RENDER_FAULTS as exc:
            raise RequestError(
                f"the model's chat template refused the conversation: {exc}",
                code="template_error",
                param="messages",
            ) from exc
        return "".join(parts)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
