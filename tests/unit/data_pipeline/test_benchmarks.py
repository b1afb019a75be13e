"""Evaluation sets as published become samples with all their captions, questions and answers."""

import json

import pytest

from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.preview import preview_samples
from isthmus.data_pipeline.dataset.stored_samples import StoredSamples
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.ingest.records import Columns
from isthmus.data_pipeline.ingest.shards import ingest
from isthmus.data_pipeline.ingest.sources import open_source
from isthmus.data_pipeline.sample.questions import Question, read_questions
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.benchmark_files import INGEST, prepare, write_published
from tests.corpus import picture

pytestmark = pytest.mark.unit
NUMBERS = [101, 102, 103, 104, 105, 106, 107]
CAPTIONS = [[f"caption {i} of picture {number}" for i in range(5)] for number in NUMBERS]
ANSWERS = [f"thing {number}" for number in NUMBERS]


@pytest.fixture
def published(tmp_path):
    write_published(tmp_path / "published", {number: picture(number) for number in NUMBERS}, CAPTIONS, ANSWERS)
    return tmp_path / "published"


def samples(folder):
    manifest = Manifest.load(str(folder), ObjectStore())
    stored = StoredSamples(manifest, ObjectStore())
    return [sample.members for sample in stored.read(0, len(stored))]


@pytest.mark.parametrize("task", ["coco", "nocaps", "flickr30k"])
def test_an_image_keeps_all_its_captions(published, tmp_path, task):
    found = samples(prepare(published, task, tmp_path))
    documents = [json.loads(members["json"]) for members in found]
    assert [document["captions"] for document in documents] == CAPTIONS
    assert [members["jpg"] for members in found] == [picture(number) for number in NUMBERS]
    ids = [str(i) for i in range(7)] if task == "flickr30k" else [str(number) for number in NUMBERS]
    assert [document["image_id"] for document in documents] == ids
    domains = ["in-domain", "near-domain", "out-domain"] * 2 + ["in-domain"] if task == "nocaps" else [None] * 7
    assert [document.get("domain") for document in documents] == domains


@pytest.mark.parametrize("task", ["vqav2", "okvqa"])
def test_an_image_keeps_its_questions_with_the_answers_of_ten_people(published, tmp_path, task):
    found = [read_questions(members) for members in samples(prepare(published, task, tmp_path))]
    assert [len(questions) for questions in found] == [2] * 7
    assert found[1][0] == Question("102000", "What is it?", ("thing 102",) * 8 + ("thing",) * 2)
    assert found[1][1] == Question("102001", "Is it red?", ("no",) * 10)


def test_gqa_has_one_answer_and_a_preview_shows_its_questions(published, tmp_path):
    folder = prepare(published, "gqa", tmp_path)
    assert read_questions(samples(folder)[0]) == [Question("2101", "What is it?", ("thing 101",))]
    shown = preview_samples(Manifest.load(str(folder), ObjectStore()), ObjectStore(), 3, seed=0)
    assert [sample.captions for sample in shown] == [["What is it?"]] * 3


def test_a_missing_image_is_counted_and_its_questions_can_be_ingested_later(published, tmp_path):
    lost = published / "coco/val2014/COCO_val2014_000000000103.jpg"
    data = lost.read_bytes()
    lost.unlink()
    assert len(samples(prepare(published, "vqav2", tmp_path))) == 6
    dropped = tmp_path / "shards/vqav2/dropped.jsonl"
    assert [json.loads(line)["cause"] for line in dropped.read_text().splitlines()] == ["image_missing"]
    lost.write_bytes(data)
    again = open_source(dropped, None, published, Columns())
    assert ingest(again, str(tmp_path / "again"), ObjectStore(), map).samples == 1


def test_one_line_says_what_is_wrong_with_a_file(published, tmp_path):
    def refused(task, **changes):
        file, options = INGEST[task]
        source = open_source(published / file, options["kind"], published, Columns(), **changes)
        with pytest.raises(DataError) as error:
            ingest(source, str(tmp_path / "refused"), ObjectStore(), map)
        return str(error.value)

    assert "no image has split dev; --split is one of: test, train" in refused("coco", split="dev")
    assert "--annotations" in refused("vqav2")
    empty = published / "none.json"
    empty.write_text('{"annotations": []}')
    assert "answers none of the questions" in refused("vqav2", annotations=empty)
    assert "not as vqa publishes it" in refused("vqav2", annotations=published / "dataset_coco.json")


def test_a_question_without_annotation_has_no_answers(published, tmp_path):
    path = published / "v2_mscoco_val2014_annotations.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "annotations": document["annotations"][1:]}))
    first = read_questions(samples(prepare(published, "vqav2", tmp_path))[0])
    assert [question.answers for question in first] == [(), ("no",) * 10]
