"""YAML file -> `key.sub=value` overrides -> checked, frozen configuration with a content hash.

All problems of a file are reported together, each with its key, its value, what is allowed and, for a misspelt key,
the nearest known one. YAML aliases, duplicate keys and custom tags are refused: a recipe is plain data.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
RECIPES = Path(__file__).parents[2] / "recipes"
"""The recipes that the installed package brings along."""
PLACEHOLDERS: tuple[Any, ...] = (1, "1", "fp32", False, [1, 1], {})
ConfigT = TypeVar("ConfigT", bound=TrainConfig)
Path_ = tuple[int | str, ...]


class Change(NamedTuple):
    """One key whose value differs between two configurations; None: absent on that side."""

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
            f"{path}: cannot be read ({error}); give a recipe file, or one that isthmus brings along: {packaged}"
        ) from error
    raw = parse_yaml(text, str(path))
    for override in overrides:
        _apply_override(raw, override)
    _inline_templates(raw)
    return check_config(raw, kind, str(path))


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
        ConfigError: the text is no such mapping; names source, line and column.
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
        problems = _problems(raw, kind, error)
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
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands twice", key_node.start_mark
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
        raise ConfigError(f"override {override!r}: the recipe has no place {key} to set") from error


def _problems(raw: dict[str, Any], kind: type[TrainConfig], error: ValidationError) -> list[str]:
    """Return one line per problem; cross-field rules are checked even where single fields are wrong."""
    details = error.errors(include_url=False)
    fields = [detail for detail in details if not _is_cross_field(detail)]
    problems = [_describe(detail, kind) for detail in fields]
    crossed = details if not fields else _cross_field_details(raw, kind, fields)
    guessed = [_dotted(detail["loc"]) for detail in fields if detail["type"] != "extra_forbidden"]
    about_a_guess = re.compile("|".join(rf"(?<![\w.]){re.escape(key)}(?![\w.])" for key in guessed) or "(?!)")
    for detail in crossed:
        lines = detail["msg"].removeprefix("Value error, ").splitlines() if _is_cross_field(detail) else []
        problems += [line for line in lines if not about_a_guess.search(line)]
    return problems


def _cross_field_details(
    raw: dict[str, Any], kind: type[TrainConfig], fields: list[ErrorDetails]
) -> list[ErrorDetails]:
    """Return the cross-field errors of the data with its wrong fields taken out or replaced by something valid."""
    mended = json.loads(json.dumps(raw, default=str))
    for detail in fields:
        _delete(mended, detail["loc"])
    for _ in range(len(fields) * len(PLACEHOLDERS) + 1):
        try:
            kind.model_validate(mended)
        except ValidationError as error:
            details = error.errors(include_url=False)
            wrong = [detail for detail in details if not _is_cross_field(detail)]
            if not wrong:
                return details
            for detail in wrong:
                _try_next_placeholder(mended, detail["loc"])
        else:
            break
    return []


def _try_next_placeholder(data: Any, loc: Path_) -> None:
    """Put the placeholder after the present one at `loc`; the first where there is none."""
    *parents, last = loc
    node = data
    for part in parents:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(node, dict):
        tried = [i for i, value in enumerate(PLACEHOLDERS) if last in node and node[last] is value]
        node[last] = PLACEHOLDERS[(tried[0] + 1 if tried else 0) % len(PLACEHOLDERS)]


def _delete(data: Any, loc: Path_) -> None:
    *parents, last = loc
    try:
        for part in parents:
            data = data[part]
        del data[last]
    except (KeyError, IndexError, TypeError):
        return


def _is_cross_field(detail: ErrorDetails) -> bool:
    return detail["type"] == "value_error" and len(detail["loc"]) <= 1 and isinstance(detail["input"], dict)


def _describe(detail: ErrorDetails, kind: type[TrainConfig]) -> str:
    """Return `key: what is wrong; what to do` for one field error."""
    key = _dotted(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(key, kind)}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default, set it"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {detail['input']!r} is wrong: {message[:1].lower()}{message[1:]}"


def _suggestion(key: str, kind: type[TrainConfig]) -> str:
    """Return `; did you mean ...?` with the nearest known key, or the keys known at that place."""
    known = list(_known_keys(kind))
    parent, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    near = near or [name for name in known if name.rpartition(".")[2] == last][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(name.rpartition('.')[2] for name in siblings)}" if siblings else ""


def _known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration model; items of lists count as index 0."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        for part in _models_in(field.annotation):
            in_list = "tuple" in str(field.annotation)
            yield from _known_keys(part, f"{prefix}{name}.{'0.' if in_list else ''}")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _dotted(loc: Path_) -> str:
    return ".".join(str(part) for part in loc)


def _flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
