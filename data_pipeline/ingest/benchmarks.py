"""Evaluation sets as they are published: one row per image, with all its captions or questions.

Rows have the fields of a JSONL source. An image's questions are a list of objects: question, question_id, answers.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from isthmus.data_pipeline.errors import DataError

Rows = list[dict[str, Any]]


def karpathy_rows(document: Any, split: str) -> Rows:
    """Return the images of one split of Karpathy's files (dataset_coco.json, dataset_flickr30k.json).

    Raises:
        DataError: no image belongs to the split.
    """
    images = document["images"]
    rows = [
        {
            "path": "/".join(filter(None, [image.get("filepath"), image["filename"]])),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
            "image_id": image.get("cocoid", image["imgid"]),
        }
        for image in images
        if image["split"] == split
    ]
    if not rows:
        found = ", ".join(sorted({str(image["split"]) for image in images}))
        raise DataError(f"no image has split {split}; --split is one of: {found}")
    return rows


def vqa_rows(questions: Any, annotations: Any) -> Rows:
    """Return the images of a questions file of VQA or OK-VQA with the people's answers from its annotations file.

    A question that the annotations lack has no answers.

    Raises:
        DataError: the annotations answer none of the questions.
    """
    answers = {
        entry["question_id"]: [answer["answer"] for answer in entry["answers"]] for entry in annotations["annotations"]
    }
    by_image: defaultdict[Any, Rows] = defaultdict(list)
    for entry in questions["questions"]:
        number = entry["question_id"]
        by_image[entry["image_id"]].append(_question(number, entry, answers.get(number, [])))
    if not any(question["answers"] for several in by_image.values() for question in several):
        raise DataError("the file of --annotations answers none of the questions; give the annotations for this split")
    name = f"COCO_{questions['data_subtype']}_{{:012d}}.jpg"
    return [_row(name.format(int(image)), image, several) for image, several in by_image.items()]


def gqa_rows(document: Mapping[str, Any]) -> Rows:
    """Return the images of a questions file of GQA, each question with its one answer."""
    by_image: defaultdict[str, Rows] = defaultdict(list)
    for number, entry in document.items():
        by_image[entry["imageId"]].append(_question(number, entry, [entry["answer"]] if "answer" in entry else []))
    return [_row(f"{image}.jpg", image, several) for image, several in by_image.items()]


def _question(number: Any, entry: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
    return {"question": entry["question"], "question_id": number, "answers": answers}


def _row(path: str, image: Any, questions: Rows) -> dict[str, Any]:
    return {"path": path, "image_id": image, "questions": questions}
