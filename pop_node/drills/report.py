"""What a node says of a cold start it rehearsed: one JSON document, ``DrillReport.report``.

Times are seconds since the model's new process was started, but for ``down_s`` and ``drop_s``,
which are lengths of what came before it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pop_node.drills.pages import Dropped

SCHEMA = 1
"""Grows when a field changes its meaning."""

Source = Literal["disk", "peer", "origin"]
"""Where the model's bytes come from: this node's store, another node's, or where the topology says
that the model is from. For the last two the node's own copy is put aside first."""


class Options(msgspec.Struct, forbid_unknown_fields=True, rename={"source": "from"}):
    """``Drill.options`` of a cold start.

    ``libraries``: drop the pages of Python and its libraries too, as far as nobody maps them.
    ``whole``: the whole node starts anew, its agent too; then there is no report on this link, and
    the new process is asked for it with ``recall``, the number of the drill.
    """

    source: Source = "disk"
    libraries: bool = False
    whole: bool = False
    recall: int = 0


class Phase(msgspec.Struct, frozen=True):
    """A part of the start; phases overlap and lie within one another. ``nbytes`` went through."""

    name: str
    start_s: float
    end_s: float
    nbytes: int = msgspec.field(default=0, name="bytes")


class Cold(msgspec.Struct, frozen=True):
    """How cold it was: pages in the page cache, looked at after dropping and just before the start.

    The model's are 0, else there is no report. ``libraries`` is None when they were left alone.
    """

    model_pages: int
    model_pages_resident: int
    library_pages: int
    library_pages_resident: int
    model: Dropped | None
    libraries: Dropped | None


class ColdStartReport(msgspec.Struct, rename={"source": "from"}):
    """One cold start. ``total_s``: until the agent heard that a token was produced; ``said_s`` is
    the moment of this report. ``load_average``: of the node's machine over the last minute, as
    whatever else works there makes a start slower."""

    schema: int
    node: str
    model: str
    source: Source
    bundle: str
    bundle_bytes: int
    cold: Cold
    down_s: float
    drop_s: float
    phases: list[Phase]
    total_s: float
    said_s: float
    load_average: float
