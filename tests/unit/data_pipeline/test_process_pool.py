"""Local processes: the function is sent once to each of them."""

import os

import pytest

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
