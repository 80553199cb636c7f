"""Sequences handed from one engine's GPU memory to another's go on as if they had stayed.

    python benchmarks/gpu/hand_over_checks.py --out build/gpu/hand_over_checks.json

Two engines of one random SmolLM2 in bfloat16, batch-invariant, each in a process of its own with
its port's thread, its streams and its page-locked staging (``hand_over_site``); this process is the
agent of both and copies slots from one to the other, without CUDA. First prompts are answered by
one engine alone: that is what is right. Then all are prefilled there and decoded by the other, at
once, several rounds of them, beside sequences that each engine answers for itself, so that copies
run beside steps and graphs. Every token has to be the same, and both engines have to be empty in
the end.
"""

from __future__ import annotations

import importlib.util
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from random_llama import SMOLLM2, TINY, prompts
from running import Report, arguments

from pop_node.kv_stream.staging import Staging, StagingLayout

READY_S, QUIET_S = 90.0, 30.0
"""Until an engine is ready (it compiles), and without a word from either. Guesses."""

LENGTHS, DRY_LENGTHS = (300, 37, 1025, 700, 16, 17), (37,)
MORE, DRY_MORE = 24, 3
ROUNDS, DRY_ROUNDS = 3, 1


class Site:
    """The agent's side of one engine."""

    def __init__(self, dry: bool, layout: StagingLayout) -> None:
        from pop_node.engine.boundary import MessageReader

        self.staging = Staging.create(layout)
        self.sock, theirs = socket.socketpair()
        fds = theirs.fileno(), self.staging.fd
        script = str(Path(__file__).with_name("hand_over_site.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, *map(str, fds), "dry" if dry else "real"], pass_fds=fds
        )
        theirs.close()
        self._reader = MessageReader()
        self.free = deque(range(layout.export_slots, layout.total_slots))
        self.tokens: dict[int, dict[int, int]] = {}
        self.over: set[int] = set()
        self.load: Any = None
        self.ready: Any = None

    def tell(self, message: Any) -> None:
        """Say something to the engine."""
        from pop_node.engine.boundary import encode

        self.sock.sendall(encode(message))

    def heard(self) -> list[Any]:
        """What it said; raises RuntimeError: it is gone, or crashed."""
        from pop_node.engine import messages as m

        data = self.sock.recv(1 << 18)
        if not data:
            raise RuntimeError(f"an engine is gone: {self._process.wait()}")
        found = self._reader.feed(data)
        for message in found:
            if isinstance(message, m.Crashed | m.Declined):
                raise RuntimeError(f"an engine says {message}")
            if isinstance(message, m.Ready):
                self.ready = message
            elif isinstance(message, m.Ended):
                self.over.add(message.seq)
            elif isinstance(message, m.StepDone):
                self.load = message
                for seq, index, token, _ in message.tokens:
                    self.tokens.setdefault(seq, {})[index] = token
        return found

    def end(self) -> None:
        """Stop it, or kill it."""
        from pop_node.engine.messages import Stop

        try:
            self.tell(Stop())
            self._process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self.sock.close()
        self.staging.close()


class Agent:
    """Both engines, and the transfers between them, from ``sites[0]`` to ``sites[1]``."""

    def __init__(self, dry: bool) -> None:
        from hand_over_site import DRY_LAYOUT, LAYOUT

        layout = DRY_LAYOUT if dry else LAYOUT
        self.sites = [Site(dry, layout) for _ in range(2)]
        self._places = 0
        self._staged: deque[Any] = deque()
        self._missing: dict[bytes, int] = {}
        self._handed: dict[bytes, tuple[int, int]] = {}  # transfer: prefill leg, decode leg
        self.moved_bytes = 0

    def wait(self, until: Callable[[], bool], quiet_s: float = QUIET_S) -> None:
        """Carry messages until then. Raises RuntimeError: nothing was said for ``quiet_s``."""
        from pop_node.engine.messages import Beat

        last = time.monotonic()
        while not until():
            socks = [site.sock for site in self.sites]
            for sock in select.select(socks, [], [], 1.0)[0]:
                site = self.sites[socks.index(sock)]
                for message in site.heard():
                    if not isinstance(message, Beat):
                        last = time.monotonic()
                        self._take(site, message)
            self._carry()
            if time.monotonic() - last > quiet_s:
                loads = [site.load for site in self.sites]
                raise RuntimeError(f"nothing is said any more; missing {self._missing}, {loads}")

    def ready(self) -> None:
        """Wait until both are."""
        self.wait(lambda: all(site.ready for site in self.sites), READY_S)
        groups = self.sites[0].ready.kv_spec["groups"]
        self._places = sum(len(group["layers"]) * len(group["components"]) for group in groups)

    def add(self, site: int, seq: int, leg: str, prompt: list[int], more: int, **how: Any) -> None:
        """Queue a sequence."""
        from pop_node.engine.messages import Add

        values: dict[str, Any] = {
            "temperature": 0.7,
            "top_p": 0.95,
            "seed": len(prompt),
            "salt": seq.to_bytes(8, "little"),  # nothing is known from before
            "transfer": b"",
        }
        self.sites[site].tell(
            Add(
                seq=seq,
                leg=leg,  # type: ignore[arg-type]
                prompt_ids=prompt,
                forced_ids=[],
                max_tokens=more,
                stop_ids=[],
                **values | how,
            )
        )

    def hand_over(self, seq: int, prompt: list[int], more: int) -> None:
        """Prefill at the first site, decode at the second; both legs are ``seq``."""
        transfer = seq.to_bytes(16, "little")
        self._missing[transfer] = len(prompt) * self._places
        self._handed[transfer] = seq, seq
        for site, leg in enumerate(("prefill", "decode")):
            self.add(site, seq, leg, prompt, more, transfer=transfer)

    def _take(self, site: Site, message: Any) -> None:
        from pop_node.engine import messages as m

        first, second = self.sites
        if isinstance(message, m.Allocated):
            transfer = message.seq.to_bytes(16, "little")
            if site is second and transfer in self._missing:  # there is a place to land
                first.tell(m.StageFrom(transfer, 0))
        elif isinstance(message, m.Staged):
            self._staged.append(message)
        elif isinstance(message, m.Imported):
            second.free.append(message.slot)

    def _carry(self) -> None:
        """Bring what is staged to free slots; end transfers that are complete."""
        from pop_node.engine import messages as m

        first, second = self.sites
        while self._staged and second.free:
            piece = self._staged.popleft()
            slot = second.free.popleft()
            size = piece.nbytes
            second.staging.slot(slot)[:size] = first.staging.slot(piece.slot)[:size]
            self.moved_bytes += size
            first.tell(m.SlotFree(piece.slot))
            where = piece.group, piece.component, piece.layer_lo, piece.layer_hi
            lo, hi = piece.token_lo, piece.token_hi
            second.tell(m.Import(piece.transfer, slot, *where, lo, hi))
            self._missing[piece.transfer] -= (hi - lo) * (piece.layer_hi - piece.layer_lo)
        for transfer, missing in list(self._missing.items()):
            seq = self._handed[transfer][0]
            token = first.tokens.get(seq, {}).get(0)
            if missing == 0 and token is not None:
                del self._missing[transfer]
                second.tell(m.Commit(transfer, [token]))
                first.tell(m.Release(transfer))


def numbers() -> Iterator[int]:
    """Of sequences: none twice."""
    yield from range(1, 1 << 30)


def check(agent: Agent, dry: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Rows of the report, in order."""
    shape = TINY if dry else SMOLLM2
    lengths, more = (DRY_LENGTHS, DRY_MORE) if dry else (LENGTHS, MORE)
    drawn = prompts(shape, len(lengths), max(lengths))
    asked = [ids[:length] for ids, length in zip(drawn, lengths, strict=True)]
    number = numbers()
    right: list[list[int]] = []
    first, second = agent.sites

    def start() -> dict[str, Any]:
        agent.ready()
        return {"backend": first.ready.backend}

    def alone() -> dict[str, Any]:
        for prompt in asked:
            seq = next(number)
            agent.add(0, seq, "both", prompt, more)
            agent.wait(lambda seq=seq: seq in first.over or len(first.tokens.get(seq, {})) == more)
            right.append([first.tokens[seq][index] for index in range(more)])
        return {}

    def handed() -> dict[str, Any]:
        """Each prompt with its answer, while both sites answer one for themselves."""
        legs = [(next(number), which) for which in range(len(asked))]
        own = [(site, next(number), which) for site in range(2) for which in range(len(asked))]
        for site, seq, which in own:
            agent.add(site, seq, "both", asked[which], more)
        before, began = agent.moved_bytes, time.monotonic()
        for seq, which in legs:
            agent.hand_over(seq, asked[which], more)
        sites = agent.sites

        def done() -> bool:
            decoded = all(len(second.tokens.get(seq, {})) == more - 1 for seq, _ in legs)
            released = all(seq in first.over for seq, _ in legs)
            answered = all(len(sites[at].tokens.get(seq, {})) == more for at, seq, _ in own)
            return decoded and released and answered

        agent.wait(done)
        seconds = time.monotonic() - began
        wrong = []
        for seq, which in legs:
            got = {**second.tokens[seq], 0: first.tokens[seq][0]}
            if [got[index] for index in range(more)] != right[which]:
                wrong.append(f"handed over, prompt of {lengths[which]}")
        for at, seq, which in own:
            if [sites[at].tokens[seq][index] for index in range(more)] != right[which]:
                wrong.append(f"own of site {at}, prompt of {lengths[which]}")
        moved = agent.moved_bytes - before
        return {"right": not wrong, "wrong": wrong, "kv_bytes": moved, "seconds": seconds}

    def empty() -> dict[str, Any]:
        def at_rest() -> bool:
            loads = [site.load for site in agent.sites]
            return all(load.running == load.waiting == load.pinned == 0 for load in loads)

        agent.wait(at_rest, quiet_s=5.0)
        return {"right": True}

    yield "both are ready", start
    yield "alone", alone
    for turn in range(DRY_ROUNDS if dry else ROUNDS):
        yield f"handed over, round {turn}", handed
    yield "both are empty", empty


def main() -> int:
    given = arguments(__doc__)
    report = Report(__doc__, given)
    if importlib.util.find_spec("msgpack") is None:
        report.note(left_out="msgpack is not installed, which engines speak")
        return report.ended()
    agent = Agent(given.dry)
    try:
        for name, measure in check(agent, given.dry):
            if "error" in report.add({"check": name}, measure):
                break
    finally:
        for site in agent.sites:
            site.end()
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())
