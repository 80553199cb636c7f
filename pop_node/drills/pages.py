"""The page cache, file by file: how much of a file lies in it, dropping it, and who keeps it there.

A drill that says "cold" has dropped the pages and looked afterwards: the kernel is asked to forget
(``posix_fadvise``), and may decline. It keeps pages that a process has mapped, and those of file
systems that live in memory. Only reads with the kernel's own words (``mincore``); what a
hypervisor or a drive caches behind the kernel cannot be seen or dropped from here.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

WINDOW_BYTES = 1 << 30
"""Mapped at a time while looking: the answer is a byte per page, 256 KiB for a window."""

TRIES, PAUSE_S = 5, 0.05
"""Pages under write-back or in another processor's queue go with the next try. Guess."""

MAX_LISTED = 16
"""Files and processes named in a report; the rest is counted."""

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class FilePages(msgspec.Struct, frozen=True):
    """One file: its pages, and how many of them are in the page cache.

    ``told`` False: the kernel tells only owners and writers, and this process is neither; then all
    pages count as resident.
    """

    path: str
    pages: int
    resident: int
    told: bool = True


class Holder(msgspec.Struct, frozen=True):
    """A process that has some of the files mapped, so that their pages stay."""

    pid: int
    name: str
    files: int


class Dropped(msgspec.Struct, frozen=True):
    """What dropping files came to.

    ``left`` are files of which pages stayed (at most ``MAX_LISTED`` of ``files_left``), ``holders``
    the processes that map them; ``hidden`` processes could not be looked into. ``in_memory`` names
    file systems that are memory themselves.
    """

    files: int
    pages: int
    resident_before: int
    resident: int
    files_left: int
    left: list[FilePages]
    holders: list[Holder]
    hidden: int
    in_memory: list[str]

    def why(self) -> str:
        """In words, what keeps the pages that stayed; empty when none did."""
        if not self.resident:
            return ""
        reasons = [f"process {holder.pid} ({holder.name}) maps them" for holder in self.holders]
        reasons += [f"{kind} keeps its files in memory" for kind in self.in_memory]
        if untold := sum(not file.told for file in self.left):
            reasons.append(f"the kernel does not tell this user about {untold} of the files")
        if self.hidden:
            reasons.append(f"{self.hidden} processes of other users could not be looked into")
        files = ", ".join(file.path for file in self.left[:3])
        said = "; ".join(reasons) or "nobody maps them; they may be read again just now"
        return f"{self.resident} of {self.pages} pages stay, of {files}: {said}"


def resident_pages(path: Path) -> FilePages:
    """Look at one file; raises ``OSError``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        page = mmap.PAGESIZE
        pages = -(-status.st_size // page)
        told = os.geteuid() in (0, status.st_uid) or os.access(path, os.W_OK)
        if not told:  # mincore(2) answers "all" then, since Linux 5.2
            return FilePages(str(path), pages, pages, told=False)
        resident = 0
        for offset in range(0, status.st_size, WINDOW_BYTES):
            resident += _resident(fd, offset, min(WINDOW_BYTES, status.st_size - offset))
        return FilePages(str(path), pages, resident)
    finally:
        os.close(fd)


def _resident(fd: int, offset: int, length: int) -> int:
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        raise _os_error()
    try:
        pages = -(-length // mmap.PAGESIZE)
        vector = ctypes.create_string_buffer(pages)
        if _libc.mincore(address, length, vector):
            raise _os_error()
    finally:
        _libc.munmap(address, length)
    # The lowest bit of each byte is the answer, the others are not defined.
    lowest = int.from_bytes(b"\1" * pages, "little")
    return (int.from_bytes(vector.raw[:pages], "little") & lowest).bit_count()


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def drop_pages(files: Iterable[Path]) -> Dropped:
    """Have the kernel forget the files, and look what stays. Takes a moment for each file; not for
    an event loop.

    What was written to them goes to the drive first: dirty pages cannot be dropped. Raises
    ``OSError`` when a file cannot be read.
    """
    paths = sorted(set(files))
    before = [resident_pages(path) for path in paths]
    after = before
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        for file in after:
            if file.resident:
                _forget(file.path)
        after = [resident_pages(Path(file.path)) if file.resident else file for file in after]
        if not any(file.resident for file in after):
            break
    # Once more over all: a page may have been read again meanwhile.
    after = [resident_pages(path) for path in paths]
    left = [file for file in after if file.resident]
    holders, hidden = mapped_by([file.path for file in left]) if left else ([], 0)
    return Dropped(
        files=len(paths),
        pages=sum(file.pages for file in after),
        resident_before=sum(file.resident for file in before),
        resident=sum(file.resident for file in after),
        files_left=len(left),
        left=sorted(left, key=lambda file: -file.resident)[:MAX_LISTED],
        holders=holders[:MAX_LISTED],
        hidden=hidden,
        in_memory=_memory_file_systems(file.path for file in left),
    )


def _forget(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            os.fsync(fd)
        except OSError as exc:
            if exc.errno not in (errno.EROFS, errno.EINVAL):  # nothing was written there
                raise
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def mapped_by(paths: Sequence[str]) -> tuple[list[Holder], int]:
    """Who maps any of the files, most files first, and how many processes could not be looked into.

    Source: proc(5), maps; files are known by their inode, since a process may see other paths.
    """
    wanted = set()
    for path in paths:
        status = os.stat(path)
        major, minor = os.major(status.st_dev), os.minor(status.st_dev)
        wanted.add((f"{major:02x}:{minor:02x}", str(status.st_ino)))
    holders, hidden = [], 0
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            found = {identity for identity, _ in _maps(int(entry))} & wanted
            name = Path(f"/proc/{entry}/comm").read_text().strip() if found else ""
        except PermissionError:
            hidden += 1
            continue
        except OSError:  # it has ended meanwhile
            continue
        if found:
            holders.append(Holder(int(entry), name, len(found)))
    return sorted(holders, key=lambda holder: (-holder.files, holder.pid)), hidden


def mapped_files(pid: int) -> list[Path]:
    """The files that a process has mapped and that are still there; empty if it is gone."""
    try:
        paths = {path for _, path in _maps(pid)}
    except OSError:
        return []
    return sorted(Path(path) for path in paths if os.path.isfile(path))


def _maps(pid: int) -> list[tuple[tuple[str, str], str]]:
    """((device, inode), path) of every mapping of a file."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/"):
            found.append(((parts[3], parts[4]), parts[5]))
    return found


def _memory_file_systems(paths: Iterable[str]) -> list[str]:
    """Kinds of file system under the paths that have nowhere else to put their pages."""
    devices = set()
    for path in paths:
        device = os.stat(path).st_dev
        devices.add(f"{os.major(device)}:{os.minor(device)}")
    kinds = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        if fields.split()[2] in devices and tail.split()[0] in ("tmpfs", "ramfs", "hugetlbfs"):
            kinds.add(tail.split()[0])
    return sorted(kinds)
