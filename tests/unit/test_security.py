"""What hostile files, configurations and neighbours can do: docs/security.md, line by line."""

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.shard_check import check_shard
from isthmus.data_pipeline.dataset.tar_walk import ObjectStream
from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.sample.images import decode_image
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.checkpoint.format import MANIFEST, canonical_json, hash_file
from isthmus.trainer.checkpoint.reader import SavedCheckpoint
from isthmus.trainer.config.loading import load_config, parse_yaml, to_yaml
from isthmus.trainer.errors import CheckpointError, TrainerError
from isthmus.trainer.frozen.safetensors_index import FrozenWeightsError, read_entries
from isthmus.trainer.runs.lease import LeaseState
from isthmus.trainer.runs.store import RunStore, read_run
from tests.saved_states import fragments_of, manager, state_of

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PACKAGES = ("model", "data_pipeline", "trainer", "bootstrap", "cluster", "demo")
DEEP = "[" * 200_000
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# No code runs on a read path


def sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def calls(path):
    """Yield dotted name, call and line of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_pickle_is_read_in_one_place_only_from_our_own_pipe():
    """`model/imports/tensors.py` only names pickle's error, which `torch.load(weights_only=True)` raises."""
    importing = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {
                "pickle",
                "cloudpickle",
                "dill",
                "joblib",
                "shelve",
                "marshal",
            }:
                importing.add(str(path.relative_to(ROOT)))
    assert importing == {"trainer/checkpoint/upload_process.py", "model/imports/tensors.py"}
    assert set(re.findall(r"pickle\.(\w+)", (ROOT / "model/imports/tensors.py").read_text())) == {"UnpicklingError"}


def test_nothing_that_is_read_can_name_code():
    found = []
    for path in sources():
        for name, call in calls(path):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            place = f"{path.relative_to(ROOT)}:{call.lineno}"
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"{place}: torch.load without weights_only=True")
            if name.endswith((".load", ".fromfile")) and name.startswith("np.") and "allow_pickle" in keywords:
                found.append(f"{place}: allow_pickle")
            if name in ("eval", "exec", "compile", "os.system", "yaml.unsafe_load", "yaml.full_load"):
                found.append(f"{place}: {name}")
            if keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False":
                found.append(f"{place}: {name} with {keywords}")
    assert not found


def test_a_pickled_file_among_weights_runs_no_code(tmp_path):
    from isthmus.model.formats.native import read_trained

    touched = tmp_path / "touched"
    folder = tmp_path / "hostile"
    folder.mkdir()
    torch.save({"model": Payload(touched)}, folder / "checkpoint.pth")
    for path in (folder / "checkpoint.pth", folder):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the class depends on the file's kind
            read_trained(path, ["qformer.query_tokens"])
        assert not isinstance(caught.value, AssertionError)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "checkpoint.pth", weights_only=True)
    assert not touched.exists()
    torch.load(folder / "checkpoint.pth", weights_only=False)  # the payload is a real one
    assert touched.exists()


def test_transformers_loads_no_pickled_vision_weights(tmp_path):
    from isthmus.model.config import VisionConfig
    from isthmus.model.frozen.vision import load_vision
    from isthmus.model.tiny import write_tiny_vision

    write_tiny_vision(tmp_path / "vision")
    (weights,) = (tmp_path / "vision").glob("*.safetensors")
    weights.unlink()
    touched = tmp_path / "touched"
    torch.save({"x": Payload(touched)}, tmp_path / "vision" / "pytorch_model.bin")
    with pytest.raises(Exception):  # noqa: B017, PT011 - ours or the library's, but no success
        load_vision(VisionConfig(path="vision", image_size_pixels=64), tmp_path / "vision")
    assert not touched.exists()


# Hostile shards


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def entry(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def png(size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def check(tmp_path, data):
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    store = ObjectStore()
    return check_shard(ObjectStream(store, store.head(str(path))))


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/etc/passwd", "a/../../b", "a/..", "..hidden/../x"])
def test_names_that_lead_out_of_a_shard_are_left_out(tmp_path, name):
    samples, drops = check(tmp_path, tar_of([(entry(f"{name}.png"), png()), (entry(f"{name}.txt"), b"a caption")]))
    assert not samples
    assert {drop.fault for drop in drops} <= {"unsafe_name"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_left_out(tmp_path, kind):
    samples, drops = check(tmp_path, tar_of([(entry("a.png", kind, "/etc/passwd"), b""), (entry("a.txt"), b"words")]))
    assert not samples
    assert [drop.fault for drop in drops] == ["special_member"]


def test_a_member_larger_than_its_archive_is_refused(tmp_path):
    data = bytearray(tar_of([(entry("a.png"), png())]))
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    samples, drops = check(tmp_path, bytes(data))
    assert not samples
    assert drops[0].fault == "truncated"


def test_endless_extension_headers_are_refused(tmp_path):
    long = tarfile.TarInfo("././@LongLink")
    long.type = b"L"
    _, drops = check(tmp_path, tar_of([(long, b"x" * (2 << 20)), (entry("a.png"), png())]))
    assert [drop.fault for drop in drops] == ["corrupt_archive"]


@pytest.mark.parametrize("text", [f'{{"captions": {DEEP}', f'{{"captions": ["x"], "n": {"9" * 10_000}}}'])
def test_a_hostile_caption_file_is_a_bad_sample(text):
    with pytest.raises(BadSample):
        read_captions({"json": text.encode()})


def test_a_decompression_bomb_is_a_bad_sample_before_its_pixels_are_decoded():
    side = 12_000
    rows = zlib_png(side)
    assert len(rows) < 1 << 20
    with pytest.raises(BadSample, match="pixels"):
        decode_image(rows, 64_000_000)


def zlib_png(side):
    """A black PNG, side x side, of a few bytes: its pixels are never made here."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_in_an_image_never_reaches_its_interpreter(tmp_path, monkeypatch):
    """Pillow hands EPS files to Ghostscript, whatever their name: another program, with a history of holes."""

    def forbidden(*arguments, **_options):
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    with pytest.raises(BadSample, match="undecodable_image"):
        decode_image(POSTSCRIPT, 64_000_000)
    samples, drops = check(tmp_path, tar_of([(entry("a.png"), POSTSCRIPT), (entry("a.txt"), b"words")]))
    assert not samples
    assert [drop.fault for drop in drops] == ["undecodable_image"]


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff" + b"\0" * 64, b"", b"GIF89a" + b"\xff" * 20, b"RIFF\xff\xff\xff\xffWEBPVP8X"]
)
def test_garbage_that_begins_like_an_image_is_a_bad_sample(data):
    with pytest.raises(BadSample):
        decode_image(data, 64_000_000)


def test_a_hostile_manifest_is_one_clear_error(tmp_path):
    from isthmus.data_pipeline.errors import DataError

    for text in (DEEP, '{"format": 1}', '{"format": "isthmus-manifest", "version": 1}\n' + DEEP, "\0\0"):
        (tmp_path / "manifest.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.jsonl"):
            Manifest.load(str(tmp_path / "manifest.jsonl"), ObjectStore())


# Hostile checkpoints and weights


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = manager(str(folder))
    checkpoints.save(1, fragments_of(1), state_of(1))
    checkpoints.wait()
    checkpoints.close()
    return next(folder.iterdir())


def forge(checkpoint, change):
    """Rewrite the manifest; a hostile writer makes everything else fit."""
    path = checkpoint / MANIFEST
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_bytes(canonical_json(raw))


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "s3://other/bucket", "a/b", "..", ""])
def test_a_manifest_may_name_only_files_of_its_own_folder(checkpoint, name):
    forge(checkpoint, lambda raw: raw["parts"][0].update(name=name))
    with pytest.raises(CheckpointError, match="damaged manifest"):
        SavedCheckpoint.open(str(checkpoint), ObjectStore())


@pytest.mark.parametrize("size", [-1, "9", 1.5, None, True])
def test_a_manifest_holds_whole_numbers(checkpoint, size):
    forge(checkpoint, lambda raw: raw["parts"][0].update(size=size))
    with pytest.raises(CheckpointError, match="damaged manifest"):
        SavedCheckpoint.open(str(checkpoint), ObjectStore())


def forge_part(checkpoint, change):
    """Rewrite the header of the part, and the manifest to match."""
    (part,) = checkpoint.glob("part-*")
    data = part.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    part.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    found = vars(hash_file(part.name, [part.read_bytes()]))
    forge(checkpoint, lambda raw: raw["parts"][0].update(found))


def huge_shape(header):
    shapes = json.loads(header["__metadata__"]["shapes"])
    header["__metadata__"]["shapes"] = json.dumps({name: [1 << 50] for name in shapes})


def outside(header):
    key = next(key for key in header if key != "__metadata__")
    header[key]["data_offsets"] = [1 << 40, (1 << 40) + 4 * header[key]["shape"][0]]


def before_the_data(header):
    key = next(key for key in header if key != "__metadata__")
    header[key]["data_offsets"] = [-64, -64 + 4 * header[key]["shape"][0]]


@pytest.mark.parametrize("change", [huge_shape, outside, before_the_data])
def test_a_part_that_lies_about_its_tensors_is_refused(checkpoint, change):
    forge_part(checkpoint, change)
    saved = SavedCheckpoint.open(str(checkpoint), ObjectStore())
    assert not saved.verify()
    with pytest.raises(CheckpointError):
        all_tensors(saved)
    saved.close()


def all_tensors(saved):
    return {name: saved.read_tensor(name) for name in saved.shapes()}


def test_headers_larger_than_the_file_are_refused(checkpoint, tmp_path):
    (part,) = checkpoint.glob("part-*")
    part.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    forge(checkpoint, lambda raw: raw["parts"][0].update(vars(hash_file(part.name, [part.read_bytes()]))))
    saved = SavedCheckpoint.open(str(checkpoint), ObjectStore())
    with pytest.raises(CheckpointError, match="header of this part is damaged"):
        saved.shapes()
    saved.close()
    folder = tmp_path / "model"
    folder.mkdir()
    for data in ((1 << 62).to_bytes(8, "little") + b"{}", (90 << 20).to_bytes(8, "little") + b"{}", b"", b"\0"):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(FrozenWeightsError):
            read_entries(str(folder), ObjectStore())


def test_deeply_nested_json_is_one_clear_error(checkpoint, tmp_path):
    (checkpoint / MANIFEST).write_text(DEEP)
    with pytest.raises(CheckpointError):
        SavedCheckpoint.open(str(checkpoint), ObjectStore())
    (tmp_path / "run.json").write_text(DEEP)
    with pytest.raises(TrainerError, match="damaged"):
        read_run(str(tmp_path), ObjectStore())
    with pytest.raises(TrainerError, match="damaged"):
        LeaseState.from_bytes(DEEP.encode(), "lease.json")


# Hostile configuration


def test_a_run_name_cannot_leave_its_folder(tmp_path):
    from isthmus.cluster.config import JobConfig
    from isthmus.trainer.errors import ConfigError

    for name in ("../other", "/etc", "a/b", "a\nb", ".."):
        with pytest.raises(ConfigError, match=r"run\.name"):
            load_config(ROOT / "recipes" / "tiny.yaml", [f"run.name={json.dumps(name)}"], JobConfig)


@pytest.mark.parametrize(
    "text", ["a: !!python/name:os.system", "a: !!python/object/new:os.system [x]", "a: !include /etc/passwd"]
)
def test_tags_in_yaml_name_no_code(text):
    from isthmus.trainer.errors import ConfigError

    with pytest.raises(ConfigError):
        parse_yaml(text, "hostile.yaml")


# Secrets


def test_no_secret_is_in_what_a_run_writes(tmp_path, monkeypatch, caplog):
    from isthmus.cluster.config import JobConfig
    from isthmus.cluster.submission.job import job_environment

    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    caplog.set_level(0)
    config = load_config(ROOT / "recipes" / "tiny.yaml", [f"run.url={tmp_path}"], JobConfig)
    run = RunStore.open(config, ObjectStore(), owner="me")
    run.close()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "name: tiny" in written
    assert SECRET not in written + caplog.text + to_yaml(config) + json.dumps(job_environment(config))


def command_line(pid):
    """Arguments of a process that has just been started, as soon as it has replaced its parent's image."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        shown = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "isthmus.trainer.checkpoint.upload_process" in shown:
            return shown
        time.sleep(0.01)
    raise AssertionError(f"no command line: {shown}")


def test_no_secret_is_on_a_command_line(tmp_path, monkeypatch):
    """`ps` shows arguments to everyone; what the writer process needs goes through its pipe."""
    from isthmus.trainer.checkpoint.upload_process import SnapshotMemory, UploadProcess

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    memory = SnapshotMemory(64)
    writer = UploadProcess(ObjectStore(), memory)
    try:
        shown = command_line(writer._process.pid)
    finally:
        writer.kill()
        writer.close()
        number = memory.fd
        memory.close()
    assert shown[-4:-1] == ["isthmus.trainer.checkpoint.upload_process", str(number), "64"]
    assert SECRET not in " ".join(shown)


# Open ports


def test_the_local_s3_server_listens_on_loopback_alone_and_its_key_is_private(tmp_path):
    from isthmus.demo.local_s3 import _keys

    access, secret = _keys(tmp_path)
    assert (tmp_path / "s3.json").stat().st_mode & 0o077 == 0
    assert len(secret) >= 32
    text = (ROOT / "demo" / "local_s3.py").read_text()
    assert "-ip=127.0.0.1" in text
    assert "-ip.bind=127.0.0.1" in text
    command = re.findall(r"command \+?= (\[.*?\])", text, re.DOTALL)
    assert not any("secret" in part or "access_key" in part for part in command)
    assert access != secret


def test_the_token_is_on_and_fresh_for_an_embedded_ray(tmp_path):
    variables = "os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN']"
    imports = "import os; from isthmus.cluster.ray_nodes.auth import use_tokens"
    program = f"{imports}; use_tokens(create=True); print({variables})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    settings = {"env": environment, "cwd": ROOT, "text": True, "timeout": 60}
    answers = [subprocess.check_output([sys.executable, "-c", program], **settings).split() for _ in range(2)]
    assert [mode for mode, _ in answers] == ["token", "token"]
    assert len({token for _, token in answers}) == 2
    assert all(len(token) == 64 for _, token in answers)


def test_no_address_of_all_interfaces_is_in_the_code():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::")
    ]
    assert not found


# The page itself


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    paths = [ROOT / path for path in re.findall(r"`(tests/[\w/]+\.py)`", page)]
    assert len(paths) > 8
    assert not [path for path in paths if not path.exists()]
    everywhere = "\n".join(path.read_text() for path in {*paths, Path(__file__)})
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[3])}
    assert len(named) > 20
    assert not [name for name in named if not re.search(rf"def test_\w*{name}", everywhere)]
