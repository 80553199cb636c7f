"""What ``make demo`` shows: one answer that crosses sites, with its route and the reasons."""

from __future__ import annotations

import asyncio
import shutil
import sys
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from popmesh.client import Answer, MeshClient, Record
from popmesh.conversation import converse, stream_answer, terminal_lines
from popmesh.launcher.local import LocalMesh
from popmesh.launcher.ports import is_free
from popmesh.launcher.session import Options, run_mesh
from popmesh.render.routes import record_view
from topology.load import load_topology

CLIENT = "48.14,11.58"
"""Munich: the nearest site of the demo's topology is Frankfurt."""

PORT = 8080
"""Where the commands and examples look for a mesh that they are not told of."""

MAX_TOKENS = 96

REPORT = """\
Station log of the weather observatory on Gull Rock, week 37. Monday began with fog so thick that
the supply boat circled the island twice before it found the jetty. It brought flour, lamp oil,
two new barometers and a letter for the cook. In the afternoon the wind turned to the north and
the fog was gone within an hour. On Tuesday the old barometer on the east wall was replaced; the
new one read two millibars higher, and we spent the evening comparing it with the reference
instrument in the cellar until both agreed. Wednesday was calm. We painted the instrument shelter
white, as the manual asks, and counted fourteen seals on the southern rocks, three of them pups.
On Thursday a storm came in from the west faster than forecast. Gusts reached 31 metres per second
at four in the afternoon and tore the wind vane from the roof. Karin climbed up in a pause between
two squalls and tied a spare vane to the mast with a length of rope. It held. The radio mast was
damaged as well, so the evening report could not be sent until the battery set had been carried up
from the boathouse, which took three of us an hour in the dark. On Friday the sea was still high
and nobody could land. We repaired the mast, dried the cables and found that the rain gauge had
overflowed: more than 80 millimetres had fallen in one night, the most since the station opened.
Saturday was bright and cold. The boat came back with a carpenter, who mended the roof and would
not take any money for it, only a sack of mussels. On Sunday we rested, wrote letters, and read
the week's numbers to the school on the mainland by radio, as we do every Sunday; the children
asked whether the seals were afraid of thunder. We promised to ask them.
"""
QUESTION = "What happened on Thursday? Answer in three sentences."


def run_demo(store: Path, port: int | None, once: bool) -> int:
    """Run the demo at ``port``, else at ``PORT`` if that is free, else at any free one.

    Returns the exit code, 0 if the sample was complete and crossed sites.
    """
    console = Console()
    with resources.as_file(resources.files("topology") / "examples" / "demo.yaml") as path:
        topology = load_topology(path)
    model = next(iter(topology.models))
    if port is None and is_free(PORT):
        port = PORT

    async def show(mesh: LocalMesh) -> int:
        console.print(Text(f"The mesh is ready at {mesh.plan.router_url}/v1", style="bold"))
        async with MeshClient(mesh.plan.router_url) as client:
            code = await _sample(client, console, model)
            if not once:
                await _stay(client, console, model, mesh)
        return code

    code = run_mesh(Options(topology, store, port), console, show)
    console.print("Every process has ended.")
    return code if code is not None else int(once)


async def _sample(client: MeshClient, console: Console, model: str) -> int:
    console.print(f"\nA client in Munich sends a report of {len(REPORT.split())} words and asks:")
    console.print(Text(QUESTION, style="italic"))
    prompt = f"Here is a report.\n\n{' '.join(REPORT.split())}\n\n{QUESTION}"
    messages = [{"role": "user", "content": prompt}]
    answer = await stream_answer(
        client, console, model, messages, CLIENT, max_tokens=MAX_TOKENS, temperature=0
    )
    record = await client.finished_record(answer.request_id)
    console.print(Panel(record_view(record), title="The route of this answer, and why"))
    problem = sample_problem(answer, record)
    if problem is not None:
        console.print(Text(f"This is not what the demo should show: {problem}", style="red"))
        return 1
    return 0


def sample_problem(answer: Answer, record: Record) -> str | None:
    """Why a sample does not show what it should; None if it does."""
    if answer.finish_reason not in ("stop", "length") or not answer.text.strip():
        return f"the answer ended with {answer.finish_reason}"
    route = record.attempts[-1].route
    if route.prefill_site == route.decode_site:
        return f"prefill and decode were both at {route.prefill_site}"
    if record.transfer is None or record.transfer.kv_bytes == 0:
        return "no KV cache was sent"
    return None


async def _stay(client: MeshClient, console: Console, model: str, mesh: LocalMesh) -> None:
    """Chat where there is a terminal; then, or else at once, stay up until a signal."""
    url = mesh.plan.router_url
    console.print(Text(f"\nAny OpenAI client works with base_url={url}/v1 and model={model}."))
    command = sys.argv[0] if shutil.which("popmesh") is None else "popmesh"
    console.print(Text(f"In another terminal: {command} status --mesh {url}"))
    if sys.stdin.isatty():
        console.print("Ask something (Ctrl-D or /quit ends the chat and the demo).\n")
        await converse(client, console, model, terminal_lines(console), CLIENT)
        return
    console.print("No terminal to chat in: the mesh stays up until Ctrl-C.")
    await asyncio.get_running_loop().create_future()
