"""``celery -A APP gpu``, a sub-command that every `celery` command of this environment has.

Celery loads such plug-ins (entry points of the group `celery.commands`) before it looks at its arguments. So
``inspect gpu`` and ``control gpu_restart`` are known, too, also for an app whose modules do not import the bridge.
"""

from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.bin.control import inspect

from bridge.worker import control  # noqa: F401 - registers the remote commands

_SHARED = ("timeout", "destination", "json")


@click.command(cls=CeleryCommand, params=[each for each in inspect.params if each.name in _SHARED])
@click.pass_context
@handle_preload_options
def gpu(ctx: click.Context, **options: Any) -> None:
    """What the workers' GPU actors are doing; the same as `inspect gpu`."""
    ctx.invoke(inspect, command="gpu", **options)
