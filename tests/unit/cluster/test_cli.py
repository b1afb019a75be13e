"""The command line: light to start, one red line for expected errors, tracebacks for defects."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from typer.main import get_command
from typer.testing import CliRunner

from isthmus.cluster.cli.main import app
from isthmus.cluster.cli.options import open_store
from isthmus.cluster.errors import EXPECTED_ERRORS
from tests.unit.trainer.test_config_loading import RECIPE

pytestmark = pytest.mark.unit

HEAVY = ("torch", "ray", "deepspeed", "transformers", "boto3", "numpy", "matplotlib")


def isthmus(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus.cluster.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['isthmus', '--help']\n"
        "from isthmus.cluster.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules)); print('heavy:', heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "Usage: isthmus" in done.stdout
    assert "heavy: []" in done.stderr


def test_a_wrong_recipe_is_one_answer_with_exit_code_2_and_no_traceback(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = ("config", "show", str(recipe), "data.lane=4", "stage2.steps=many", "stage1.global_batch_size=12")
    done = isthmus(*arguments)
    assert done.returncode == 2
    assert "3 problems" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in isthmus(*arguments, "--debug").stderr


def test_show_prints_a_resolved_recipe_that_reads_back_with_the_same_hash(tmp_path: Path):
    recipe, resolved = tmp_path / "recipe.yaml", tmp_path / "resolved.yaml"
    recipe.write_text(RECIPE)
    resolved.write_text(isthmus("config", "show", str(recipe), "stage1.steps=77").stdout)
    shown = json.loads(isthmus("config", "show", str(resolved), "--json").stdout)
    assert shown["config"]["stage1"]["steps"] == 77
    assert shown["hash"] in resolved.read_text()
    assert isthmus("config", "diff", str(recipe), str(resolved)).stdout == "stage1.steps: 10 -> 77\n"


def test_the_schema_describes_every_section():
    schema = json.loads(isthmus("config", "schema").stdout)
    assert {"run", "data", "model", "stage1", "stage2", "cluster"} <= schema["properties"].keys()
    assert schema["properties"]["run"]["description"]


def test_an_unknown_verb_is_a_usage_error():
    done = isthmus("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr


def test_neither_the_driver_nor_the_command_line_load_what_trains():
    code = (
        "import sys, isthmus.cluster.driver, isthmus.cluster.cli.main\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


WITHOUT_A_STORE = {"train", "submit", "ls", "logs", "stop", "import", "push", "preflight", "estimate", "manifests"}
"""Verbs whose store is that of the recipe or of the job, or that read local files only."""


WITHOUT_A_STORE_OF_THEIRS = {"config show", "config schema", "assets tiny", "bootstrap run"}
"""The same of groups of verbs."""


def test_every_verb_that_takes_a_url_takes_the_stores_endpoint_and_region():
    verbs = {}
    for name, command in get_command(app).commands.items():
        verbs |= {f"{name} {verb}": leaf for verb, leaf in getattr(command, "commands", {"": command}).items()}
    lacking = {
        name.strip()
        for name, command in verbs.items()
        if not {"--endpoint-url", "--region"} <= {option for parameter in command.params for option in parameter.opts}
    }
    assert {name for name in lacking if " " not in name} == WITHOUT_A_STORE
    assert {name for name in lacking if " " in name} == WITHOUT_A_STORE_OF_THEIRS
    described = {name: [p.help or "" for p in verbs.get(name, verbs.get(f"{name} ")).params] for name in lacking}
    assert [name for name, texts in described.items() if any("URL" in text for text in texts)] == []


def test_the_options_reach_the_store():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "moto")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "moto")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            options = ["--endpoint-url", f"http://{host}:{port}", "--region", "us-east-1"]
            open_store(*options[1::2]).make_bucket("s3://bucket")
            url = "s3://bucket/runs"
            assert "contains no runs" in CliRunner().invoke(app, ["runs", "ls", url, *options]).output
            for verb in ("runs show", "report", "checkpoints ls", "status", "resume", "doctor", "eval"):
                more = ["s3://bucket/data"] if verb == "eval" else []
                result = CliRunner().invoke(app, [*verb.split(), f"{url}/demo", *more, *options])
                assert isinstance(result.exception, EXPECTED_ERRORS), (verb, result)
                assert re.search("absent|not found|contains no|holds neither", str(result.exception)), (
                    verb,
                    result.exception,
                )
        finally:
            server.stop()


@pytest.mark.parametrize("verb", ["runs ls", "runs show", "checkpoints ls", "status"])
def test_a_store_that_does_not_answer_is_asked_twice_not_eight_times(verb, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    asked.append(connection)
                    connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        options = ["--endpoint-url", f"http://127.0.0.1:{server.getsockname()[1]}", "--region", "us-east-1"]
        result = CliRunner().invoke(app, [*verb.split(), "s3://bucket/runs", *options])
    assert isinstance(result.exception, EXPECTED_ERRORS), result
    assert 1 <= len(asked) <= 4
