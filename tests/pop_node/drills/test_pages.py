"""Dropped means dropped: the kernel's own count, real files, real processes that map them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pop_node.drills import pages
from pop_node.drills.libraries import library_files
from pop_node.drills.pages import Dropped, drop_pages, mapped_by, mapped_files, resident_pages
from tests.pop_node.drills.page_world import MAPPER, disk_folder, kind_of

PAGE = mmap.PAGESIZE


def write(path: Path, nbytes: int) -> Path:
    path.write_bytes(os.urandom(nbytes))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with disk_folder(tmp_path) as path:
        yield path


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 63 * PAGE, 300 * PAGE + 17])
def test_a_file_just_written_is_resident_and_then_dropped(folder: Path, nbytes: int):
    path = write(folder / "file", nbytes)
    count = -(-nbytes // PAGE)
    seen = resident_pages(path)
    assert (seen.pages, seen.resident, seen.told) == (count, count, True)
    dropped = drop_pages([path])
    assert (dropped.files, dropped.pages) == (1, count)
    assert (dropped.resident_before, dropped.resident) == (count, 0)
    assert dropped.left == []
    assert dropped.why() == ""
    assert resident_pages(path).resident == 0


def test_reading_brings_pages_back_and_they_are_counted(folder: Path):
    path = write(folder / "file", 256 * PAGE)
    drop_pages([path])
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.pread(fd, 1, 100 * PAGE)
        os.pread(fd, 1, 200 * PAGE)
    finally:
        os.close(fd)
    assert 2 <= resident_pages(path).resident < 256


def test_windows_of_a_large_file_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(folder / "file", 37 * PAGE + 5)
    monkeypatch.setattr(pages, "WINDOW_BYTES", 8 * PAGE)
    assert resident_pages(path).resident == 38
    assert drop_pages([path]).resident == 0


def test_an_empty_file_and_no_file(folder: Path):
    path = write(folder / "empty", 0)
    assert resident_pages(path).pages == 0
    assert drop_pages([path]).resident == 0
    assert drop_pages([]).files == 0
    with pytest.raises(FileNotFoundError):
        drop_pages([folder / "gone"])


def test_pages_that_a_process_maps_stay_and_it_is_named(folder: Path):
    path = write(folder / "mapped", 64 * PAGE)
    other = write(folder / "other", 8 * PAGE)
    mapper = subprocess.Popen(
        (sys.executable, "-c", MAPPER, str(path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert mapper.stdout is not None
        assert mapper.stdout.readline() == b"mapped\n"
        dropped = drop_pages([path, other])
        assert dropped.resident == 64
        assert [file.path for file in dropped.left] == [str(path)]
        assert mapper.pid in [holder.pid for holder in dropped.holders]
        assert f"process {mapper.pid} " in dropped.why()
        assert "64 of 72 pages stay" in dropped.why()
        assert path in mapped_files(mapper.pid)
        assert [holder.files for holder in mapped_by([str(path)])[0]] == [1]
    finally:
        mapper.communicate(b"\n", timeout=30)
    assert drop_pages([path, other]).resident == 0
    assert mapped_files(mapper.pid) == []


def test_a_file_system_in_memory_is_said():
    memory = Path("/dev/shm")
    if not memory.is_dir() or kind_of(memory) != "tmpfs":
        pytest.skip("no tmpfs at hand")
    path = write(memory / f"popmesh-test-{os.getpid()}", 3 * PAGE)
    try:
        dropped = drop_pages([path])
    finally:
        path.unlink()
    assert dropped.resident == 3
    assert dropped.in_memory == ["tmpfs"]
    assert "tmpfs keeps its files in memory" in dropped.why()


def test_what_the_kernel_does_not_tell_counts_as_resident(folder: Path, monkeypatch):
    path = write(folder / "theirs", 5 * PAGE)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda *_: False)
    dropped = drop_pages([path])
    assert dropped.resident == 5
    assert "does not tell this user" in dropped.why()


def test_an_engines_libraries_are_found_without_importing_them():
    code = (
        "import sys; from pop_node.drills.libraries import library_files as f; n = f();"
        "assert 'torch' not in sys.modules; print(len(n))"
    )
    done = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 1000
    files = library_files()
    assert any(file.name.startswith("libtorch") for file in files)
    assert any(file.name == "asyncio" for file in {path.parent for path in files})
    assert all(file.is_file() for file in files)
    assert len(files) == len(set(files))


def test_a_drop_that_left_nothing_needs_no_words():
    assert Dropped(1, 1, 1, 0, 0, [], [], 0, []).why() == ""
