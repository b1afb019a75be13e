"""The actor name that Ray shows in log lines, which it reads from the actor's own output."""

import sys

from ray._private.ray_constants import LOG_PREFIX_ACTOR_NAME  # there is no public call


def show_actor_name(name: str) -> None:
    """Let Ray put `name` before the lines that this actor's process writes from now on."""
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"{LOG_PREFIX_ACTOR_NAME}{name}\n")
        stream.flush()
