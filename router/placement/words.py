"""What the placement machine is told, what it asks for, and what it shows; frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from router.routing.view import View
from wire.messages import Warm


@dataclass(frozen=True, slots=True)
class Asked:
    """A request came for ``model``, to be met near ``site``; tokens as far as they are known."""

    model: str
    site: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Looked:
    """The mesh as it is now."""

    view: View


Event = Asked | Looked


@dataclass(frozen=True, slots=True)
class SayWarm:
    """Tell ``node``; ``is_news``: it was not told before."""

    node: str
    message: Warm
    is_news: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done for one region's demand for one model, and why.

    ``copies`` nodes of each role are wanted until ``until`` (the router's clock; 0: none is), and
    ``nodes`` are chosen. ``left_out`` names the region's other nodes, with why.
    """

    model: str
    region: str
    per_min: float
    copies: int
    nodes: tuple[str, ...]
    until: float
    why: str
    left_out: tuple[tuple[str, str], ...] = ()
