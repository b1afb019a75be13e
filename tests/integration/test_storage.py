"""Keys, checksums, index and ingest against SeaweedFS, which checks both; test_object_store.py has the rest."""

import json
import logging
import os
import shutil
import subprocess
import sys
import zlib

import psutil
import pytest

from isthmus.bootstrap.duplicates.marks import mark_duplicates
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store import s3, s3_client
from isthmus.data_pipeline.store.object_store import (
    AccessError,
    NotFoundError,
    ObjectStore,
    UnavailableError,
    join,
)
from tests.corpus import named_members, write_shards, write_tar
from tests.seaweed import BUCKET

pytestmark = pytest.mark.integration

_MAIN = """
import sys
from isthmus.cluster.cli.data import app
from isthmus.data_pipeline.errors import DataError
try:
    app(args=sys.argv[1:], standalone_mode=False)
except DataError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def store(seaweed):
    return ObjectStore(seaweed.store_config)


@pytest.fixture
def folder(request):
    return f"s3://{BUCKET}/{request.node.name}"


def test_the_server_listens_on_loopback_alone(seaweed):
    listening = [c for c in psutil.Process(seaweed.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert len(listening) > 3
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_the_secret_is_in_no_log_line_not_even_the_sdks(store, folder, seaweed, caplog):
    caplog.set_level(logging.DEBUG)
    store.put(join(folder, "a"), b"x")
    assert store.get(join(folder, "a")) == b"x"
    with pytest.raises(NotFoundError):
        store.get(join(folder, "b"))
    assert "botocore" in caplog.text
    assert seaweed.secret_key not in caplog.text


def isthmus_data(seaweed, *arguments):
    """Run the sub-command in a process of its own, as an operator does."""
    command = [sys.executable, "-c", _MAIN, *arguments, "--endpoint-url", seaweed.endpoint_url]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_damaged_part_is_refused_by_the_server(store, folder, monkeypatch):
    monkeypatch.setattr(s3_client, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(s3, "_crc32", lambda data: s3.base64.b64encode(zlib.crc32(data + b"x").to_bytes(4)).decode())
    with pytest.raises(UnavailableError):
        store.put(join(folder, "x"), b"hello")
    monkeypatch.undo()
    with pytest.raises(NotFoundError):
        store.head(join(folder, "x"))


def test_a_wrong_secret_is_told(seaweed, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessError, match="check the credentials"):
        ObjectStore(seaweed.store_config).get(f"s3://{BUCKET}/x")


def test_index_verify_show_and_ls_on_s3(store, seaweed, folder, tmp_path):
    for path in write_shards(tmp_path / "shards", [4, 3]):
        store.put_file(join(folder, "set", path.name), path)
    out = join(folder, "manifest")
    done = isthmus_data(
        seaweed, "index", join(folder, "set", "{00000..00001}.tar"), "--out", out, "--json", "--processes", "1"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 7
    assert "2 of 2 shards" in done.stderr
    assert isthmus_data(seaweed, "verify", out, "--deep", "--processes", "1").returncode == 0
    shown = isthmus_data(seaweed, "show", out, "--json", "--sheet", str(tmp_path / "sheet.png"))
    assert json.loads(shown.stdout)["caption_words"]["4-7"] == 5 + 2 * 3
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    store.put_file(join(folder, "set", "00001.tar"), write_tar(tmp_path / "other.tar", named_members([9])))
    failed = isthmus_data(seaweed, "verify", out, "--processes", "1")
    assert failed.returncode != 0
    assert "00001.tar has" in failed.stderr


def test_an_empty_bucket_is_one_clear_error(store, seaweed):
    store.make_bucket("s3://empty-bucket")
    done = isthmus_data(seaweed, "index", "s3://empty-bucket", "--out", f"s3://{BUCKET}/m", "--processes", "1")
    assert done.returncode != 0
    assert "s3://empty-bucket matches no .tar" in done.stderr


def test_ray_tasks_index_and_find_duplicates_like_local_processes(tmp_path):
    """The runner of `--address`, on a Ray of this test alone."""
    code = """
import sys
import ray
from isthmus.bootstrap.duplicates.marks import mark_duplicates
from isthmus.cluster.ray_nodes.ray_map import run_in_ray
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.store.object_store import ObjectStore
urls = sys.argv[2:]
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
manifest, _ = build_manifest(urls, sys.argv[1], ObjectStore(), IndexOptions(), run_in_ray("local"))
print(manifest.hash)
(marks,) = mark_duplicates([manifest], sys.argv[1] + "-marks", ObjectStore(), run_in_ray("local"))
print(marks.hash, sum(file.counts["duplicates"] for file in marks.files))
try:
    build_manifest(["/nowhere/x.tar"], sys.argv[1], ObjectStore(), IndexOptions(), run_in_ray("local"))
except DataError as error:
    print(type(error).__name__, error)
"""
    paths = [str(path) for path in write_shards(tmp_path / "shards", [2, 3, 1])]
    paths.append(str(shutil.copyfile(paths[0], tmp_path / "shards" / "again.tar")))
    ours, _ = build_manifest(paths, str(tmp_path / "ours"), ObjectStore(), IndexOptions(), run_in_processes(1))
    (marks,) = mark_duplicates([ours], str(tmp_path / "marks"), ObjectStore(), run_in_processes(1))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "theirs"), *paths],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == ours.hash
    assert lines[1] == f"{marks.hash} {sum(file.counts['duplicates'] for file in marks.files)}"
    assert not lines[1].endswith(" 0")
    assert lines[2].startswith("NotFoundError /nowhere/x.tar does not exist")
