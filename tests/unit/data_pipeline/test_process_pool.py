"""Local processes: the function is sent once to each of them."""

import multiprocessing
import os
import signal
import time

import psutil
import pytest

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.process_pool import run_in_processes

pytestmark = pytest.mark.unit


class Adder:
    """Adds a number, and counts in its copies how often it was sent."""

    sent = 0

    def __call__(self, item):
        return item + 1, os.getpid()

    def __getstate__(self):
        Adder.sent += 1
        return {}


def test_a_large_function_is_sent_once_to_each_process():
    results = list(run_in_processes(2)(Adder(), range(30)))
    assert sorted(value for value, _ in results) == list(range(1, 31))
    assert os.getpid() not in {pid for _, pid in results}
    assert 1 <= Adder.sent <= 2


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_clear_error():
    with pytest.raises(DataError, match="a worker process was killed"):
        list(run_in_processes(2)(die, range(3)))


def report_and_wait(report):
    for pid in run_in_processes(2)(wait_a_moment, range(2)):
        report.send(pid)
    report.recv()


def wait_a_moment(item):
    time.sleep(0.2)
    return os.getpid()


def test_workers_end_when_the_process_that_started_them_is_killed():
    ours, theirs = multiprocessing.Pipe()
    caller = multiprocessing.get_context("spawn").Process(target=report_and_wait, args=(theirs,))
    caller.start()
    workers = [psutil.Process(ours.recv())]  # it waits for its next item while the other one still works
    workers += [child for child in psutil.Process(caller.pid).children() if child not in workers]
    caller.kill()
    caller.join()
    living = psutil.wait_procs(workers, timeout=20)[1]
    for worker in living:
        worker.kill()
    assert living == []
