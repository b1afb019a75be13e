"""Runs over time: what is known of them now, until they end, or until a driver gives its first sign of life."""

import time
from collections.abc import Callable, Iterator

from isthmus.cluster.errors import ClusterError, last_line
from isthmus.cluster.status import RunState
from isthmus.cluster.submission.job import Job
from isthmus.cluster.submission.jobs import Jobs
from isthmus.cluster.submission.run_folder import is_url
from isthmus.cluster.submission.run_view import RunView
from isthmus.data_pipeline.config import StoreConfig

FIRST_SIGN_SECONDS = 10.0
WATCH_SECONDS = 2.0
SILENCE_SECONDS = 60.0


def known_runs(run: str | None, address: str | None, store: StoreConfig) -> list[RunView]:
    """Return what is known of one run (a name, or the URL of its folder) or of all, by the newest job of each.

    `store` is for a URL; a job's metadata names its own.
    """
    if run and is_url(run):
        return [RunView.of_folder(run.rstrip("/"), store)]
    jobs = Jobs(address)
    if run:
        return [RunView.of_job(jobs.latest(run))]
    newest: dict[str, Job] = {}
    for job in jobs.all():
        newest.setdefault(job.run, job)
    return [RunView.of_job(job) for job in newest.values()]


def until_over(look: Callable[[], list[RunView]]) -> Iterator[list[RunView]]:
    """Yield the state every 2 s until every run has ended; a cluster that does not answer is asked again for a minute.

    Raises:
        ClusterError: at the first look, or when there has been no answer for a minute.
    """
    yield (now := look())
    answered_at = time.monotonic()
    while not all(view.is_over for view in now):
        time.sleep(WATCH_SECONDS)
        try:
            now = look()
        except (ClusterError, OSError, RuntimeError) as error:
            silence = time.monotonic() - answered_at
            if silence > SILENCE_SECONDS:
                raise ClusterError(
                    f"no response for {silence:.0f} s, the run may still be running: {last_line(error)}"
                ) from error
            continue
        answered_at = time.monotonic()
        yield now


def first_sign(jobs: Jobs, job: Job) -> RunView:
    """Return the run as soon as its driver waits, trains or has failed, or as it is after 10 s."""
    deadline = time.monotonic() + FIRST_SIGN_SECONDS
    while True:
        view = RunView.of_job(jobs.get(job.id))
        status = view.current
        decided = status and (status.state is RunState.WAITING or status.world_size)
        if view.failure or decided or time.monotonic() > deadline:
            return view
        time.sleep(0.3)
