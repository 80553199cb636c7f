"""``popmesh links``: the shaper process."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import FILE, log_to_stderr


@click.command()
@click.option("--plan", required=True, type=FILE, metavar="FILE", help="Links and ports, as JSON.")
def links(plan: Path) -> None:
    """Emulate wide-area links on this machine.

    'popmesh up' starts this by itself. Every port of the plan forwards to its target with the
    delay and the rate of the link between two sites. Edit rtt_ms or bandwidth_mbps in the plan and
    send SIGHUP to change links while they carry traffic.

    \b
    Example plan:
      {"links": [{"a": "ams", "b": "nyc", "rtt_ms": 80, "bandwidth_mbps": 1000}],
       "ports": [{"listen": "127.0.0.1:9001", "target": "127.0.0.1:7001",
                  "from_site": "ams", "to_site": "nyc"}]}
    \b
    Example: popmesh links --plan links.json
    """
    import asyncio
    import logging
    import signal

    from popmesh.links.plan import read_link_plan
    from popmesh.links.shaper import Shaper
    from popmesh.signals import run_until_signal
    from wire.errors import ConfigError

    log_to_stderr()
    log = logging.getLogger("popmesh.links")
    shaper = Shaper(read_link_plan(plan))

    def reread() -> None:
        try:
            shaper.reconfigure(read_link_plan(plan))
        except ConfigError as exc:
            log.error("the plan is unchanged: %s", exc)
        else:
            log.info("links changed as %s says", plan)

    async def work() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)
        await shaper.serve(asyncio.Event())

    run_until_signal(work)
