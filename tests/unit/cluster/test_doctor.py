"""The doctor's archive holds what helps and no secret."""

import io
import tarfile

import pytest

from isthmus.cluster.checks import doctor
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.trainer.monitoring.monitor import FLIGHT_RECORDER

pytestmark = pytest.mark.unit
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture
def run_url(tmp_path):
    folder = tmp_path / "runs" / "demo"
    for name, text in {
        "config.yaml": "run: {name: demo}\n",
        "status.json": '{"state": "failed"}',
        "stage1/stacks/rank-00000-1.txt": 'File "loop.py", line 3 in fit',
        "stage1/metrics.jsonl": "x" * (doctor.MAX_FILE_BYTES + 10),
        "stage1/checkpoints/step-000000010/part.safetensors": "weights",
        "stage1/tensorboard/events": "events",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def unpack(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {entry.name: archive.extractfile(entry).read().decode() for entry in archive}


def test_archive_holds_text_and_lists_the_rest(run_url):
    files = unpack(
        doctor.collect(run_url, ObjectStore(), {"demo-1": "log line\n"}, {"address": "http://head:8265"}, ())
    )
    assert files["doctor/run/config.yaml"] == "run: {name: demo}\n"
    assert files["doctor/run/stage1/stacks/rank-00000-1.txt"].startswith("File")
    assert files["doctor/jobs/demo-1.log"] == "log line\n"
    assert '"torch": ' in files["doctor/facts.json"]
    assert not [name for name in files if "safetensors" in name or "tensorboard" in name]
    assert join(run_url, "stage1/checkpoints/step-000000010/part.safetensors") in files["doctor/listing.txt"]


def test_nccls_flight_recorder_is_packed_as_it_is(run_url, tmp_path):
    assert doctor.FLIGHT_RECORDER == FLIGHT_RECORDER
    dump = b"\x80\x04\x95 a pickle of torch \xff"
    folder = tmp_path / "runs" / "demo" / "stage1" / doctor.FLIGHT_RECORDER
    folder.mkdir()
    (folder / "rank-00003").write_bytes(dump)
    data = doctor.collect(run_url, ObjectStore(), {}, {}, ())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.extractfile(f"doctor/run/stage1/{doctor.FLIGHT_RECORDER}/rank-00003").read() == dump


def test_a_long_file_is_cut_at_its_beginning(run_url):
    text = unpack(doctor.collect(run_url, ObjectStore(), {}, {}, ()))["doctor/run/stage1/metrics.jsonl"]
    assert text.startswith("... 10 bytes left out ...\n")


def test_the_archive_is_bounded_and_small_files_come_first(run_url, monkeypatch):
    monkeypatch.setattr(doctor, "MAX_TOTAL_BYTES", 1000)
    monkeypatch.setattr(doctor, "MAX_LISTED", 2)
    files = unpack(doctor.collect(run_url, ObjectStore(), {}, {}, ()))
    assert "doctor/run/status.json" in files
    assert "doctor/run/stage1/metrics.jsonl" not in files
    assert len(files["doctor/listing.txt"].splitlines()) == 3
    assert files["doctor/listing.txt"].splitlines()[-1].startswith("6 files, ")


def test_no_secret_leaves(run_url, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    (tmp_path / "runs" / "demo" / "notes.txt").write_text(f"key {SECRET} in a file")
    log = (
        f"export AWS_SECRET_ACCESS_KEY={SECRET}\nAKIAIOSFODNN7EXAMPLE\nAuthorization: Bearer {'f' * 64}\n"
        "https://b.s3/k?X-Amz-Signature=0123456789abcdef&a=b\nhttp://user:hunter22@proxy\n"
        'other_api_key: "zzzzzzzzzzzz"\nloss 0.5 at step 3\n'
    )
    text = "\n".join(
        unpack(doctor.collect(run_url, ObjectStore(), {"demo-1": log}, {}, ("AWS_SECRET_ACCESS_KEY",))).values()
    )
    for secret in (SECRET, "AKIAIOSFODNN7EXAMPLE", "f" * 64, "0123456789abcdef", "hunter22", "zzzzzzzzzzzz"):
        assert secret not in text
    assert "loss 0.5 at step 3" in text


def test_no_link_is_followed_out_of_the_run(run_url, tmp_path):
    private = tmp_path / "credentials.txt"
    private.write_text("nothing that looks like a key")
    (tmp_path / "runs" / "demo" / "notes.txt").symlink_to(private)
    files = unpack(doctor.collect(run_url, ObjectStore(), {}, {}, ()))
    assert "doctor/run/config.yaml" in files
    assert not [name for name, text in files.items() if "nothing that looks like a key" in text or "notes" in name]


def test_the_file_is_private(tmp_path):
    path = tmp_path / "x.tar.gz"
    doctor.write_private(path, b"data")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == b"data"
    assert list(tmp_path.iterdir()) == [path]
