"""Tests in Triton's interpreter, which triton takes up when it is imported or never.

So they run in a process of their own: ``tests/kernels/test_triton.py`` starts it; by hand,
``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter takes loop bounds out of arrays of one element.
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    )
