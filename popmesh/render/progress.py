"""One progress bar per phase, created when the phase first reports."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

COUNTED = frozenset({"processes", "nodes", "probes", "tune"})
"""Phases that count things; the others report bytes."""

WORDS = {
    "wait": "Waiting for another process that adds this model",
    "download": "Downloading the model",
    "unpack": "Unpacking it",
    "read": "Reading it",
    "convert": "Converting it for the store",
    "pack": "Packing it",
    "digest": "Writing down its digests",
    "resume": "Checking what has arrived before",
    "fetch": "Fetching the bundle",
    "verify": "Checking every byte",
    "tune": "Timing its steps",
    "processes": "Starting processes",
    "nodes": "Loading the model at every node",
    "probes": "Producing a token through every node",
}


class _Amount(ProgressColumn):
    """Counts as ``3/4``, bytes as megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self._counted = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        if task.fields["counted"]:
            return self._counted.render(task)
        total = f"/{task.total / 1e6:.0f}" if task.total else ""
        return Text(f"{task.completed / 1e6:.0f}{total} MB" if task.completed else "")


class Phases:
    """A context manager; ``report`` may be called from any thread.

    Where nobody watches (no terminal), a phase is one line when it begins.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            _Amount(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def report(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` (0: unknown) in ``phase``; a new phase completes earlier ones."""
        task = self._tasks.get(phase)
        if task is None:
            for earlier in self._tasks.values():
                self._finish(earlier)
            words = WORDS.get(phase, phase)
            task = self._tasks[phase] = self._progress.add_task(
                words, total=total or None, counted=phase in COUNTED
            )
            if not self._console.is_terminal:
                self._console.print(Text(words))
        self._progress.update(task, completed=done, total=total or None)

    def _finish(self, task: TaskID) -> None:
        shown = next(shown for shown in self._progress.tasks if shown.id == task)
        total = shown.total if shown.total is not None else max(shown.completed, 1)
        self._progress.update(task, total=total, completed=total)
