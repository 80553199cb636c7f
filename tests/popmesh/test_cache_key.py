"""The key that all routers of a mesh share: who gets it, and what is no key."""

from __future__ import annotations

from pathlib import Path

import pytest

from popmesh.authority import init_authority, issue
from popmesh.cache_key import FILE, NUM_BYTES, load_cache_key, make_cache_key
from wire.errors import ConfigError
from wire.tls import Identity

NODE = Identity("demo", "node", "fra", "fra-1", frozenset({"prefill"}))
ROUTERS = [Identity("demo", "router", site, f"router-{site}") for site in ("fra", "lhr")]


def test_keys_are_random_and_for_their_owner_alone(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b", "a"):
        make_cache_key(tmp_path / name)
        keys.add(load_cache_key(tmp_path / name))
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert {len(key) for key in keys} == {NUM_BYTES}
    assert len(keys) == 3


def test_routers_get_the_mesh_s_key_with_their_certificates_and_nodes_do_not(
    tmp_path: Path,
) -> None:
    init_authority(tmp_path)
    folders = [issue(tmp_path, router) for router in ROUTERS]
    assert {load_cache_key(folder / FILE) for folder in folders} == {
        load_cache_key(tmp_path / FILE)
    }
    assert (folders[0] / FILE).stat().st_mode & 0o777 == 0o600
    assert not (issue(tmp_path, NODE) / FILE).exists()


def test_an_authority_without_a_key_gets_one_once(tmp_path: Path) -> None:
    init_authority(tmp_path)
    (tmp_path / FILE).unlink()
    keys = {load_cache_key(issue(tmp_path, router) / FILE) for router in ROUTERS}
    assert keys == {load_cache_key(tmp_path / FILE)}


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "has 0 bytes"), ("ab" * 31, "has 31 bytes"), ("key", "cannot be read"), (None, "cannot")],
)
def test_what_is_no_key_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_cache_key(path)
    assert str(path) in str(caught.value)
    assert "hex" in str(caught.value)
