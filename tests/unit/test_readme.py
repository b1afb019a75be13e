"""README and docs name tests, commands, options, keys, recipes, files and pages that exist."""

import re
from pathlib import Path

import pytest
import typer.main

from isthmus.cluster.cli.main import app
from isthmus.cluster.config import JobConfig

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_promise_has_a_test_that_exists():
    rows = re.findall(r"^\| \*\*(P\d)\*\* .*?\| (.*) \|$", README, re.MULTILINE)
    assert [promise for promise, _ in rows] == [f"P{number}" for number in range(1, 9)]
    for promise, kept_by in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", kept_by)
        assert tests, promise
        for path, name in tests:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{promise}: {path}::{name}"


def test_the_architecture_names_every_folder():
    page = (ROOT / "docs/architecture.md").read_text()
    for package in ("data_pipeline", "model", "trainer", "bootstrap", "cluster"):
        section = page.split(f"\n## {package}: ")[1].split("\n## ")[0]
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert set(re.findall(r"^- `(\w+)/`", section, re.MULTILINE)) - {package} == folders
    beside = re.findall(r"`([\w/]+)/`", page.split("\n## Beside the packages\n")[1].split("\n## ")[0])
    assert {"demo", "recipes", "ds_configs", "src", "tests", "benchmarks", "docker"} <= set(beside)
    assert [folder for folder in beside if not (ROOT / folder).is_dir()] == []


def test_the_walks_lead_to_lines_that_exist():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Finding your way")[1].split("\n## ")[0]
    walks = section.split("\n**")[1:]
    assert len(walks) == 3
    for walk in walks:
        openings = re.findall(r"^\d\. `([\w./-]+)`: `(.+)`$", walk, re.MULTILINE)
        assert 1 <= len(openings) <= 3
        assert openings[0][0] in README
        for path, text in openings:
            assert text in (ROOT / path).read_text(), f"{path}: {text}"


PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    folders = "model|trainer|data_pipeline|bootstrap|cluster|demo|tests|benchmarks|ds_configs|recipes"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+\.(?:py|json|yaml|txt)", (ROOT / page).read_text()):
        assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_recipes_and_benchmarks_exist():
    names = re.findall(r"`((?:blip2|siglip2)-[\w.-]+)`", README)
    assert len(set(names)) == 8
    assert all((ROOT / "recipes" / f"{name}.yaml").exists() for name in names)
    assert all((ROOT / path).exists() for path in re.findall(r"`(benchmarks/\w+\.py)`", README))


def code_of(page):
    """Return the code blocks and code spans of a page, continued lines joined."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`|^ {4}[^\n]+$", text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_verbs_and_options_exist(page):
    known = typer.main.get_command(app)
    lines = re.findall(r"isthmus ([a-z][^`#&|;\n]*)", code_of(page))
    assert len(lines) > 10 or page not in {"README.md", "docs/operators.md"}
    for line in lines:
        words, command = line.split(), known
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page}: isthmus {line}"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= options, f"{page}: isthmus {line}"


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_modules_exist(page):
    code = code_of(page)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", code)) <= targets
    for module in re.findall(r"python -m ((?:isthmus|benchmarks|tests)[\w.]*)", code):
        path = ROOT / module.removeprefix("isthmus.").replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), f"{page}: {module}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if not page.endswith(("migrating-from-lavis.md", "decisions.md"))]
)
def test_configuration_keys_exist(page):
    schema = JobConfig.model_json_schema()
    sections = "|".join(schema["properties"])
    for key in re.findall(rf"`((?:{sections})\.[a-z][a-z0-9_.]*[a-z0-9])\b", (ROOT / page).read_text()):
        assert key == "run.json" or key_exists(schema, schema, key.split(".")), f"{page}: {key}"


def key_exists(schema, node, parts):
    """Return whether a key, given as its parts, lies below a node of a JSON schema."""
    if not parts:
        return True
    if "$ref" in node:
        return key_exists(schema, schema["$defs"][node["$ref"].rpartition("/")[2]], parts)
    found = node.get("properties", {}).get(parts[0])
    options = (*node.get("anyOf", ()), *node.get("oneOf", ()))
    return any(key_exists(schema, option, parts) for option in options) or (
        found is not None and key_exists(schema, found, parts[1:])
    )


def test_the_table_of_recipes_is_what_the_estimate_says():
    rows = re.findall(r"^\| `blip2-.*\|$", README, re.MULTILINE)
    expected = [_estimated(path) for path in sorted((ROOT / "recipes").glob("blip2-*.yaml"), key=_by_paper)]
    assert rows == expected, "the table should be\n" + "\n".join(expected)


def _by_paper(path):
    return ("flan" in path.stem, "vitg" in path.stem, len(path.stem), path.stem)


def _estimated(path):
    from isthmus.cluster.config import JobConfig
    from isthmus.trainer.config.loading import load_config
    from isthmus.trainer.estimate import report
    from isthmus.trainer.estimate.architectures import load_parts
    from isthmus.trainer.estimate.hardware import Assumptions, find_gpu
    from isthmus.trainer.estimate.step import Cluster, estimate_stage

    config = load_config(path, [], JobConfig)
    parts, _ = load_parts(config)
    cells = [f"`{path.stem}`", " / ".join(f"{config.stage(stage).global_batch_size:,}" for stage in config.stages)]
    for gpu, gpus in (("h100", 8), ("a100-40g", 16)):
        cluster = Cluster(find_gpu(gpu), gpus, 8)
        found = [
            report.as_json(estimate_stage(config, stage, parts, cluster, Assumptions()), None)
            for stage in config.stages
        ]
        cells.append(" / ".join(f"{stage['memory']['total'] / 1e9:.1f}" for stage in found))
        cells.append(f"{sum(stage['days'] for stage in found):.1f}")
    return f"| {' | '.join(cells)} |"
