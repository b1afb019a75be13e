"""The suite on published models: figures by hand, what is kept, the paper's rows, and one line for what is wrong."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from typer.testing import CliRunner

from isthmus.cluster.cli.main import app
from isthmus.cluster.suite import evaluate_suite
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.decoding import Decoding
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.formats.hf_import import import_blip2
from isthmus.model.generate import generate_ids
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.qformer.packing import pack_captions
from isthmus.trainer.context import Rank
from isthmus.trainer.errors import TrainerError
from isthmus.trainer.evaluation import ranking
from isthmus.trainer.evaluation.benchmark import Benchmark
from isthmus.trainer.evaluation.paper import TABLES, beside_paper, model_names, paper_rows
from isthmus.trainer.evaluation.protocol import CAPTION_DECODING, CAPTION_PROMPT, SUITES, EvalTask
from isthmus.trainer.evaluation.ranking import Ranking, best_pairs
from isthmus.trainer.evaluation.retrieval_metrics import direction_recalls
from isthmus.trainer.evaluation.text_tasks import TextTasks, caption_figures, plain_question, question_figures
from isthmus.trainer.subject import ExportTarget, RunTarget
from tests.benchmark_files import INGEST, prepare, write_published
from tests.corpus import picture
from tests.unit.cluster.configs import job_config
from tests.unit.model.test_import_round_trip import published

pytestmark = pytest.mark.unit
NUMBERS = range(101, 119)  # two units
WORDS = ("a", "red", "dog")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    captions = [[" ".join(WORDS[(n + i) % 3 :] * (1 + i)) for i in range(2)] for n in NUMBERS]
    write_published(folder, {number: picture(number) for number in NUMBERS}, captions, ["dog"] * len(NUMBERS))
    for task in INGEST:
        prepare(folder, task, folder / "sets")
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return published(tmp_path_factory.mktemp("captioner"), Blip2ForConditionalGeneration, with_text=False)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return published(tmp_path_factory.mktemp("retriever"), Blip2ForImageTextRetrieval, with_text=True)


def suite(subject, data, *options):
    result = CliRunner().invoke(app, ["eval", str(subject), str(data), "--suite", "blip2", *options])
    if isinstance(result.exception, TrainerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in options else result.stdout


# Figures by hand.


def test_recall_with_several_captions_per_image():
    """Image 0 has texts 0, 1; image 1 has texts 2, 3. A tie with a wrong candidate counts as lost."""
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.5, 0.4, 0.3, 0.5]])
    relevant = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert direction_recalls(scores, relevant, "tr_r") == {"tr_r1": 0.5, "tr_r5": 1.0, "tr_r10": 1.0}
    # Texts: 0 finds image 0; 1 finds image 1; 2 finds image 0; 3 finds image 1.
    assert direction_recalls(scores.T, relevant.T, "ir_r")["ir_r1"] == 0.5
    assert best_pairs(scores, 2).tolist() == [[True, False, True, False], [True, False, False, True]]


def test_accuracy_of_questions():
    rows = [{"text": "Dogs", "answers": ["dogs"] * 3 + ["cat"] * 7}, {"text": "a cat", "answers": ["cat"] * 10}]
    assert question_figures(rows, SUITES["blip2"][3], "") == {"accuracy": pytest.approx(50 * (0.9 + 0.0))}
    rows = [
        {"text": "Dogs", "answers": ["dogs"]},
        {"text": "a cat", "answers": ["cat"]},
        {"text": "x", "answers": ["y"]},
    ]
    assert question_figures(rows, SUITES["blip2"][5], "") == {"accuracy": pytest.approx(200 / 3)}


def test_captions_by_domain():
    def row(image, text, reference, domain):
        return {"image_id": image, "text": text, "references": [reference], "domain": domain}

    rows = [row("1", "red dog", "red dog", "in-domain"), row("2", "blue dog", "blue cat", "out-domain")]
    figures = caption_figures(rows, "")
    assert figures["cider"] == pytest.approx(312.5)
    assert (figures["in-domain_cider"], figures["out-domain_cider"]) == pytest.approx((500.0, 125.0))


def test_questions_are_asked_as_the_original_asks_them():
    assert plain_question('What\'s "that" (a dog)? It: is #1! ') == "what's that a dog? it is 1"
    assert len(plain_question("word " * 60).split()) == 50


def test_the_shortest_caption_counts_as_in_the_original():
    """With the four tokens of OPT's prompt `</s>a photo of`, or the one that T5's decoder starts with."""
    assert [CAPTION_DECODING.min_new_tokens(given) for given in (4, 1)] == [4, 7]
    assert Decoding().min_new_tokens(4) is None


def test_no_caption_is_shorter(captioner):
    model, encoder = load_captioner(captioner)
    images = torch.zeros(1, 3, 28, 28)
    prompt = len(encoder.prompt_ids(CAPTION_PROMPT))
    # A language model that would stop at once: the stop token is the likeliest one everywhere.
    head = model.language.model.lm_head
    head.weight.data.zero_()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]).index_fill(0, torch.tensor(encoder.stop_id), 9.0))
    for shortest, length in ((0, 1), (prompt + 5, 6)):
        decoding = Decoding(max_new_tokens=9, num_beams=1, min_length=shortest)
        assert (
            generate_ids(model, encoder, images, [CAPTION_PROMPT], decoding)[0][:9].index(encoder.stop_id) == length - 1
        )


# On published models.


def test_a_published_captioner_has_all_tasks_but_retrieval(captioner, files):
    text = suite(captioner, files / "sets")
    assert "flickr30k: not evaluated: there are no weights of stage1" in text
    assert "vqav2: 36 questions, the published split has 214,354" in text
    assert "BLIP-2 ViT-g FlanT5 XXL         65.2         45.9         44.7" in text
    found = suite(captioner, files / "sets", "--json")["results"]
    assert [(entry["task"], entry["count"]) for entry in found] == [
        ("coco", 18), ("nocaps", 18), ("vqav2", 36), ("okvqa", 36), ("gqa", 18)
    ]  # fmt: skip
    rows = [json.loads(line) for line in (captioner / "eval/okvqa.eval.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"question_id", "question", "answers", "text"}


def test_an_import_has_the_figures_of_what_was_imported(retriever, files, tmp_path):
    import_blip2(retriever, tmp_path / "imported")
    figures = [suite(place, files / "sets", "--json")["results"] for place in (retriever, tmp_path / "imported")]
    assert [entry["task"] for entry in figures[0]] == ["flickr30k"]
    assert figures[0][0]["figures"] == figures[1][0]["figures"]
    assert 0 < figures[0][0]["figures"]["ir_r10"] <= 100


def test_reranking_is_the_sum_of_cosine_and_match_for_the_best_of_each(retriever, files, monkeypatch):
    monkeypatch.setattr(ranking, "RERANKED", 3)
    seen = []
    monkeypatch.setattr(ranking, "_recalls", lambda *scores: seen.append(scores[:3]) or {})
    target = ExportTarget(str(retriever), ObjectStore(), Rank(0, 1))
    with target.open("stage1") as subject, torch.no_grad():
        model, data = (
            subject.task.model,
            Benchmark(str(files / "sets/flickr30k"), ObjectStore(), subject.side, Rank(0, 1)),
        )
        arguments = (model, subject.encoder, subject.precision, LocalCommunicator(), data, lambda: None)
        assert Ranking(*arguments).figures()[1] == 18
        (cosine_IT, _, relevant_IT), (image_IT, text_IT, _) = seen
        assert relevant_IT.sum(dim=1).tolist() == [2] * 18
        captions = [text for unit in data.units() for item in unit.items for text in item.captions]
        tokens = subject.encoder(captions)
        pixels = torch.cat([unit.pixels_BCHW for unit in data.units()])
        features = model.vision(model.vision.normalize(pixels))
        for i, t in ((0, 5), (7, 20), (17, 35)):
            text = pack_captions(tokens["input_ids"][t : t + 1], tokens["attention_mask"][t : t + 1])
            cosine = (model.image_vectors(features[i : i + 1])[0] @ model.text_vectors(text)[0]).max()
            assert float(cosine_IT[i, t]) == pytest.approx(float(cosine), abs=1e-5)
            kv = model.qformer.image_kv(features[i : i + 1]).layers
            match = float(cosine + model.match(text, model.embed_text(text), kv)[0, 1])
            for scores, is_best in (
                (image_IT, cosine_IT[i].topk(3).indices.eq(t).any()),
                (text_IT, cosine_IT[:, t].topk(3).indices.eq(i).any()),
            ):
                expected = match if is_best else float(cosine) + ranking.NOT_A_CANDIDATE
                assert float(scores[i, t]) == pytest.approx(expected, abs=2e-3)
        assert [int((scores > -1000).sum()) for scores in (image_IT, text_IT)] == [18 * 3, 36 * 3]


@pytest.mark.parametrize("world_size", [2, 3])
def test_texts_do_not_depend_on_the_number_of_ranks(captioner, files, world_size):
    """The parts of all ranks, one after the other in this process, put together as they are when they are gathered."""

    def answered(model, subject, rank, size):
        data = Benchmark(str(files / "sets/vqav2"), ObjectStore(), subject.side, Rank(rank, size))
        seen = []
        rows = TextTasks(model, subject.encoder, subject.precision, data, lambda: seen.append(rank)).answers()
        return rows, len(seen)

    target = ExportTarget(str(captioner), ObjectStore(), Rank(0, 1))
    with target.open("stage2") as subject:
        alone, units = answered(subject.task.model, subject, 0, 1)
        found = [answered(subject.task.model, subject, rank, world_size) for rank in range(world_size)]
    assert units == 2
    assert {passes for _, passes in found} == {1}
    assert [row for rows, _ in found for row in rows] == alone


def test_a_result_is_kept_until_weights_or_data_change(captioner, files, tmp_path):
    prepare(files, "gqa", tmp_path / "sets")
    suite(captioner, tmp_path / "sets", "--task", "gqa")
    kept = captioner / "eval/gqa.eval.json"
    changed = kept.stat().st_mtime_ns
    suite(captioner, tmp_path / "sets", "--task", "gqa")
    assert kept.stat().st_mtime_ns == changed
    card = captioner / "README.md"
    card.write_text("another version")
    suite(captioner, tmp_path / "sets", "--task", "gqa")
    assert kept.stat().st_mtime_ns > changed


def test_an_image_that_cannot_be_decoded_is_left_out_and_counted(captioner, tmp_path):
    data = picture(1)
    write_published(
        tmp_path, {1: data, 2: data[: len(data) // 2], 3: picture(3)}, [["a dog"]] * 3, ["dog", "cat", "dog"]
    )
    prepare(tmp_path, "coco", tmp_path / "sets")
    assert "coco: 2 images, the published split has 5,000" in suite(captioner, tmp_path / "sets", "--task", "coco")


def test_one_line_says_what_is_wrong(captioner, retriever, files, tmp_path):
    sets = files / "sets"
    with pytest.raises(TrainerError, match="coco: not evaluated: there are no weights of stage2"):
        suite(retriever, sets, "--task", "coco")
    with pytest.raises(
        TrainerError, match="--task vqa is unknown; blip2 has coco, nocaps, flickr30k, vqav2, okvqa, gqa"
    ):
        suite(captioner, sets, "--task", "vqa")
    with pytest.raises(TrainerError, match="coco: not evaluated: no manifest at"):
        suite(captioner, tmp_path, "--task", "coco")
    (tmp_path / "coco").symlink_to(sets / "gqa")
    with pytest.raises(TrainerError, match="no image has captions to compare with"):
        suite(captioner, tmp_path, "--task", "coco")
    path = files / "testdev_balanced_questions.json"
    whole = path.read_text()
    path.write_text(whole.replace('"answer"', '"secret"'))
    prepare(files, "gqa", tmp_path / "unanswered")
    path.write_text(whole)
    with pytest.raises(TrainerError, match="no question has answers"):
        suite(captioner, tmp_path / "unanswered", "--task", "gqa")
    result = CliRunner().invoke(app, ["eval", str(captioner), str(sets), "--suite", "other"])
    assert str(result.exception) == "--suite other is unknown; choose one of blip2"
    result = CliRunner().invoke(app, ["eval", str(captioner), str(sets), "--suite", "blip2", "--samples", "4"])
    assert result.exit_code == 2
    assert "a suite is fixed" in result.output


def test_a_run_without_stage_2_is_not_asked_for_captions(files, tmp_path):
    store, target = ObjectStore(), RunTarget(job_config(), str(tmp_path / "run"), ObjectStore(), Rank(0, 1))
    with pytest.raises(TrainerError, match="coco: not evaluated: there are no weights of stage2"):
        evaluate_suite(target, "blip2", str(files / "sets"), store, ["coco"], lambda *_: nullcontext(lambda: None))
    assert evaluate_suite(target, "blip2", str(files / "sets"), store, [], lambda *_: nullcontext()).results == []
    with pytest.raises(TrainerError, match="no committed checkpoint of any stage"):
        target.newest(None)


# The paper's tables.


def test_the_papers_row_is_that_of_the_same_models():
    def named(width, kind, language_width):
        language = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(model_type=kind)), width=language_width)
        return model_names(SimpleNamespace(vision=SimpleNamespace(width=width), language=language))

    assert named(1408, "opt", 2560) == ("ViT-g", "OPT 2.7B")
    assert named(1024, "t5", 2048) == ("ViT-L", "FlanT5 XL")
    assert named(1152, "llama", 4096) == ("", "")
    questions, captions, retrieval = TABLES
    assert paper_rows(questions, ("ViT-g", "OPT 6.7B")) == {("ViT-g", "OPT 6.7B"): (54.3, 36.4, 36.4)}
    assert list(paper_rows(retrieval, ("ViT-g", "OPT 6.7B"))) == [("ViT-g", "")]
    assert len(paper_rows(captions, ("ViT-L", "OPT 2.7B"))) == 3  # the paper has none of these models: all


def test_every_row_has_a_figure_for_every_column():
    tasks = {task.name for task in SUITES["blip2"]}
    for table in TABLES:
        assert {figure.partition("/")[0] for figure in table.columns.values()} <= tasks
        assert all(len(row) == len(table.columns) for row in table.rows.values())


def test_a_table_shows_what_there_is():
    lines = beside_paper({"okvqa/accuracy": 31.04}, ("ViT-g", "OPT 2.7B"))
    assert [line.split() for line in lines[1:4]] == [
        ["VQAv2", "val", "OK-VQA", "test", "GQA", "test-dev"],
        ["this", "model", "-", "31.0", "-"],
        ["BLIP-2", "ViT-g", "OPT", "2.7B", "53.5", "31.7", "34.6"],
    ]
    assert beside_paper({}, ("", "")) == []


def test_the_settings_of_a_task_are_plain_data():
    for task in (*SUITES["blip2"], EvalTask("other", "question", 1, exact=True)):
        assert json.loads(json.dumps(task.settings())) == task.settings()
