"""`isthmus data`: from a list of images to a data set that is indexed, verified and shown."""

import json

import pytest
from typer.testing import CliRunner

from isthmus.cluster.cli.main import app
from tests.corpus import picture

pytestmark = pytest.mark.unit


def isthmus_data(*arguments):
    """Run a verb; return what it printed."""
    done = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    rows = [{"path": "a.jpg", "caption": f"picture {i}"} for i in range(3)] + [{"path": "gone.jpg", "caption": "x"}]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_data_set_is_made_and_shown_and_nothing_appears_in_the_working_directory(source, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shards, manifest, sheet = tmp_path / "shards", tmp_path / "manifest", tmp_path / "pictures" / "sheet.png"
    made = json.loads(isthmus_data("ingest", source, shards, "--processes", 1, "--json"))
    assert (made["samples"], made["dropped"]) == (3, {"image_missing": 1})
    assert made["first_drops"][0]["where"] == f"{source}:4"
    indexed = json.loads(isthmus_data("index", shards, "--out", manifest, "--processes", 1, "--json"))
    assert (indexed["samples"], indexed["dropped"]) == (3, {})
    (listed,) = json.loads(isthmus_data("ls", manifest, "--json"))
    assert (listed["url"], listed["samples"]) == (f"{shards}/shard-000000.tar", 3)
    isthmus_data("verify", manifest, "--deep", "--processes", 1)
    shown = json.loads(isthmus_data("show", manifest, "--json"))
    assert (shown["samples"], shown["caption_words"]["2-3"]) == (3, 3)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    printed = isthmus_data("show", manifest, "--sheet", sheet)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    lines = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100
    assert ["samples", "3", "in", "1", "shards,", "1", "chunks"] in [line.split() for line in lines]
    assert ["2-3", "3", "#" * 40] in [line.split() for line in lines]


def test_people_are_told_what_was_dropped_and_where_it_is_recorded(source, tmp_path):
    printed = isthmus_data("ingest", source, tmp_path / "shards", "--processes", 1)
    assert "samples: 3" in printed
    assert "image_missing" in printed
    assert f"{tmp_path}/shards/dropped.jsonl" in printed


def test_a_policy_that_does_not_exist_names_those_that_do(source, tmp_path):
    done = CliRunner().invoke(app, ["data", "index", str(tmp_path), "--out", str(tmp_path / "m"), "--on", "typo=drop"])
    assert "faults: all, truncated" in str(done.exception)
