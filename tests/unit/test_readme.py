"""README and docs name tests, commands, options, keys, recipes, files and pages that exist."""

import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import typer.main
import yaml
from typer.exceptions import TyperException

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


SCHEMA = JobConfig.model_json_schema()
KEY = rf"(?:{'|'.join(SCHEMA['properties'])})\.[a-z][a-z0-9_.]*[a-z0-9]"
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    folders = "model|trainer|data_pipeline|bootstrap|cluster|demo|tests|benchmarks|ds_configs|recipes"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+\.(?:py|json|yaml|txt)", (ROOT / page).read_text()):
        assert "NAME" in path or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{page}: {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text()):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{page}: {path}::{name}"


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
def test_commands_parse(page):
    code = code_of(page)
    lines = re.findall(r"isthmus ([a-z][^`#&|;\n]*)", code)
    assert len(lines) > 10 or page not in {"README.md", "docs/operators.md"}
    in_blocks = set(re.findall(r"^isthmus ([a-z][^`#&|;\n]*)", code, re.MULTILINE))
    for line in lines:
        problem = problem_of_command(line, is_complete=line in in_blocks and "..." not in line)
        assert problem is None, f"{page}: isthmus {line}: {problem}"


def problem_of_command(line, *, is_complete):
    """Return why a command line is none; one in a sentence may lack arguments, and no file that it names is here."""
    words, command = shlex.split(line), typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no verb {words[0]}"
        command = command.commands[words.pop(0)]
    if not is_complete and (not words or hasattr(command, "commands")):
        return None
    try:
        given = command.make_context(command.name, words).params
    except TyperException as error:
        lacks = type(error).__name__ == "MissingParameter" and not is_complete
        return None if lacks or "does not exist" in str(error) else str(error)
    overrides = given.get("overrides") or () if command.name != "run" else ()  # a bootstrap has another schema
    keys = [*(text.partition("=")[0] for text in overrides), *(given.get("allow_change") or ())]
    unknown = [key for key in keys if not key_exists(SCHEMA, SCHEMA, key.split("."))]
    return f"no key {unknown[0]}" if unknown else None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("trian x.yaml", "no verb trian"),
        ("submit x.yaml --watched", "No such option"),
        ("submit x.yaml data.lane=4", "no key data.lane"),
        ("logs", "Missing parameter"),
        ("export RUN FOLDER --to pth", "hf"),
    ],
)
def test_a_wrong_command_is_found(line, problem):
    assert problem in (problem_of_command(line, is_complete=True) or "")


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
    for key in re.findall(rf"`({KEY})\b", (ROOT / page).read_text()):
        assert key == "run.json" or key_exists(SCHEMA, SCHEMA, key.split(".")), f"{page}: {key}"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("migrating-from-lavis.md")])
def test_defaults_and_values_are_those_of_the_schema(page):
    """`key` (8) names a default; `key: value` and `key=value`, in a recipe or an override, are allowed."""
    text = (ROOT / page).read_text()
    for key, default in re.findall(rf"`({KEY})` \((\d[\d.]*)\)", text):
        assert default_of(key) == float(default), f"{page}: {key}"
    for key, value in re.findall(rf"`({KEY})(?:: |=)(\[[^`]*\]|[^\s`{{]+)", text):
        config = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            config = {part: config}
        problems = [error.message for error in VALUES.iter_errors(config)]
        assert value.isupper() or not problems, f"{page}: {key}: {value}: {problems}"


def default_of(key):
    """Return the default of a key."""
    model, parts = JobConfig, key.split(".")
    for part in parts[:-1]:
        model = model.model_fields[part].annotation
    return model.model_fields[parts[-1]].default


def optional(node):
    """Return a JSON schema in which no key is required."""
    if isinstance(node, dict):
        return {name: optional(value) for name, value in node.items() if name != "required" or isinstance(value, dict)}
    return [optional(item) for item in node] if isinstance(node, list) else node


VALUES = jsonschema.Draft202012Validator(optional(SCHEMA))


@pytest.mark.parametrize("page", PAGES)
def test_variables_exist(page):
    sources = "".join(path.read_text() for folder in ("cluster", "trainer") for path in (ROOT / folder).rglob("*.py"))
    for name in re.findall(r"\bISTHMUS_[A-Z_]+\b", (ROOT / page).read_text()):
        assert f'"{name}"' in sources, f"{page}: {name}"


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
