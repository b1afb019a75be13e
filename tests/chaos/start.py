"""What a forked process calls: keeps torch and DeepSpeed out of the process that only watches."""

from typing import Any


def start(*arguments: Any) -> None:
    """Be a rank."""
    from tests.chaos import rank

    rank.main(*arguments)
