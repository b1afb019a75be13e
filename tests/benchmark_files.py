"""Small evaluation sets in the layouts in which COCO, NoCaps, Flickr30k, VQAv2, OK-VQA and GQA are published."""

import json
from pathlib import Path

from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.ingest.records import Columns
from isthmus.data_pipeline.ingest.shards import ingest
from isthmus.data_pipeline.ingest.sources import open_source
from isthmus.data_pipeline.store.object_store import ObjectStore

DOMAINS = ("in-domain", "near-domain", "out-domain")
INGEST = {
    "coco": ("dataset_coco.json", {"kind": "karpathy", "images": "coco"}),
    "nocaps": ("nocaps_val_4500_captions.json", {"kind": "coco", "images": "nocaps"}),
    "flickr30k": ("dataset_flickr30k.json", {"kind": "karpathy", "images": "flickr30k-images"}),
    "vqav2": (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        {"kind": "vqa", "images": "coco/val2014", "annotations": "v2_mscoco_val2014_annotations.json"},
    ),
    "okvqa": (
        "OpenEnded_mscoco_val2014_questions.json",
        {"kind": "vqa", "images": "coco/val2014", "annotations": "mscoco_val2014_annotations.json"},
    ),
    "gqa": ("testdev_balanced_questions.json", {"kind": "gqa", "images": "gqa"}),
}
"""Task -> published file, and how it is ingested."""


def write_published(folder: Path, pictures: dict[int, bytes], captions: list[list[str]], answers: list[str]) -> None:
    """Write the files of all sets about pictures with these ids, captions and answers."""
    numbers = list(pictures)
    coco = [f"COCO_val2014_{number:012d}.jpg" for number in numbers]
    places = {
        "coco/val2014": coco,
        **{name: [f"{n}.jpg" for n in numbers] for name in ("nocaps", "flickr30k-images", "gqa")},
    }
    for place, names in places.items():
        (folder / place).mkdir(parents=True)
        for name, number in zip(names, numbers, strict=True):
            (folder / place / name).write_bytes(pictures[number])
    sentences = [[{"raw": text, "tokens": text.split()} for text in several] for several in captions]
    _karpathy(folder / "dataset_coco.json", coco, sentences, [{"filepath": "val2014", "cocoid": n} for n in numbers])
    _karpathy(folder / "dataset_flickr30k.json", places["flickr30k-images"], sentences, [{} for _ in numbers])
    _write(folder / "nocaps_val_4500_captions.json", _coco_captions(places["nocaps"], captions, numbers))
    _vqa(folder, "v2_", numbers, answers)
    _vqa(folder, "", numbers, answers)
    _write(
        folder / "testdev_balanced_questions.json",
        {
            f"{2000 + number}": {
                "imageId": str(number),
                "question": "What is it?",
                "answer": answer,
                "isBalanced": True,
            }
            for number, answer in zip(numbers, answers, strict=True)
        },
    )


def prepare(folder: Path, task: str, target: Path) -> Path:
    """Ingest and index one set of `folder`; return its manifest, `target`/task."""
    file, options = INGEST[task]
    places = {name: folder / options[name] for name in ("images", "annotations") if name in options}
    source = open_source(folder / file, options["kind"], places.pop("images"), Columns(), **places)
    store, shards = ObjectStore(), target / "shards" / task
    ingest(source, str(shards), store, map, samples_per_shard=5)
    urls = sorted(map(str, shards.glob("*.tar")))
    build_manifest(urls, str(target / task), store, IndexOptions(), map)
    return target / task


def _karpathy(path: Path, names: list[str], sentences: list[list[dict]], further: list[dict]) -> None:
    images = [
        {"filename": name, "imgid": i, "split": "test", "sentences": several, **fields}
        for i, (name, several, fields) in enumerate(zip(names, sentences, further, strict=True))
    ]
    other = {**images[0], "split": "train", "filename": "absent.jpg"}
    _write(path, {"dataset": "small", "images": [other, *images]})


def _coco_captions(names: list[str], captions: list[list[str]], numbers: list[int]) -> dict:
    images = [
        {"id": number, "file_name": name, "domain": DOMAINS[i % 3]}
        for i, (number, name) in enumerate(zip(numbers, names, strict=True))
    ]
    annotations = [
        {"image_id": number, "id": 10 * number + i, "caption": text}
        for number, several in zip(numbers, captions, strict=True)
        for i, text in enumerate(several)
    ]
    return {"images": images, "annotations": annotations}


def _vqa(folder: Path, prefix: str, numbers: list[int], answers: list[str]) -> None:
    """Two questions per image: what it is, answered by ten people, of whom two say otherwise, and whether it is red."""
    questions, annotations = [], []
    for number, answer in zip(numbers, answers, strict=True):
        for i, (text, given) in enumerate((("What is it?", [answer] * 8 + ["thing"] * 2), ("Is it red?", ["no"] * 10))):
            ids = {"image_id": number, "question_id": 1000 * number + i}
            questions.append({**ids, "question": text})
            people = [{"answer": said, "answer_confidence": "yes", "answer_id": n} for n, said in enumerate(given, 1)]
            annotations.append({**ids, "answers": people, "multiple_choice_answer": given[0]})
    subset = {"data_type": "mscoco", "data_subtype": "val2014", "task_type": "Open-Ended"}
    _write(folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {**subset, "questions": questions})
    _write(folder / f"{prefix}mscoco_val2014_annotations.json", {**subset, "annotations": annotations})


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))
