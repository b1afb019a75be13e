"""Log lines are JSON with their context; found behind what Ray puts before them."""

import io
import json
import logging
import os

import pytest

from isthmus.cluster import logs

pytestmark = pytest.mark.unit


@pytest.fixture
def stream():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    logs.configure_logging(stream, run="demo")
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logs.bind_context(**dict.fromkeys(("run", "stage", "step", "rank", "node")))


def test_a_line_names_run_stage_step_and_rank(stream):
    logs.bind_context(stage="stage1", step=120, rank=3)
    logging.getLogger("isthmus.trainer.monitoring.monitor").info("loss %.1f", 0.5)
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info", "run": "demo", "stage": "stage1", "step": 120, "rank": 3,
        "logger": "isthmus.trainer.monitoring.monitor", "message": "loss 0.5",
    }  # fmt: skip


def test_none_removes_a_key(stream):
    logs.bind_context(step=1)
    logs.bind_context(step=None)
    logging.getLogger("x").info("y")
    assert "step" not in json.loads(stream.getvalue())


def test_a_context_that_another_thread_is_formatting_does_not_change(stream):
    before = logs._context
    logs.bind_context(step=1)
    logs.bind_context(node="n1", step=None)
    assert "step" not in before
    assert "node" not in before


def test_a_traceback_is_one_line(stream):
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: two" in json.loads(stream.getvalue())["traceback"]


def test_lines_are_found_behind_rays_prefix(stream):
    logging.getLogger("x").warning("low")
    text = "\x1b[36m(train-3 pid=17, ip=10.0.0.1)\x1b[0m " + stream.getvalue().strip()
    line = logs.parse_line(text)
    assert line is not None
    assert logs.render_line(line).endswith(" WARNING low")


def test_a_jobs_log_is_bounded_and_keeps_its_newest_whole_lines(tmp_path):
    path = tmp_path / "job.log"
    with path.open("w") as file, logs.bounded_file(file.fileno(), 10_000, check_seconds=0.01):
        other = os.dup(file.fileno())  # as Ray's thread that copies the workers' lines
        for number in range(5_000):
            os.write(other, f"line {number:05d} of a worker\n".encode())
            if number % 500 == 0:
                logs.drop_older_half(file.fileno(), 10_000)
        logs.drop_older_half(file.fileno(), 10_000)
        os.close(other)
    lines = path.read_bytes().splitlines()
    assert path.stat().st_size <= 10_000
    assert lines[-1] == b"line 04999 of a worker"
    assert all(line.startswith(b"line ") and len(line) == len(lines[-1]) for line in lines)


def test_a_pipe_and_a_small_log_are_left_alone(tmp_path):
    reader, writer = os.pipe()
    with logs.bounded_file(writer, 1):
        os.write(writer, b"all")
    assert os.read(reader, 10) == b"all"
    path = tmp_path / "small"
    with path.open("w") as file:
        file.write("all of it")
        file.flush()
        logs.drop_older_half(file.fileno(), 10)
    assert path.read_text() == "all of it"


@pytest.mark.parametrize("text", ["plain", '{"time": cut', "", '[1] {"time"'])
def test_other_lines_are_plain_text(text):
    assert logs.parse_line(text) is None
