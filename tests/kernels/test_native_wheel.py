"""What a wheel holds: the compiled library where there is a compiler, the sources anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from kernels.native.build import PREBUILT, SOURCE_FOLDER

ROOT = Path(__file__).resolve().parents[2]
DECLARED = ("setup.py", "pyproject.toml", "README.md", "LICENSE")

COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "made by this compiler" > "$2"
"""
"""Stands in for a real one, which takes twenty seconds."""


def wheel_of(folder: Path, path: Path) -> Path:
    """A wheel built where ``PATH`` is ``path``, of a copy of the checkout without what it built."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in DECLARED:
        shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=unwanted)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", folder],
        cwd=copy,
        env={"PATH": str(path)},
        check=True,
        capture_output=True,
        text=True,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_has_the_sources_and_where_it_can_the_library(
    tmp_path: Path, compiler: bool
) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    if compiler:
        (path / "cc").write_text(COMPILER)
        (path / "cc").chmod(0o755)
    wheel = wheel_of(tmp_path, path)
    assert wheel.name.endswith("-py3-none-any.whl") != compiler
    with ZipFile(wheel) as content:
        names = set(content.namelist())
        library = f"kernels/native/{PREBUILT}"
        assert (library in names) == compiler
        if compiler:
            assert content.read(library) == b"made by this compiler\n"
    sources = {f"kernels/{f.relative_to(ROOT / 'kernels')}" for f in SOURCE_FOLDER.rglob("*.[ch]")}
    assert len(sources) > 20
    assert sources <= names


BROKEN = "#!/bin/sh\necho 'as is missing' >&2\nexit 1\n"
GIVES_UP = COMPILER.replace("\n", '\ncase "$*" in *line.c*) ;; *) exit 1;; esac\n', 1)
"""Compiles the line that is tried first, and nothing of the kernels."""


@pytest.mark.parametrize("script", [BROKEN, GIVES_UP], ids=["broken", "gives up"])
def test_a_compiler_that_does_not_work_costs_the_library_alone(tmp_path: Path, script: str) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    (path / "cc").write_text(script)
    (path / "cc").chmod(0o755)
    with ZipFile(wheel_of(tmp_path, path)) as content:
        names = set(content.namelist())
    assert f"kernels/native/{PREBUILT}" not in names
    assert "kernels/native/pool.c" in names
