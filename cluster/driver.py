"""The driver of a run: takes the lease, trains the stages in order, exports, and records how the run ended.

`python -m isthmus.cluster.driver config.yaml` is the entry point of a submitted job; `run_local` drives the same way
on an embedded Ray. The driver holds no state of its own: what it knows is in the run's folder, so a new one resumes.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import ray

from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.cluster.embedded import embedded_ray
from isthmus.cluster.errors import EXPECTED_ERRORS
from isthmus.cluster.logs import bounded_file, configure_logging
from isthmus.cluster.ray_nodes.auth import use_tokens
from isthmus.cluster.ray_nodes.jobs_api import end_without_retry, submission_id
from isthmus.cluster.status import RunState, StatusBoard
from isthmus.cluster.submission.secret_names import check_secrets
from isthmus.cluster.supervision.supervisor import Supervisor
from isthmus.cluster.workers.export import export_on_worker
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.context import Outcome
from isthmus.trainer.runs.store import RunStore

logger = logging.getLogger(__name__)

Driven = TypeVar("Driven", JobConfig, BootstrapJob)

USER_ERROR = 2
JOB_LOG_BYTES = 256 << 20
"""Ray rotates the logs of workers, but not that of a job, to which it copies the lines of all workers."""
LAST_LINES_SECONDS = 1.0
"""Time for the workers' last lines, which Ray brings to the driver, to reach the job's log."""


def drive(config: JobConfig, job: str | None, allow_change: Sequence[str] = ()) -> Outcome:
    """Drive a run to its end on the connected Ray cluster.

    Raises:
        ClusterError, ConfigError, DataError, ModelError, TrainerError: one line for the operator.
    """
    store = ObjectStore(config.store)
    check_secrets()
    owner = f"{job or 'local'} on {socket.gethostname()} (pid {os.getpid()})"
    run = RunStore.open(config, store, owner=owner, allow_change=allow_change)
    try:
        board = StatusBoard(join(config.run.url, config.run.name), store, config.run.name, job)
        return _drive_leased(config, run, board)
    finally:
        run.close()


def run_local(config: JobConfig, allow_change: Sequence[str] = ()) -> Outcome:
    """Start an embedded Ray on this machine, drive the run there and stop Ray again; see `drive`."""
    with embedded_ray(config):
        configure_logging(sys.stderr, run=config.run.name)
        return drive(config, None, allow_change)


def main(path: str, *allow_change: str) -> int:
    """Drive the run of a configuration file inside a Ray job; return the exit code.

    `allow_change` are keys that may differ from the run's earlier starts.
    """
    return drive_job(path, JobConfig, lambda config: drive(config, submission_id(), allow_change))


def drive_job(path: str, kind: type[Driven], drive: Callable[[Driven], Outcome]) -> int:
    """Read a configuration file inside a Ray job, connect to the cluster and drive; return the exit code."""
    configure_logging(sys.stdout)
    use_tokens(create=False)
    try:
        config = load_config(path, [], kind)
        configure_logging(sys.stdout, run=config.run.name)
        ray.init(address="auto", namespace=config.run.name, logging_level=logging.WARNING)
        with bounded_file(sys.stdout.fileno(), JOB_LOG_BYTES):
            return drive(config).exit_code
    except EXPECTED_ERRORS as error:
        logger.error("%s", error)  # noqa: TRY400 - the operator needs the line, not our stack
        is_final = not getattr(error, "retryable", False)
    finally:
        if ray.is_initialized():
            time.sleep(LAST_LINES_SECONDS)
        ray.shutdown()
    if is_final:
        end_without_retry()
    return USER_ERROR


def _drive_leased(config: JobConfig, run: RunStore, board: StatusBoard) -> Outcome:
    """Train and export under the lease; the status always records how it ended."""
    supervisor = Supervisor(config, run.token, board)
    try:
        with _stop_on_signals(supervisor):
            for stage in config.stages:
                if not supervisor.run_stage(stage):
                    board.update(RunState.STOPPED, message="stopped by the operator; isthmus resume continues")
                    return Outcome.STOPPED
            if config.run.export and not _export(config, run, board, supervisor):
                return Outcome.STOPPED
    except BaseException as error:
        expected = isinstance(error, EXPECTED_ERRORS)
        board.update(RunState.FAILED, message=str(error) if expected else f"{type(error).__name__}: {error}")
        raise
    board.update(RunState.FINISHED, message="", now=True)
    return Outcome.FINISHED


def _export(config: JobConfig, run: RunStore, board: StatusBoard, supervisor: Supervisor) -> bool:
    """Export the run; False: stopped by the operator."""
    board.update(RunState.RUNNING, message="exporting")
    url = export_on_worker(config, run.token, lambda: supervisor.stop_requested)
    if url is None:
        board.update(RunState.STOPPED, message="stopped before the export was done; isthmus resume exports")
        return False
    logger.info("exported to %s", url)
    return True


@contextmanager
def _stop_on_signals(supervisor: Supervisor) -> Iterator[None]:
    """Turn the first SIGTERM or SIGINT into a stop with a last checkpoint; a second SIGINT interrupts."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if supervisor.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        supervisor.request_stop()

    with handling_stop_signals(on_signal):
        yield


@contextmanager
def handling_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` receive SIGTERM and SIGINT inside the block."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
