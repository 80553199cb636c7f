"""Addresses as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.address import Dialer, format_address, is_loopback, parse_address
from wire.errors import ConfigError


@given(st.ip_addresses().map(str), st.integers(0, 65535))
def test_what_is_formatted_is_parsed_back(host, port):
    assert parse_address(format_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "host", ":80", "host:", "host:x", "host:-1", "h:65536", "h:١"]
)
def test_nonsense_is_refused_with_the_value(text):
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert repr(text) in caught.value.message
    assert caught.value.suggestion


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text):
    try:
        host, port = parse_address(text)
    except ConfigError:
        return
    assert host
    assert 0 <= port <= 65535


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("::", False),
        ("fra-1.example", False),
    ],
)
def test_only_loopback_counts_as_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_dialer_replaces_what_its_map_names():
    dialer = Dialer({"127.0.0.1:7001": "127.0.0.1:9001"})
    assert dialer.resolve("127.0.0.1:7001") == ("127.0.0.1", 9001)
    assert dialer.resolve("127.0.0.1:7002") == ("127.0.0.1", 7002)
