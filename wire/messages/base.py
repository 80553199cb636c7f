"""What all messages of the mesh wire share: versions, the words of their fields, their form."""

from __future__ import annotations

from typing import Literal

import msgspec

MIN_VERSION = 1
MAX_VERSION = 4
"""Version 2 adds ``Retarget``, ``Attach``, ``Drill`` and their answers, and ``kept_tokens``.
Version 3 adds ``Warm``, ``Offers``, ``Loading``, ``DrillReport`` and what ``Load`` says of models
that are not in memory. Version 4 adds what ``Load`` says of bundles given to other nodes
and of tokens guessed ahead, and top-k, min-p and penalties of ``Sampling``.

They are said only on links where both sides know that version."""

Leg = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length", "handoff", "cancelled"]
Role = Literal["prefill", "decode"]


class WireStruct(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Shared struct options; tags are given by the subclasses."""
