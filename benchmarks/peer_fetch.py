"""A node fetches a model from two peers over one emulated link, which answer meanwhile.

    python benchmarks/peer_fetch.py --out benchmarks/results/peer_fetch.json --work DIR \
        --store DIR_WITH_SMOLLM2 [--gib 1] [--rounds 4] [--rtt-ms 40] [--mbps 1000]

The mesh and its places on this machine's cores: ``parts/peer_fetch_world.py``. ``wire`` is what two
bare processes get through the link with sendfile(2), the ceiling.

*Share of the link* is the bytes of the data file over the time from the first question to peers
until the last chunk is verified and written, over the link's rate; ``named`` also counts what
follows until the bundle has its name: the last tensors' digests, fsync, two renames. Before each
taking the disk has written all it was given (sync), so nothing earlier is paid for in it.

*ITL* are the gaps between the events of an endless answer of one of the peers, read at the router
while nothing else runs (``quiet``), while ``wire`` pumps the same bytes past the peers (``wire``)
and while both peers give (``giving``), in turning order. p99 is that of a condition's gaps over all
rounds. What ``wire`` costs is the emulation's on this machine and not the peers'.

``others_share`` of a sample is what other processes of this machine took meanwhile, in cores; nice
keeps them back only within a session where the kernel groups processes by session
(sched_autogroup_enabled).

CPU: that of the answering peer's engine per token and of its agent per GB given. Where both have
one core for themselves, the agent's share of it is what giving adds to ITL at least.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.others import others_cpu_s
from common.report import command_line, facts, save
from parts.peer_fetch_answers import gaps_ms
from parts.peer_fetch_world import GIVE_MBPS, GIVEN, PEERS, Settings, World

WARM_UP_S = 3.0

Act = Callable[[], dict[str, Any]]


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Raw samples."""
    settings = world.settings

    def rest() -> dict[str, Any]:
        time.sleep(settings.gib * 2**30 / settings.link_bytes_per_s)
        return {}

    acts: dict[str, Act] = {"wire": world.pump, "giving": world.fetch}
    every = {"quiet": rest} | acts
    alone: dict[str, list[dict[str, Any]]] = {name: [] for name in acts}
    answering: dict[str, list[dict[str, Any]]] = {name: [] for name in every}
    for number in range(rounds):
        for name in list(acts) if number % 2 else list(reversed(acts)):
            alone[name].append(_sample(world, acts[name]))
            print("alone", name, alone[name][-1], flush=True)
        order = [*every][number % 3 :] + [*every][: number % 3]
        for name, sample in zip(order, _answered(world, every, order), strict=True):
            answering[name].append(sample)
            p99 = percentile(sample["gaps_ms"], 0.99)
            print(
                f"answering {name}: {len(sample['gaps_ms'])} gaps, p99 {p99:.1f} ms, "
                f"others {sample['others_share']:.1%}",
                flush=True,
            )
    return {"alone": alone, "answering": answering}


def _answered(world: World, acts: dict[str, Act], order: list[str]) -> list[dict[str, Any]]:
    """Samples of ``acts`` in this order, while answers are read."""
    with world.answers() as reader:
        time.sleep(WARM_UP_S)
        samples = [_sample(world, acts[name]) for name in order]
        out, _ = reader.communicate(timeout=60)
    if reader.returncode:
        raise RuntimeError("answers ended early")
    answers = json.loads(out.splitlines()[-1])
    for sample in samples:
        sample["gaps_ms"] = gaps_ms(answers, sample["begin_s"], sample["end_s"])
    return samples


def _sample(world: World, act: Act) -> dict[str, Any]:
    """What ``act`` says, when it began and ended, and what that cost the answering peer.

    A fetch begins when its taker does, not when that one's process is started, and ends with its
    last chunk.
    """
    os.sync()
    others = others_cpu_s()
    begin, before = time.monotonic(), world.cpu_s()
    found = act()
    end, after = time.monotonic(), world.cpu_s()
    others_share = (others_cpu_s() - others) / (time.monotonic() - begin)
    if "named_seconds" in found:
        begin = end - found["named_seconds"]
        end = begin + found["seconds"]
    cpu = {f"{who}_cpu_s": round(after[who] - before[who], 3) for who in after}
    return found | cpu | {"begin_s": begin, "end_s": end, "others_share": round(others_share, 4)}


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def summary(samples: dict[str, Any], link_bytes_per_s: float) -> dict[str, Any]:
    """Medians of shares of the link; percentiles of the gaps of all rounds; their ratios."""

    def share(when: str, name: str, until: str) -> float:
        found = samples[when][name]
        return statistics.median(s["bytes"] / s[until] / link_bytes_per_s for s in found)

    shares = {
        when: {
            "wire": share(when, "wire", "seconds"),
            "giving": share(when, "giving", "seconds"),
            "named": share(when, "giving", "named_seconds"),
        }
        for when in ("alone", "answering")
    }
    answering = samples["answering"]
    gaps = {name: [gap for s in found for gap in s["gaps_ms"]] for name, found in answering.items()}
    itl = {
        name: {f"p{p}": percentile(found, p / 100) for p in (50, 90, 99)} | {"gaps": len(found)}
        for name, found in gaps.items()
    }
    p99 = {name: found["p99"] for name, found in itl.items()}
    return {
        "share_of_link": shares,
        "itl_ms": itl,
        "itl_p99_giving_over_quiet": p99["giving"] / p99["quiet"],
        "itl_p99_wire_over_quiet": p99["wire"] / p99["quiet"],
        "itl_p99_giving_over_wire": p99["giving"] / p99["wire"],
        "engine_cpu_ms_per_token": {
            name: statistics.median(
                s["engine_cpu_s"] * 1000 / max(1, len(s["gaps_ms"])) for s in found
            )
            for name, found in answering.items()
        },
        "agent_cpu_s_per_gbyte_given": statistics.median(
            s["agent_cpu_s"] / (s["bytes"] / len(PEERS)) * 1e9 for s in samples["alone"]["giving"]
        ),
        "taker_cpu_s_per_gbyte": statistics.median(
            s["cpu_seconds"] / s["bytes"] * 1e9 for s in samples["alone"]["giving"]
        ),
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rtt-ms", type=float, default=40.0)
    parser.add_argument("--mbps", type=float, default=1000.0)
    args = parser.parse_args()
    settings = Settings(args.work, args.store, args.gib, args.rtt_ms, args.mbps)
    world = World(settings)
    world.prepare()
    with world.running():
        samples = measure(world, args.rounds)
    told = summary(samples, settings.link_bytes_per_s)
    report = facts(__doc__, ("aiohttp", "blake3", "torch", "uvloop")) | {
        "link": {"mbps": args.mbps, "rtt_ms": args.rtt_ms},
        "give_mbps_per_peer": GIVE_MBPS,
        "bundle_bytes": world.store.get(GIVEN).manifest.data.nbytes,
        "summary": told,
        "samples": samples,
    }
    save(report, args.out)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
