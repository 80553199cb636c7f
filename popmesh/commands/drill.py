"""``popmesh drill``: failures on purpose."""

from __future__ import annotations

import click

from popmesh.commands.chaos import chaos
from popmesh.commands.cold_start import cold_start
from popmesh.commands.site_loss import site_loss


@click.group()
def drill() -> None:
    """Rehearse failures in a mesh that runs.

    \b
    Examples:
      popmesh drill chaos --local ready.json --duration 2m
      popmesh drill cold-start --node ams-1 --budget 20s
      popmesh drill site-loss --site ams --duration 30s
    """


for _drill in (chaos, cold_start, site_loss):
    drill.add_command(_drill)
