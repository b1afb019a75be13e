"""The memory probe's result in `run.json`, reused by a restart on the same number of ranks and devices.

It is valid under one token: that is one driver, and so one code and one configuration.
"""

from collections.abc import Callable

import torch

from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank, gather_lists
from isthmus.trainer.runs.store import RunStore

FACT = "memory_probe"

Work = tuple[float, float | None]
"""Floating-point operations per sample: executed, and needed by formula (Monitor.expect_work)."""


def probed_work(run: RunStore, stage: str, rank: Rank, device: torch.device, probe: Callable[[], Work]) -> Work:
    """Return what `probe` found under the same conditions, or call it. Collective."""
    devices = sorted(set(gather_lists([_describe(device)])))
    conditions = f"token {run.token}: {stage} on {rank.world_size} x {', '.join(devices)}"
    known = from_main_rank(lambda: run.facts().get(FACT, {}))
    if known.get("conditions") == conditions:
        return known["executed"], known["needed"]
    executed, needed = probe()
    if rank.is_main:
        run.record(**{FACT: {"conditions": conditions, "executed": executed, "needed": needed}})
    return executed, needed


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory >> 20} MiB)"
