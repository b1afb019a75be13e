"""Explains errors in a configuration, one line per problem: key, value, what is allowed, the nearest known key.

All problems are reported together: rules across fields are checked even where single fields are wrong.
"""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

PLACEHOLDERS: tuple[Any, ...] = (1, "1", "fp32", False, [1, 1], {})
Path_ = tuple[int | str, ...]


def explain(raw: dict[str, Any], kind: type[BaseModel], error: ValidationError) -> list[str]:
    """Return one line per problem of the data."""
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


def _cross_field_details(raw: dict[str, Any], kind: type[BaseModel], fields: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return the cross-field errors of the data with its wrong fields removed or replaced by something valid."""
    patched = json.loads(json.dumps(raw, default=str))
    for detail in fields:
        _delete(patched, detail["loc"])
    for _ in range(len(fields) * len(PLACEHOLDERS) + 1):
        try:
            kind.model_validate(patched)
        except ValidationError as error:
            details = error.errors(include_url=False)
            wrong = [detail for detail in details if not _is_cross_field(detail)]
            if not wrong:
                return details
            for detail in wrong:
                _try_next_placeholder(patched, detail["loc"])
        else:
            break
    return []


def _try_next_placeholder(data: Any, loc: Path_) -> None:
    """Put the placeholder after the present one at `loc`; the first one if there is none."""
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


def _describe(detail: ErrorDetails, kind: type[BaseModel]) -> str:
    """Return `key: what is wrong; what to do` for one field error."""
    key = _dotted(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(key, kind)}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default, set it"
    message = detail["msg"].removeprefix("Value error, ")
    quotes = "; YAML does not read it as text: put it in quotes" if detail["type"] == "string_type" else ""
    return f"{key}: {detail['input']!r} is wrong: {message[:1].lower()}{message[1:]}{quotes}"


def _suggestion(key: str, kind: type[BaseModel]) -> str:
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
