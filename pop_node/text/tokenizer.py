"""Everything the agent knows about a model's text: template, tokenizer, end-of-text ids, sizes.

Owns the way from an ``Input`` of the wire to token ids; must not know requests, blocks or torch.
``encode_input`` is CPU-bound (the tokenizer releases the GIL) and belongs in a worker thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pop_node.text.detokenizer import TokenTable
from pop_node.text.fewest import FewestTokens
from pop_node.text.template import ChatTemplate
from wire.errors import ConfigError, RequestError
from wire.messages import ChatInput, Input, TextInput, TokensInput

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, slots=True)
class TextCodec:
    """Immutable; shared by all requests of a model and safe to use from several threads.

    ``vocab_size`` is the number of rows of the model's embedding, ``context_tokens`` its longest
    sequence (prompt and answer together), ``eos_ids`` the tokens that end an answer.
    """

    tokenizer: Tokenizer = field(repr=False)
    template: ChatTemplate | None = field(repr=False)
    token_table: TokenTable = field(repr=False)
    eos_ids: frozenset[int]
    context_tokens: int
    vocab_size: int
    fewest: FewestTokens = FewestTokens()  # noqa: RUF009  (frozen)

    @classmethod
    def load(cls, model_dir: Path) -> TextCodec:
        """Read ``config.json``, ``tokenizer.json`` and, where present, ``generation_config.json``,
        ``tokenizer_config.json`` and ``chat_template.jinja`` of a model directory.

        Raises ``ConfigError`` when a file is missing, malformed or of an unsupported kind.
        """
        config = _read_json(model_dir / "config.json")
        generation = _read_json(model_dir / "generation_config.json", optional=True)
        settings = _read_json(model_dir / "tokenizer_config.json", optional=True)
        tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        specials = {
            name: text
            for name in _SPECIAL_TOKENS
            if (text := _token_text(settings.get(name))) is not None
        }
        source = _template_source(model_dir, settings)
        table = TokenTable.of(tokenizer)
        return cls(
            tokenizer=tokenizer,
            template=None if source is None else ChatTemplate(source, specials),
            token_table=table,
            eos_ids=_eos_ids(tokenizer, config, generation, specials.get("eos_token")),
            context_tokens=_positive(config, "max_position_embeddings", model_dir),
            vocab_size=_positive(config, "vocab_size", model_dir),
            fewest=FewestTokens.of(tokenizer, table.spellings),
        )

    def encode_input(self, input: Input) -> list[int]:
        """Token ids of a prompt, at least one.

        A conversation goes through the template, which writes the special tokens itself; a text
        gets those its tokenizer puts around every text (BOS, where it has one); ids stay as they
        are. Special tokens spelled out in a text are recognised, as in transformers.

        Raises ``RequestError``: ``empty_prompt``, ``template_error``, ``request_too_large``,
        ``context_length_exceeded`` for a text so long that it is not even tokenised (others of
        more tokens than the context are the caller's), or ``invalid_value`` for an id outside the
        vocabulary or text that is not Unicode.
        """
        match input:
            case ChatInput(turns):
                param = "messages"
                ids = self._encode_chat(input) if turns else []
            case TextInput(text):
                param = "prompt"
                ids = self._encode(text, param, add_special_tokens=True) if text else []
            case TokensInput(ids):
                param = "prompt"
                for number in ids:
                    if not 0 <= number < self.vocab_size:
                        raise RequestError(
                            f"token id {number} is outside the vocabulary [0, {self.vocab_size})",
                            code="invalid_value",
                            param=param,
                        )
        if not ids:
            raise RequestError("the prompt has no tokens", code="empty_prompt", param=param)
        return list(ids)

    def _encode_chat(self, input: ChatInput) -> list[int]:
        if self.template is None:
            raise RequestError(
                "this model has no chat template; send a plain prompt to /v1/completions",
                code="template_error",
                param="messages",
            )
        text = self.template.render(input.turns)
        return self._encode(text, "messages", add_special_tokens=False)

    def _encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        try:
            fewest = self.fewest.of_text(text)
            if fewest > self.context_tokens:
                raise too_long(f"at least {fewest}", self.context_tokens, param)
            encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as exc:  # a lone surrogate
            raise RequestError(
                "the prompt is not valid Unicode", code="invalid_value", param=param
            ) from exc
        ids: list[int] = encoding.ids
        return ids


def too_long(num_tokens: str, context_tokens: int, param: str) -> RequestError:
    """The refusal of a prompt that leaves no room for an answer."""
    return RequestError(
        f"the prompt has {num_tokens} tokens, the model's context holds {context_tokens}; "
        "shorten the prompt",
        code="context_length_exceeded",
        param=param,
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ConfigError("no tokenizer.json in the model directory", where=str(path))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises plain Exception
        raise ConfigError(f"not a tokenizer: {exc}", where=str(path)) from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"cannot be read as JSON: {exc}", where=str(path)) from exc
    if not isinstance(value, dict):
        raise ConfigError("is not a JSON object", where=str(path))
    return value


def _positive(config: dict[str, Any], key: str, model_dir: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{key} is {value!r}, not a positive integer", where=str(model_dir / "config.json")
        )
    return value


def _token_text(value: object) -> str | None:
    """A special token is written as its text or as an object with the text in ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(model_dir: Path, settings: dict[str, Any]) -> str | None:
    """A file of its own wins over the tokenizer's settings; of several named ones, the default."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _eos_ids(
    tokenizer: Tokenizer,
    config: dict[str, Any],
    generation: dict[str, Any],
    eos_token: str | None,
) -> frozenset[int]:
    """Union of what three files call the end: chat models often name a second one in just one."""
    found: set[int] = set()
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        numbers = value if isinstance(value, list) else [value]
        found.update(n for n in numbers if isinstance(n, int) and not isinstance(n, bool))
    if eos_token is not None and (number := tokenizer.token_to_id(eos_token)) is not None:
        found.add(number)
    return frozenset(found)
