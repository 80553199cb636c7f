"""A leg in the engine's words: the sequence that it asks for. Pure."""

from __future__ import annotations

from pop_node.engine.messages import Add
from pop_node.legs.events import Prepared
from wire.messages import Submit


def sequence_of(seq: int, submit: Submit, prepared: Prepared, stop_ids: frozenset[int]) -> Add:
    """Sequence ``seq`` of ``submit``, whose text is ``prepared``; ``stop_ids`` end an answer of the
    model, unless the client wants to read on."""
    sampling = submit.sampling
    return Add(
        seq=seq,
        leg=submit.leg,
        prompt_ids=prepared.prompt_ids,
        forced_ids=submit.forced_ids,
        max_tokens=prepared.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_ids=[] if sampling.ignore_eos else sorted(stop_ids),
        salt=submit.tenant.encode(),
        transfer=submit.transfer.id if submit.transfer is not None else b"",
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
    )
