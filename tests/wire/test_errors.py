"""Errors that travel keep their meaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire import errors
from wire.errors import (
    ConfigError,
    MeshError,
    OverloadError,
    PeerError,
    RequestError,
    error_from_code,
)


@pytest.mark.parametrize("code", errors._BY_CODE)
def test_a_code_comes_back_as_its_class(code):
    error = error_from_code(code, "why", site="fra", request_id="r", retry_after_s=1.5)
    expected = errors._BY_CODE[code]
    assert type(error) is (PeerError if expected is ConfigError else expected)
    assert (error.code, error.message, error.site) == (code, "why", "fra")
    assert (error.request_id, error.retry_after_s) == ("r", 1.5)
    assert error.retryable is type(error).default_retryable


@given(st.text(max_size=30).filter(lambda code: code not in errors._BY_CODE))
def test_an_unknown_code_is_the_peers_fault(code):
    assert isinstance(error_from_code(code, "?"), PeerError)


@pytest.mark.parametrize("cls", [MeshError, *set(errors._BY_CODE.values()) - {ConfigError}])
def test_every_class_is_listed_under_its_own_code(cls):
    assert errors._BY_CODE[cls.default_code] is cls


def test_what_the_sender_says_about_retrying_wins():
    assert error_from_code("overloaded", "no", retryable=False).retryable is False
    assert error_from_code("protocol_error", "yes", retryable=True).retryable is True
    assert OverloadError("busy").retryable


def test_a_config_error_reads_as_place_problem_remedy():
    error = ConfigError("no port", where="mesh.yaml:7", suggestion="write HOST:PORT")
    assert str(error) == "mesh.yaml:7: no port (write HOST:PORT)"
    assert str(ConfigError("no port")) == "no port"


@pytest.mark.parametrize("code", ["not_found", "method_not_allowed", "drill_refused"])
def test_a_routers_no_is_no_failure_of_the_router(code):
    """A caller with several routers would ask the next one for what all of them refuse."""
    assert isinstance(error_from_code(code, "?"), RequestError)
