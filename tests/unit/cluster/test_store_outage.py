"""An outage of the object store is waited for; what is no outage is reported at once."""

import pytest

from isthmus.cluster.errors import OutageError
from isthmus.cluster.supervision import store_outage
from isthmus.cluster.supervision.store_outage import await_store
from isthmus.data_pipeline.errors import AccessError, NotFoundError, StoreError, UnavailableError

pytestmark = pytest.mark.unit
URL = "s3://bucket/runs/demo/status.json"


class Clock:
    """Stands in for the module `time`; time passes by `sleep` only."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(store_outage, "time", clock)
    return clock


class Store:
    """Raises `error` at each probe until the clock shows `until`."""

    def __init__(self, clock, error, until):
        self.clock, self.error, self.until, self.probes = clock, error, until, 0

    def head(self, _url):
        self.probes += 1
        if self.clock.now < self.until:
            raise self.error


def wait(store, limit=3600.0, stopped=lambda: False):
    said = []
    await_store(store, URL, limit, on_waiting=said.append, stopped=stopped)
    return said


@pytest.mark.parametrize(
    "error", [UnavailableError("no response"), AccessError("the token has expired"), OSError("net")]
)
def test_half_an_hour_without_a_store_is_waited_for(clock, error):
    store = Store(clock, error, until=1800.0)
    said = wait(store)
    assert 1800.0 <= clock.now < 1800.0 + 31
    assert store.probes < 100
    assert str(error) in said[0]


def test_a_store_that_responds_is_not_waited_for(clock):
    assert wait(Store(clock, None, until=0.0)) == []
    assert wait(Store(clock, NotFoundError("no status yet"), until=1e9)) == []
    assert clock.now == 0.0


def test_an_outage_longer_than_the_limit_is_one_line(clock):
    with pytest.raises(
        OutageError, match=r"did not respond for 600 s \(cluster\.wait_seconds\): no response"
    ) as raised:
        wait(Store(clock, UnavailableError("no response"), until=1e9), limit=600.0)
    assert raised.value.retryable, "a RayJob tries again"


def test_a_refusal_for_good_is_no_outage(clock):
    with pytest.raises(StoreError, match="no conditional writes"):
        wait(Store(clock, StoreError("this store has no conditional writes"), until=1e9))


def test_a_stop_request_ends_the_wait(clock):
    wait(Store(clock, UnavailableError("no response"), until=1e9), stopped=lambda: clock.now > 60)
    assert clock.now < 70
