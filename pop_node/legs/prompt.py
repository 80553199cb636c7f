"""From a submit to token ids and a token limit; runs on a worker thread."""

from __future__ import annotations

from pop_node.legs import events as ev
from pop_node.text.stream import TextStream
from pop_node.text.tokenizer import TextCodec, too_long
from wire.errors import RequestError
from wire.messages import Submit


def prepare(codec: TextCodec, submit: Submit, context_tokens: int) -> ev.Prepared:
    """Prompt ids and the token limit of a submit; runs on a worker thread.

    Raises ``RequestError`` for a prompt that cannot be rendered, is empty or does not fit, and for
    forced ids that no answer to it could begin with.
    """
    prompt_ids = codec.encode_input(submit.input)
    room = context_tokens - len(prompt_ids)
    if room < 1:
        raise too_long(str(len(prompt_ids)), context_tokens, "messages")
    asked = submit.sampling.max_tokens
    max_tokens = room if asked is None else min(asked, room)
    forced = submit.forced_ids
    if len(forced) >= max_tokens or not all(0 <= i < codec.vocab_size for i in forced):
        raise RequestError(
            f"{len(forced)} forced ids leave nothing of {max_tokens} tokens to produce, or lie "
            "outside the vocabulary",
            code="invalid_value",
        )
    return ev.Prepared(prompt_ids, max_tokens, TextStream(codec, submit.sampling.stop))
