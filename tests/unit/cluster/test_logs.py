"""Log lines are JSON with the place; what Ray puts around them does not hide them."""

import io
import json
import logging

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
    logs.bind_context(**dict.fromkeys(logs.CONTEXT_KEYS))


def test_a_line_names_run_stage_step_and_rank(stream):
    logs.bind_context(stage="stage1", step=120, rank=3)
    logging.getLogger("isthmus.trainer.monitoring.monitor").info("loss %.1f", 0.5)
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info", "run": "demo", "stage": "stage1", "step": 120, "rank": 3,
        "logger": "isthmus.trainer.monitoring.monitor", "message": "loss 0.5",
    }  # fmt: skip


def test_none_removes_a_place(stream):
    logs.bind_context(step=1)
    logs.bind_context(step=None)
    logging.getLogger("x").info("y")
    assert "step" not in json.loads(stream.getvalue())


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


@pytest.mark.parametrize("text", ["plain", '{"time": cut', "", '[1] {"time"'])
def test_other_lines_are_plain_text(text):
    assert logs.parse_line(text) is None
