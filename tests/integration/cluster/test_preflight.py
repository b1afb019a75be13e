"""Preflight finds a ready cluster ready, and says what is not."""

import pytest

from tests.integration.cluster.raylets import Raylets
from tests.unit.cluster.configs import job_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def raylets():
    raylets = Raylets(2)
    raylets.connect("preflight")
    yield raylets
    raylets.close()


def ready_config(folder, assets, **changes):
    sections = {
        "data": {"sources": [{"manifest": str(assets / "train")}], "lanes": 8},
        "model": {"vision": {"path": str(assets / "vision")}, "language": {"path": str(assets / "opt")}},
        "cluster": {"workers": {"min": 1, "max": 2}},
    }
    return job_config(str(folder), **(sections | changes))


def checked(config):
    from isthmus.cluster.checks.preflight import run_checks

    return {(check.name, check.where): check for check in run_checks(config)}


def test_a_ready_cluster(raylets, assets, tmp_path):
    checks = checked(ready_config(tmp_path, assets))
    assert all(check.ok for check in checks.values()), checks
    names = {name for name, _ in checks}
    assert names == {
        "world size", "memory", "disk", "clock", "priority", "versions", "secrets", "object store", "frozen weights",
        "data", "all-reduce",
    }  # fmt: skip
    reduce = next(check for check in checks.values() if check.name == "all-reduce")
    assert reduce.where == "2 workers on 2 nodes"
    assert "gloo: sum right" in reduce.found
    assert list(tmp_path.rglob("*probe*")) == []
    priorities = {(check.found, bool(check.remedy)) for check in checks.values() if check.name == "priority"}
    assert priorities <= {("workers run at nice 15", True), ("workers run at nice 0", False)}


def test_what_is_missing_is_named_with_its_remedy(raylets, assets, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "only here")
    (tmp_path / "file").write_text("in the way")
    config = ready_config(
        tmp_path / "file",
        assets,
        model={"vision": {"path": str(tmp_path / "nothing")}},
        data={"sources": [{"manifest": str(tmp_path / "no-manifest")}], "lanes": 8},
        cluster={"workers": {"min": 4, "max": 4}, "secrets": ["MY_KEY"]},
    )
    failed = {name: check for (name, _), check in checked(config).items() if not check.ok}
    assert set(failed) == {"world size", "secrets", "object store", "frozen weights", "data", "all-reduce"}
    assert all(check.remedy for check in failed.values())
    assert "MY_KEY" in failed["secrets"].remedy
    assert "only here" not in repr(failed)
    assert "needs 4 x {CPU: 1}" in failed["world size"].found
    assert f"isthmus models get NAME_OR_FOLDER {tmp_path}/nothing" in failed["frozen weights"].found
