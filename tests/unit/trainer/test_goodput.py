"""Every second of a run belongs to one activity, over restarts too."""

import json

import pytest

from isthmus.trainer.monitoring.goodput import (
    Activity,
    GoodputLedger,
    parse_account,
    seconds_between_failures,
)

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class Memory:
    """Keeps what was written last, and opens ledgers that continue it."""

    def __init__(self, clock):
        self.clock, self.data = clock, None

    def write(self, data):
        self.data = data

    @property
    def account(self):
        return None if self.data is None else parse_account(self.data, "goodput.json")

    def open(self, began=None):
        return GoodputLedger(self.account, self.write, began=began, clock=self.clock)


@pytest.fixture
def memory(clock):
    return Memory(clock)


def work(ledger, clock, *, compute, wait=0.0, save=0.0):
    with ledger.spending(Activity.DATA_WAIT):
        clock.now += wait
    with ledger.spending(Activity.COMPUTE):
        clock.now += compute
    with ledger.spending(Activity.CHECKPOINT):
        clock.now += save


def test_every_second_is_attributed_once(clock, memory):
    ledger = memory.open()
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


def test_a_kill_costs_down_time_and_lost_work(clock, memory):
    ledger = memory.open()
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 5)
    work(ledger, clock, compute=6, wait=2)
    ledger.write()
    clock.now += 3  # done, but never written
    clock.now += 20  # dead
    again = memory.open()
    clock.now += 4
    again.resume("stage1", 5)
    seconds = again.seconds
    assert seconds[Activity.COMPUTE] == 10
    assert seconds[Activity.LOST] == 8
    assert seconds[Activity.RESTART] == 23
    assert seconds[Activity.START_UP] == 4
    assert sum(seconds.values()) == again.total_seconds == 45


def test_resume_from_an_older_checkpoint_loses_more(clock, memory):
    ledger = memory.open()
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 5)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 10)
    ledger.write()
    again = memory.open()
    again.resume("stage1", 5)
    assert again.seconds[Activity.LOST] == 10
    work(again, clock, compute=10)
    again.mark("stage1", 10)
    again.write()
    third = memory.open()
    third.resume("stage1", 10)
    assert third.seconds[Activity.LOST] == 10, "what was lost once is not lost again"
    assert third.seconds[Activity.COMPUTE] == 20


def test_stages_share_the_account(clock, memory):
    ledger = memory.open()
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.mark("stage1", 5)
    ledger.resume("stage2", 0)
    work(ledger, clock, compute=3)
    ledger.write()
    again = memory.open()
    again.resume("stage2", 0)
    assert again.seconds[Activity.COMPUTE] == 10
    assert again.seconds[Activity.LOST] == 3
    assert memory.account.seconds[Activity.START_UP] == 0
    assert "2 start(s)" in again.table()


def test_the_next_stage_is_no_restart(clock, memory):
    ledger = memory.open()
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=10)
    ledger.end_stage(finished=True)
    clock.now += 5
    began = clock.now
    clock.now += 3
    ledger = memory.open(began)
    ledger.resume("stage2", 0)
    assert ledger.seconds[Activity.START_UP] == 8
    assert ledger.seconds[Activity.RESTART] == 0
    assert "in 1 start(s)" in ledger.table()
    clock.now += 2
    ledger = memory.open()  # after a death in the new stage
    assert ledger.seconds[Activity.RESTART] > 0
    assert "in 2 start(s)" in ledger.table()


DAY = 86400.0


def test_time_between_failures_is_that_of_work_and_a_stop_is_no_failure(clock, memory):
    """Days in which nobody ran it would otherwise count as days without a failure."""
    assert seconds_between_failures(memory.account) == DAY
    ledger = memory.open()
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=1000)
    ledger.end_stage(finished=False)
    clock.now += 100 * DAY
    assert seconds_between_failures(memory.account) == DAY + 1000
    ledger = memory.open()
    ledger.resume("stage1", 0)
    work(ledger, clock, compute=500)
    ledger.write()
    clock.now += 30 * DAY
    assert seconds_between_failures(memory.account) == (DAY + 1500) / 2  # a kill, to be counted at the next start
    memory.open().end_stage(finished=True)
    assert seconds_between_failures(memory.account) == (DAY + 1500) / 2
    assert memory.account.failures == 1


def test_accounts_of_e100c06_are_read_and_damaged_ones_end_no_run(caplog):
    old = '{"started_at": 1, "seen_at": 2, "starts": 3, "stage_done": true, "seconds": %s, "marks": []}'
    seconds = dict.fromkeys(Activity, 1.0)
    assert parse_account((old % json.dumps(seconds)).encode(), "url").starts == 3
    assert parse_account(b"{[", "url") is None
    assert "starts over" in caplog.text
