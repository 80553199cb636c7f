"""Building the library: clean cache, several processes at once, no compiler, broken compiler."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.native import build
from kernels.native.binding import NativeContext
from kernels.native.build import NativeUnavailableError, ensure_library
from kernels.ops import load_ops


def fake_compiler(folder: Path, script: str) -> None:
    """A ``cc`` in ``folder`` that runs ``script``."""
    folder.mkdir()
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)


COMPILES_NOTHING = """test "$1" = --version && exit 0
while test $# -gt 0; do test "$1" = -o && echo library > "$2"; shift; done"""

BUILD = """
import sys
from pathlib import Path
from kernels.native import build
real = build.compile_library
build.compile_library = lambda target: (print("compiled", file=sys.stderr), real(target))
build.FLAGS = (*build.FLAGS, "-O0")  # a third of the time; how fast it is does not matter here
print(build.ensure_library(Path(sys.argv[1])))
"""


def test_processes_building_at_once_share_one_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    paths, said = zip(*(process.communicate() for process in processes), strict=True)
    assert [process.returncode for process in processes] == [0, 0]
    assert paths[0] == paths[1]
    assert sorted(said) == ["", "compiled\n"]  # the other waits
    [library] = tmp_path.glob("*.so")
    assert sorted(tmp_path.iterdir()) == [tmp_path / build.LOCK, library]
    assert NativeContext(library, 1).isa in ("avx512_bf16", "avx512", "avx2", "portable")
    built = library.stat().st_mtime_ns
    assert subprocess.check_output(command, text=True) == paths[0]
    assert library.stat().st_mtime_ns == built


def test_a_library_has_its_name_when_it_is_on_the_disk_and_others_may_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the compiler's output: which bytes they are does not matter here."""
    synced: list[tuple[int, list[Path]]] = []

    def sync(file: int) -> None:
        synced.append((os.fstat(file).st_size, list(tmp_path.glob("*.so"))))

    monkeypatch.setattr(build, "compile_library", lambda target: target.write_bytes(b"library"))
    monkeypatch.setattr(os, "fsync", sync)
    library = ensure_library(tmp_path)
    assert synced == [(7, [])]
    assert library.stat().st_mode & 0o777 == 0o755


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPMESH_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path / "native"
    monkeypatch.delenv("POPMESH_CACHE")
    assert build.cache_folder() == Path.home() / ".cache" / "popmesh" / "native"


def test_another_source_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = build.find_compiler()
    before = build.library_digest(compiler)
    for path in build.SOURCE_FOLDER.rglob("*.[ch]"):
        copy = tmp_path / path.relative_to(build.SOURCE_FOLDER)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    assert build.library_digest(compiler) == before
    (tmp_path / "isa" / "vmath.h").write_bytes(b"/* changed */")
    assert build.library_digest(compiler) != before


def test_a_library_that_came_with_the_wheel_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / build.PREBUILT
    built.write_bytes(ensure_library().read_bytes())
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert ensure_library(tmp_path / "cache") == built
    assert load_ops("native", 1).name.startswith("native/")


def test_a_library_of_the_wheel_that_does_not_run_here_is_built_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / build.PREBUILT).write_bytes(b"of another C library")
    fake_compiler(tmp_path / "bin", COMPILES_NOTHING)
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path / "sources")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ensure_library(tmp_path / "cache").parent == tmp_path / "cache"
    assert "does not run here" in caplog.text


def test_the_environment_names_the_compiler_and_what_it_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"
    fake_compiler(tmp_path / "bin", f'echo "$@" >> {said}\n{COMPILES_NOTHING}')
    (tmp_path / "bin" / "cc").rename(tmp_path / "bin" / "mine")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(NativeUnavailableError, match="no C compiler"):
        ensure_library(tmp_path / "cache")
    monkeypatch.setenv("CC", "mine --for 'all of us'")
    plain = ensure_library(tmp_path / "cache")
    monkeypatch.setenv("CFLAGS", "-ffast-math -DONE='a b'")
    assert ensure_library(tmp_path / "cache") != plain
    lines = said.read_text().splitlines()
    assert all(line.startswith("--for all of us ") for line in lines)
    told = [line.split() for line in lines if "-ffast-math" in line]
    assert len(told) == len(list(build.SOURCE_FOLDER.rglob("*.c")))
    assert all(words.index("-ffast-math") < words.index("-fno-fast-math") for words in told)
    monkeypatch.setenv("CC", "nobody")
    with pytest.raises(NativeUnavailableError, match="looked for nobody"):
        ensure_library(tmp_path / "cache")


def test_sources_of_one_name_in_two_folders_are_both_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.c").write_text(
            f'__attribute__((visibility("default"))) int pm_{folder}(void) {{ return 7; }}\n'
        )
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    library = ctypes.CDLL(str(ensure_library(tmp_path / "cache")))
    assert library.pm_a() == library.pm_b() == 7


def test_a_build_that_hangs_elsewhere_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path / "bin", COMPILES_NOTHING)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build, "LOCK_TIMEOUT_S", 3 * build.LOCK_PAUSE_S)
    with (tmp_path / build.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ensure_library(tmp_path).read_text() == "library\n"


def test_what_killed_builds_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path / "bin", COMPILES_NOTHING)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "cache").mkdir()
    left = [tmp_path / "cache" / f"{name}{build.SCRATCH}" for name in ("old", "young")]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (0, 0))
    library = ensure_library(tmp_path / "cache")
    assert {*(tmp_path / "cache").iterdir()} == {left[1], library, tmp_path / "cache" / build.LOCK}


def test_without_a_compiler_auto_falls_back_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_ops("auto", 1).name == "reference"
    assert "no C compiler on PATH" in caplog.text


def test_without_a_compiler_native_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailableError, match="no C compiler on PATH"):
        load_ops("native", 1)


def test_a_failing_compiler_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(
        tmp_path / "bin", 'test "$1" = --version && exit 0; echo "no such header" >&2; exit 3'
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(NativeUnavailableError, match="failed with 3:\nno such header"):
        ensure_library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / build.LOCK]


@pytest.mark.parametrize("reason", [errno.EBADF, errno.ENOLCK])
def test_a_cache_on_a_file_system_with_fewer_locks_will_do(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks only what may be written (EBADF); some lock nothing (ENOLCK)."""
    locked = []

    def flock(handle: int, _: int) -> None:
        writes = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if reason == errno.ENOLCK or not writes:
            raise OSError(reason, os.strerror(reason))
        locked.append(handle)

    fake_compiler(tmp_path / "bin", COMPILES_NOTHING)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build.fcntl, "flock", flock)
    assert ensure_library(tmp_path / "cache").read_text() == "library\n"
    assert len(locked) == (reason == errno.EBADF)


def test_a_lock_that_cannot_be_opened_keeps_nobody_from_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's cannot, in a folder that both may write."""
    fake_compiler(tmp_path / "bin", COMPILES_NOTHING)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / build.LOCK).mkdir()
    assert ensure_library(tmp_path).read_text() == "library\n"


def test_the_language_of_a_process_makes_no_other_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path / "bin", 'echo "cc 12, in ${LC_ALL:-$LANG}"')
    monkeypatch.delenv("LC_ALL", raising=False)
    digests = set()
    for language in ("C", "de_DE.UTF-8"):
        monkeypatch.setenv("LANG", language)
        digests.add(build.library_digest([str(tmp_path / "bin" / "cc")]))
    assert len(digests) == 1


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "broken.so"
    library.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailableError, match="does not load"):
        NativeContext(library, 1)


def test_an_unwritable_cache_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NativeUnavailableError, match="cannot write"):
        ensure_library(blocked / "native")


def test_a_cache_that_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    """As another user's home cannot; whoever runs the tests may be allowed everything."""
    with pytest.raises(NativeUnavailableError, match="cannot write"):
        ensure_library(tmp_path / ("x" * 300))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a user whom it does not list."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("POPMESH_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(NativeUnavailableError, match="Set POPMESH_CACHE"):
        build.cache_folder()


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        load_ops("auto", 0)
    with pytest.raises(ValueError, match="unknown backend"):
        load_ops("cuda", 1)  # type: ignore[arg-type]
    with pytest.raises(NativeUnavailableError, match="cannot run mmx kernels"):
        NativeContext(ensure_library(), 1, "mmx")


def count_threads() -> int:
    """Threads of this process as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_pool_has_exactly_the_threads_asked_for_and_joins_them() -> None:
    library = ensure_library()
    before = count_threads()
    alone = NativeContext(library, 1)
    assert count_threads() == before
    pool = NativeContext(library, 4)
    assert count_threads() == before + 3
    del pool, alone
    assert count_threads() == before


def test_calls_from_several_threads_take_turns() -> None:
    ops = load_ops("native", 2)
    x, w = torch.randn(3, 576), torch.randn(960, 576)
    expected = ops.linear(x, w, None)

    def agrees(_: int) -> bool:
        return all(torch.equal(ops.linear(x, w, None), expected) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(agrees, range(4))) == [True] * 4
