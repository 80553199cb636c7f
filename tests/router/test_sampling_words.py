"""Top-k, min-p and penalties on their way from a client to nodes that know of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from router.api.parse import parse_chat, parse_completion
from router.routing.policy import RouteRequest, choose
from tests.router.views import FOUR, request, view_of
from wire.errors import OverloadError, RequestError
from wire.messages import Sampling


def chat(**fields: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return json.dumps(body | fields).encode()


LIMITS = {
    "top_k": 40,
    "min_p": 0.05,
    "presence_penalty": -2,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.1,
}


def test_all_of_them_reach_the_wire() -> None:
    for parsed in (
        parse_chat(chat(**LIMITS)),
        parse_completion(json.dumps({"model": "m", "prompt": "x"} | LIMITS).encode()),
    ):
        sampling = parsed.sampling(1)
        assert {name: getattr(sampling, name) for name in LIMITS} == LIMITS


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("top_k", 0), ("min_p", 0), ("repetition_penalty", 1), ("top_k", None)],
)
def test_what_asks_for_nothing_needs_no_new_node(name: str, value: Any) -> None:
    assert parse_chat(chat(**{name: value})).sampling(1).needed_version == 1


@pytest.mark.parametrize("name", LIMITS)
def test_each_of_them_needs_a_node_that_knows_it(name: str) -> None:
    assert parse_chat(chat(**{name: LIMITS[name]})).sampling(1).needed_version == 4


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("top_k", -2, "invalid_value"),
        ("top_k", 1.5, "invalid_type"),
        ("top_k", 2**40, "invalid_value"),
        ("min_p", -0.1, "invalid_value"),
        ("min_p", 1.1, "invalid_value"),
        ("presence_penalty", 2.1, "invalid_value"),
        ("frequency_penalty", -2.1, "invalid_value"),
        ("frequency_penalty", "much", "invalid_type"),
        ("repetition_penalty", 0, "invalid_value"),
        ("repetition_penalty", -1, "invalid_value"),
        ("repetition_penalty", 10.5, "invalid_value"),
        ("repetition_penalty", 1e-300, "invalid_value"),  # 0 in float32
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(chat(**{name: value}))
    assert (caught.value.code, caught.value.param) == (code, name)


def asking(version: int) -> RouteRequest:
    return replace(request(), wire_version=version)


def test_nodes_that_would_not_understand_are_not_chosen() -> None:
    view = view_of(FOUR, iad_1={"version": 4})
    plan = choose(asking(4), view, 0.0, random.Random(1))
    assert (plan.route.prefill, plan.route.decode) == ("iad-1", "iad-1")
    assert "speaks version 2" in dict(plan.rejected)["fra-1"]
    plan = choose(asking(1), view, 0.0, random.Random(1))
    assert plan.route.prefill == "fra-1"


def test_where_no_node_understands_there_is_no_route() -> None:
    with pytest.raises(OverloadError):
        choose(asking(4), view_of(FOUR), 0.0, random.Random(1))


def test_an_older_routers_words_ask_for_nothing_new() -> None:
    assert Sampling(1, 0.0, 1.0, 1, [], False).needed_version == 1
