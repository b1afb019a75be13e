"""Every second of a run belongs to one activity, over restarts too."""

import pytest

from isthmus.trainer.monitoring.goodput import Activity, GoodputLedger, MemoryLedger, read_account

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def memory():
    return MemoryLedger()


def work(ledger, clock, *, compute, wait=0.0, save=0.0):
    with ledger.spending(Activity.DATA_WAIT):
        clock.now += wait
    with ledger.spending(Activity.COMPUTE):
        clock.now += compute
    with ledger.spending(Activity.CHECKPOINT):
        clock.now += save


def test_every_second_is_booked_once(clock, memory):
    ledger = GoodputLedger(memory, clock=clock)
    clock.now += 7
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10, wait=2, save=1)
    with ledger.spending(Activity.COMPUTE):
        clock.now += 3
        with ledger.spending(Activity.EVALUATION):
            clock.now += 4
        clock.now += 5
    assert ledger.seconds == {
        Activity.COMPUTE: 18,
        Activity.DATA_WAIT: 2,
        Activity.CHECKPOINT: 1,
        Activity.EVALUATION: 4,
        Activity.START_UP: 7,
        Activity.RESTART: 0,
        Activity.LOST: 0,
    }
    assert ledger.total_seconds == 32


def test_kill_books_down_time_and_lost_work(clock, memory):
    ledger = GoodputLedger(memory, clock=clock)
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 5)
    work(ledger, clock, compute=6, wait=2)
    ledger.write()
    clock.now += 3  # done, but never written
    clock.now += 20  # dead
    again = GoodputLedger(memory, clock=clock)
    clock.now += 4
    again.resume("stage1", 5)
    seconds = again.seconds
    assert seconds[Activity.COMPUTE] == 10
    assert seconds[Activity.LOST] == 8
    assert seconds[Activity.RESTART] == 23
    assert seconds[Activity.START_UP] == 4
    assert sum(seconds.values()) == again.total_seconds == 45


def test_resume_from_an_older_checkpoint_loses_more(clock, memory):
    ledger = GoodputLedger(memory, clock=clock)
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 5)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 10)
    ledger.write()
    again = GoodputLedger(memory, clock=clock)
    again.resume("stage1", 5)
    assert again.seconds[Activity.LOST] == 10
    work(again, clock, compute=10)
    again.mark("stage1", 10)
    again.write()
    third = GoodputLedger(memory, clock=clock)
    third.resume("stage1", 10)
    assert third.seconds[Activity.LOST] == 10, "what was lost once is not lost again"
    assert third.seconds[Activity.COMPUTE] == 20


def test_stages_share_the_account(clock, memory):
    ledger = GoodputLedger(memory, clock=clock)
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 5)
    ledger.resume("stage2", 0)
    work(ledger, clock, compute=3)
    ledger.write()
    again = GoodputLedger(memory, clock=clock)
    again.resume("stage2", 0)
    assert again.seconds[Activity.COMPUTE] == 10
    assert again.seconds[Activity.LOST] == 3
    assert read_account(memory.read())["start-up"] == 0
    assert "2 start(s)" in again.table()


def test_the_next_stage_is_no_restart(clock, memory):
    ledger = GoodputLedger(memory, clock=clock)
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.finish_stage()
    clock.now += 5
    began = clock.now
    clock.now += 3
    ledger = GoodputLedger(memory, began=began, clock=clock)
    ledger.resume("stage2", 0)
    assert ledger.seconds[Activity.START_UP] == 8
    assert ledger.seconds[Activity.RESTART] == 0
    assert "in 1 start(s)" in ledger.table()
    clock.now += 2
    ledger = GoodputLedger(memory, clock=clock)  # after a death in the new stage
    assert ledger.seconds[Activity.RESTART] > 0
    assert "in 2 start(s)" in ledger.table()
