"""One site of ``hand_over_checks``: an engine in a process of its own, told by its socket what to
do.

    python benchmarks/gpu/hand_over_site.py SOCKET_FD STAGING_FD real|dry

As ``pop_node.engine.process``, but for the model, which is drawn instead of loaded, so that nothing
is needed that GPU machines lack.
"""

from __future__ import annotations

import os
import socket
import sys

import bench_engine as bench
import torch
from random_llama import SMOLLM2, TINY, a_model

from kernels.triton.kv_pack import kv_move
from pop_node.engine.loop import EngineLoop
from pop_node.engine.messages import Ready
from pop_node.engine.port import Port
from pop_node.engine.staging.kv_mover import DeviceMover, Move
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream.staging import Staging, StagingLayout

LAYOUT = StagingLayout(slot_bytes=256 * 1024, export_slots=24, import_slots=24)
DRY_LAYOUT = StagingLayout(slot_bytes=1024, export_slots=4, import_slots=4)
"""Small, so that a prompt takes many slots."""

KV_TOKENS, DRY_KV_TOKENS = 16_384, 512
SEATS, DRY_SEATS = 16, 4
BUDGET, DRY_BUDGET = 256, 32


def a_move(dry: bool) -> Move:
    """The kernel; ``dry``: the tests' way, since the interpreter runs in one thread at a time."""
    if not dry:
        return kv_move
    from tests.fakes.late_device import reference_move

    return reference_move


def serve(port: Port, staging: Staging, dry: bool) -> None:
    """Make the engine and run it until it is stopped."""
    shape, dtype = (TINY, "float32") if dry else (SMOLLM2, "bfloat16")
    device = bench.a_device(dry, prompt=True)
    ops = bench.operations(dry, batch_invariant=True)
    engine = bench.Engine(
        model := a_model(shape, dtype, ops),
        device,
        DRY_KV_TOKENS if dry else KV_TOKENS,
        seats=DRY_SEATS if dry else SEATS,
        budget=DRY_BUDGET if dry else BUDGET,
    )
    engine.runner.capture_first()
    device.page_lock(torch.frombuffer(staging.everything(), dtype=torch.uint8))
    spec = model.kv_spec()
    stager = Stager(
        spec,
        engine.runner.cache,
        bench.BLOCK_TOKENS,
        staging,
        engine.pool.generations,
        port.wake,
        DeviceMover(device, a_move(dry), staging.layout.slot_bytes),
    )
    port.attach(stager)
    ready = Ready(
        pid=os.getpid(),
        block_tokens=bench.BLOCK_TOKENS,
        total_blocks=0,
        context_tokens=shape.context,
        backend=ops.name,
        kv_spec=spec.to_dict(),
        phases_ms={},
    )
    port.ready(ready)
    EngineLoop(engine.scheduler, engine.runner, stager, port, shape.layers - 1).run()


def main() -> None:
    sock_fd, staging_fd, how = sys.argv[1:]
    dry = how == "dry"
    torch.set_num_threads(1)
    port = Port(socket.socket(fileno=int(sock_fd)))
    port.start()
    try:
        serve(port, Staging.attach(int(staging_fd), DRY_LAYOUT if dry else LAYOUT), dry)
    except Exception as exc:  # noqa: BLE001 - supervisor: tell the parent and exit
        port.crash(exc)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the copying thread may sit in a copy


if __name__ == "__main__":
    main()
