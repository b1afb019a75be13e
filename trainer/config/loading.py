"""YAML file -> `key.sub=value` overrides -> checked, frozen configuration with a content hash.

YAML aliases, duplicate keys and custom tags are refused: a recipe is plain data.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from isthmus.trainer.config.explain import explain
from isthmus.trainer.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
RECIPES = Path(__file__).parents[2] / "recipes"
"""The recipes that the installed package brings along."""
ConfigT = TypeVar("ConfigT", bound=BaseModel)


class Change(NamedTuple):
    """One key whose value differs between two configurations; None if absent on that side."""

    key: str
    old: Any
    new: Any


def load_config(path: str | Path, overrides: Sequence[str], kind: type[ConfigT]) -> ConfigT:
    """Read a recipe file, apply overrides such as `data.lanes=8`, and return the checked configuration.

    Raises:
        ConfigError: the file cannot be read, or lists every problem of its content.
    """
    file = _find_recipe(Path(path))
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; a recipe is a short YAML file")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        packaged = ", ".join(sorted(recipe.name for recipe in RECIPES.glob("*.yaml")))
        raise ConfigError(
            f"{path}: cannot be read ({error}); give a recipe file, or the name of a packaged one: {packaged}"
        ) from error
    raw = parse_yaml(text, str(path))
    for override in overrides:
        _apply_override(raw, override)
    _inline_templates(raw)
    return check_config(raw, kind, str(path))


def config_from(values: dict[str, Any], overrides: Sequence[str], kind: type[ConfigT], source: str) -> ConfigT:
    """Apply overrides to plain values, and return them as a checked configuration.

    Raises:
        ConfigError: lists every problem.
    """
    for override in overrides:
        _apply_override(values, override)
    return check_config(values, kind, source)


def _find_recipe(path: Path) -> Path:
    """Return the file; for a missing NAME.yaml or recipes/NAME.yaml, the packaged recipe of that name."""
    packaged = RECIPES / path.name
    is_name = path.parent in (Path(), Path("recipes"))
    return packaged if is_name and not path.exists() and packaged.is_file() else path


def _inline_templates(raw: dict[str, Any]) -> None:
    """Replace paths of DeepSpeed templates by their content: a path means nothing on the machines of a cluster."""
    for stage in (raw.get("stage1"), raw.get("stage2")):
        if not isinstance(stage, dict):
            continue
        name = stage.get("deepspeed")
        if isinstance(name, str) and name.endswith(".json"):
            try:
                stage["deepspeed"] = json.loads(Path(name).read_text())
            except (OSError, ValueError) as error:
                raise ConfigError(f"deepspeed: {name} is not a readable JSON file: {error}") from error


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a mapping from plain YAML without aliases, duplicate keys or tags.

    Raises:
        ConfigError: the text is not such a mapping; names source, line and column.
    """
    try:
        raw = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader with fewer features
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: not plain YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: holds {type(raw).__name__}, not a mapping of keys such as run, data, model")
    return raw


def check_config(raw: dict[str, Any], kind: type[ConfigT], source: str) -> ConfigT:
    """Validate plain data as a configuration.

    Raises:
        ConfigError: every problem, field errors and cross-field errors together.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = explain(raw, kind, error)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


def config_hash(config: BaseModel) -> str:
    """Return the sha256 (hex) over the canonical JSON of a configuration."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(config: BaseModel) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def diff_configs(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return the dotted keys whose values differ between two resolved configurations, in sorted order."""
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    keys = sorted(flat_old.keys() | flat_new.keys())
    changes = (Change(key, flat_old.get(key), flat_new.get(key)) for key in keys)
    return [change for change in changes if change.old != change.new]


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (they make exponential documents) and with an error for a duplicate key."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not allowed; write the value in full", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} appears twice", key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in nested plain data, making mappings on the way."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: not of the form key.sub=value, such as stage1.steps=100")
    try:
        value = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader with fewer features
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    node: Any = raw
    try:
        for part in parents:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]
        node[last] = value
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"override {override!r}: the recipe has no key {key}") from error


def _flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
