"""`python -m tests.chaos.ray_driver config.yaml`: the product's driver, whose ranks meet faults (ray_rank.py)."""

import sys
from functools import partial

from isthmus.cluster import driver
from isthmus.trainer.runs.store import RunStore
from tests.chaos.faults import BEAT_SECONDS

if __name__ == "__main__":
    driver.Supervisor = partial(driver.Supervisor, entry="tests.chaos.ray_rank")  # type: ignore[misc, assignment]
    RunStore.open = staticmethod(partial(RunStore.open, heartbeat_seconds=BEAT_SECONDS))  # type: ignore[method-assign]
    sys.exit(driver.main(sys.argv[1]))
