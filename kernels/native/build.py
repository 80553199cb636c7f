"""Compiles the C sources of this folder and those below into a shared library, once per machine.

    python -m kernels.native.build      where it is not there yet

The library lands in ``$POPMESH_CACHE/native`` (default ``~/.cache/popmesh/native``) under a name
that hashes everything it depends on: sources, flags, compiler version, machine type. ``CC`` names
another compiler than the first one found, ``CFLAGS`` come before the flags here. It holds
kernels for several instruction sets and picks one when it is opened, so the processor model is no
part of the name. Knows nothing of torch and nothing of the operations.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # A product and a sum are one rounding only where the source says so: otherwise the compiler
    # decides, perhaps differently in two places that must agree.
    "-ffp-contract=off",
    "-fno-fast-math",  # whatever CFLAGS say
    # The kernels view rows of bfloat16 as 32-bit words.
    "-fno-strict-aliasing",
    "-pthread",
    "-Wall",
    "-Wextra",
)
LINKED = ("-shared", "-pthread", "-lm")
# A build takes 10 to 20 s on one core; far more than that means a compiler that hangs.
COMPILE_TIMEOUT_S = 120.0
# Of another process's build: its longest compilation and its link, each as long as it may be.
LOCK_TIMEOUT_S = 2 * COMPILE_TIMEOUT_S
LOCK_PAUSE_S = 0.05
# What a build that was killed leaves is swept once no build can be at it any more.
STALE_S = 2 * LOCK_TIMEOUT_S
MESSAGE_LINES = 8
LOCK = ".lock"
SCRATCH = ".so.tmp"
LIBRARY_MODE = 0o755
"""Whoever may read the cache may load from it: another user may have built it."""
PREBUILT = "prebuilt.so"
"""Beside the sources where a wheel was built with a compiler; never in a checkout."""


class NativeUnavailableError(RuntimeError):
    """The native library can be neither found nor built here; the message says why."""


def cache_folder() -> Path:
    """Where built libraries are kept.

    Raises:
        NativeUnavailableError: nobody says where, and this user has no home.
    """
    root = os.environ.get("POPMESH_CACHE")
    try:
        return (Path(root) if root else Path.home() / ".cache" / "popmesh") / "native"
    except RuntimeError as exc:  # a container's user that is in no list
        raise NativeUnavailableError(f"{exc} Set POPMESH_CACHE.") from exc


def find_compiler() -> list[str]:
    """The command of the C compiler: what ``CC`` says, else the first one on ``PATH``; an absolute
    path, then words that come before all others.

    Raises:
        NativeUnavailableError: there is none.
    """
    asked = shlex.split(os.environ.get("CC", ""))
    for name in asked[:1] or COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return [path, *asked[1:]]
    names = asked[0] if asked else ", ".join(COMPILERS)
    raise NativeUnavailableError(f"no C compiler on PATH (looked for {names})")


def _flags() -> list[str]:
    return [*shlex.split(os.environ.get("CFLAGS", "")), *FLAGS]


def _run_compiler(command: list[str]) -> str:
    """Standard output of a compiler run.

    Raises:
        NativeUnavailableError: it could not start, failed or took too long.
    """
    # What it says is hashed and shown: in one language, whatever that of this process.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NativeUnavailableError(f"{command[0]} could not be run: {exc}") from exc
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-MESSAGE_LINES:])
        raise NativeUnavailableError(f"{command[0]} failed with {done.returncode}:\n{tail}")
    return done.stdout


def library_digest(compiler: list[str]) -> str:
    """Name of the library: a hash of all that decides its bytes."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(SOURCE_FOLDER.rglob("*.[ch]")):
        name = path.relative_to(SOURCE_FOLDER).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = _run_compiler([*compiler, "--version"])
    for word in (*_flags(), *LINKED, *compiler, version, platform.system(), platform.machine()):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()


def compile_library(target: Path) -> None:
    """Compile the sources, as many at once as there are cores, and link them to ``target``.

    Raises:
        NativeUnavailableError: no compiler, or it failed.
    """
    compiler, flags = find_compiler(), _flags()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: Path) -> str:
            # Two folders may have a source of one name.
            made = f"{folder}/{'-'.join(source.relative_to(SOURCE_FOLDER).parts)}.o"
            _run_compiler([*compiler, *flags, "-c", str(source), "-o", made])
            return made

        objects = list(pool.map(compiled, sorted(SOURCE_FOLDER.rglob("*.c"))))
        _run_compiler([*compiler, *objects, "-o", str(target), *LINKED])


def try_compiler(folder: Path) -> None:
    """Compile and link a line of C in ``folder``.

    Raises:
        NativeUnavailableError: no compiler, or it does not work.
    """
    source = folder / "line.c"
    source.write_text("int line(void) { return 0; }\n")
    _run_compiler(
        [*find_compiler(), *_flags(), str(source), "-o", str(folder / "line.so"), *LINKED]
    )


def ensure_library(folder: Path | None = None) -> Path:
    """Path of the compiled library: the prebuilt one where it runs here, or one that is built first
    where needed.

    Several processes may do this at once: one compiles, the others wait for it. It does so into a
    file of its own that is renamed into place, so a reader sees either nothing or a whole library.

    Args:
        folder: where to keep it; ``cache_folder()`` if None.

    Raises:
        NativeUnavailableError: no compiler, it failed, or the folder cannot be written.
    """
    prebuilt = SOURCE_FOLDER / PREBUILT
    if prebuilt.exists() and _loads(prebuilt):
        return prebuilt
    compiler = find_compiler()
    folder = folder or cache_folder()
    target = folder / f"{library_digest(compiler)}.so"
    try:
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return target if target.exists() else _build(target)
    except OSError as exc:
        raise NativeUnavailableError(f"cannot write to {folder}: {exc}") from exc


@functools.cache
def _loads(library: Path) -> bool:
    """Whether it runs here: one made for a newer C library does not. Says so once."""
    try:
        ctypes.CDLL(str(library))
    except OSError as exc:
        logger.warning("the library that came with the package does not run here: %s", exc)
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process builds into ``folder``; if one dies there the next may.

    Locks a file that may be written: NFS, where homes are, knows no other exclusive lock. On a file
    system without locks, or where the file is another user's or one of them hangs, each process
    builds for itself.
    """
    with ExitStack() as held:
        with suppress(OSError):
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            held.callback(os.close, handle)
            _lock(handle)
        yield


def _lock(handle: int) -> None:
    """Raises OSError where that is not possible; returns without it after ``LOCK_TIMEOUT_S``."""
    until = time.monotonic() + LOCK_TIMEOUT_S
    while time.monotonic() < until:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return


def _build(target: Path) -> Path:
    _sweep(target.parent)
    handle, name = tempfile.mkstemp(suffix=SCRATCH, dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        compile_library(scratch)
        with scratch.open("rb") as library:
            os.fsync(library.fileno())  # else its name may outlive a power cut, and not its bytes
        scratch.chmod(LIBRARY_MODE)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    return target


def _sweep(folder: Path) -> None:
    """Remove what builds left that were killed; what is another user's stays."""
    for path in folder.glob(f"*{SCRATCH}"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - STALE_S:
                path.unlink()


if __name__ == "__main__":
    try:
        ensure_library()
    except NativeUnavailableError as exc:
        raise SystemExit(f"native kernels: {exc}") from exc
