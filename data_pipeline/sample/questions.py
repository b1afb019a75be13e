"""Questions about an image with human answers: a field of a sample's `.json` in evaluation sets."""

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.data_pipeline.sample.captions import Bytes, parse_json

FIELD = "questions"


@dataclass(frozen=True)
class Question:
    """One question."""

    number: str
    """Its id in the published file."""
    text: str
    answers: tuple[str, ...]
    """What people answered, one each; None if unknown."""


def read_questions(members: Mapping[str, Bytes]) -> list[Question]:
    """Return the questions in a sample's member `json`; of a sample of captions none.

    Raises:
        BadSample: it is not JSON.
    """
    document = parse_json(members["json"]) if "json" in members else {}
    return questions_of(document.get(FIELD) if isinstance(document, dict) else None)


def questions_of(value: object) -> list[Question]:
    """Return the questions of a list of objects with `question`, `question_id`, `answers`; anything else has none."""
    entries = value if isinstance(value, list) else []
    return [
        Question(str(entry.get("question_id")), entry["question"], _texts(entry.get("answers")))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("question"), str)
    ]


def _texts(value: object) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()
