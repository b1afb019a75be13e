"""A driver of toy_rank.py in a process of its own; its arguments: address, folder, name, steps.

It wants two workers; SIGTERM asks it to stop.
"""

import signal
import sys
from pathlib import Path

import ray

from isthmus.cluster.status import StatusBoard
from isthmus.cluster.supervision.supervisor import Supervisor
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.unit.cluster.configs import job_config


def main(address: str, folder: str, name: str, steps: str) -> None:
    """Drive the run to its end or to a stop."""
    Path(folder).mkdir()
    ray.init(address=address, namespace=name, log_to_driver=False)
    stage = {"steps": int(steps), "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "zero1"}
    config = job_config(folder, name, stage1=stage, cluster={"workers": {"min": 2, "max": 2}})
    board = StatusBoard(str(Path(folder) / name), ObjectStore(), name, name)
    supervisor = Supervisor(config, 1, board, entry="tests.integration.cluster.toy_rank")
    signal.signal(signal.SIGTERM, lambda *_: supervisor.request_stop())
    supervisor.run_stage("stage1")
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
