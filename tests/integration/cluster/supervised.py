"""A supervisor in a thread of the test's process, with toy_rank as the training code."""

import json
import threading
from pathlib import Path

from isthmus.cluster.status import StatusBoard
from isthmus.cluster.supervision.supervisor import Supervisor
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.integration.cluster.raylets import wait_for
from tests.unit.cluster.configs import job_config

LIMIT = 90.0


class Supervised:
    """A supervisor that runs in a thread."""

    def __init__(self, folder: Path, **cluster):
        self.folder = folder
        workers = {"min": 1, "max": 2}
        steps = cluster.pop("steps", 60)
        stage = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 4, "deepspeed": "zero1"}
        self.config = job_config(
            str(folder), stage1=stage, cluster={"workers": workers, "grow_after_seconds": 1, **cluster}
        )
        self.board = StatusBoard(str(folder / "demo"), ObjectStore(), "demo", "job-1")
        self.supervisor = Supervisor(self.config, None, self.board, entry="tests.integration.cluster.toy_rank")
        self.finished: bool | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.finished = self.supervisor.run_stage("stage1")
        except Exception as error:  # noqa: BLE001 - the test checks it
            self.error = error

    def join(self):
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), self.board.status
        return self

    def stop(self):
        self.supervisor.request_stop()
        self.join()

    def log(self):
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_step(self, step, *, world=None, after=0.0):
        def reached():
            lines = (x for x in self.log() if x["step"] >= step and x["time"] > after)
            return next((x for x in lines if world in (None, x["world"])), None)

        return wait_for(reached, LIMIT, f"step {step} in a world of {world}: {self.board.status}")

    def wait_until_recovered(self, num_restarts):
        def recovered():
            restarts = self.board.status.restarts
            return len(restarts) == num_restarts and restarts[-1].recovery_seconds is not None

        wait_for(recovered, LIMIT, f"recovery {num_restarts}: {self.board.status}")

    def pid(self, rank):
        return int((self.folder / f"pid-{rank}").read_text())
