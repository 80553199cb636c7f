"""A conversation in the terminal: lines in, streamed answers and their routes out."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

from rich.console import Console
from rich.text import Text

from popmesh.client import Answer, MeshClient
from popmesh.render.routes import summary_line
from wire.errors import ConfigError, MeshError

SAMPLING = {"temperature": 0.4, "max_tokens": 512}
"""Of a chat. Guess: small models ramble at temperature 1, and may never end."""

MAX_LINE_BYTES = 1024 * 1024
"""Longest line taken from a terminal, which itself cuts at 4 KiB."""


async def terminal_lines(console: Console) -> AsyncIterator[str]:
    """Lines from stdin until its end, an empty pair of hands (Ctrl-D), or ``/quit``.

    A terminal is read through the event loop, so that everything else goes on while a person
    thinks; what is piped in is read at once, one turn per line.
    """
    if not sys.stdin.isatty():
        for line in sys.stdin.read().splitlines():
            yield line
        return
    while True:
        console.print("[bold]you>[/] ", end="")
        line = await _read_line(sys.stdin.fileno())
        if not line or line.strip() == b"/quit":
            return
        yield line.decode(errors="replace")


async def converse(
    client: MeshClient,
    console: Console,
    model: str,
    lines: AsyncIterator[str],
    client_geo: str | None = None,
) -> bool:
    """Answer every line, keeping the conversation; a failed answer is reported and forgotten.

    Returns whether none failed.
    """
    messages: list[dict[str, str]] = []
    complete = True
    async for line in lines:
        if not line.strip():
            continue
        question = {"role": "user", "content": line.strip()}
        try:
            answer = await stream_answer(
                client, console, model, [*messages, question], client_geo, **SAMPLING
            )
        except ConfigError:
            raise
        except MeshError as exc:
            console.print(Text(f"\n{exc.message}", style="red"))
            complete = False
            continue
        messages += [question, {"role": "assistant", "content": answer.text}]
        record = await client.finished_record(answer.request_id)
        console.print(Text(summary_line(record), style="dim"))
    return complete


async def stream_answer(
    client: MeshClient,
    console: Console,
    model: str,
    messages: list[dict[str, str]],
    client_geo: str | None = None,
    **sampling: object,
) -> Answer:
    """Print an answer as it comes; raises ``MeshError``."""
    answer = Answer()
    async for text in client.chat(answer, model, messages, client_geo=client_geo, **sampling):
        console.out(text, end="", highlight=False)
    console.print()
    return answer


async def _read_line(stdin: int) -> bytes:
    """One line of a terminal in line mode; empty at its end."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(stdin, wake)
    try:
        await readable
    finally:
        loop.remove_reader(stdin)
    return os.read(stdin, MAX_LINE_BYTES)
