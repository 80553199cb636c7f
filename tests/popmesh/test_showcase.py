"""Where the demo listens: where everybody looks first, but never at somebody else's port."""

from __future__ import annotations

from pathlib import Path

import pytest

from popmesh import showcase
from popmesh.launcher.session import Options


@pytest.mark.parametrize(
    ("asked", "free", "taken"),
    [(None, True, showcase.PORT), (None, False, None), (9000, True, 9000), (9000, False, 9000)],
)
def test_it_takes_the_usual_port_where_that_is_free(monkeypatch, asked, free, taken):
    ran: list[Options] = []
    monkeypatch.setattr(showcase, "is_free", lambda port: free)
    monkeypatch.setattr(showcase, "run_mesh", lambda options, console, inside: ran.append(options))
    assert showcase.run_demo(Path("/store"), asked, once=False) == 0
    assert [options.port for options in ran] == [taken]
