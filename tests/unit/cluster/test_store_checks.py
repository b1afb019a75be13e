"""Preflight's check of the object store: what a run's lease and commits rest on."""

import pytest

from isthmus.cluster.checks.store_checks import check_store
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore

from .configs import job_config

pytestmark = pytest.mark.unit


def test_a_store_with_conditional_writes_passes_and_nothing_is_left(tmp_path):
    assert check_store(job_config(str(tmp_path))).read_megabytes_per_second > 0
    assert not list(tmp_path.rglob("*preflight*"))
    assert list(ObjectStore().list(str(tmp_path))) == []


@pytest.mark.parametrize(("method", "header"), [("put_if_absent", "If-None-Match"), ("compare_and_swap", r"If-Match")])
def test_a_store_that_ignores_a_condition_is_refused(tmp_path, monkeypatch, method, header):
    monkeypatch.setattr(ObjectStore, method, lambda store, url, data, *_: store.put(url, data))
    with pytest.raises(DataError, match=rf"\({header}\) was not refused; two drivers could write one run"):
        check_store(job_config(str(tmp_path)))
    assert list(ObjectStore().list(str(tmp_path))) == []
