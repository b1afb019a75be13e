"""The report holds what the run's folder holds, escapes it, and says what is missing."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import boto3
import pytest
from moto import mock_aws

from isthmus.cluster.cli.runs import report
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.report import write_report
from isthmus.cluster.report.charts import Mark, line_chart
from isthmus.cluster.report.folder import StageFacts, read_folder
from isthmus.cluster.report.markup import h
from isthmus.cluster.report.measures import captioning
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.curves import compare, load_band, make_band, verdict
from isthmus.demo.report import curve_verdict
from isthmus.demo.report import write_report as write_demo_report
from isthmus.trainer.errors import TrainerError
from tests.run_folder import HOSTILE, local_run, write_run

pytestmark = pytest.mark.unit
SECTIONS = ["Results", "Losses", "Retrieval", "Captions", "Attention", "Similarity", "Goodput", "Restarts", "Memory"]


class Page(HTMLParser):
    """What a browser would find: tags in pairs, references, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.titles, self.text, self._open = [], [], [], "", []
        self.feed(text)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data} "
        if self._open and self._open[-1] == "h2":
            self.titles.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return local_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return Page(write_report(run[1], ObjectStore(), tmp_path_factory.mktemp("out") / "report.html").read_text())


def test_every_section_is_there_and_nothing_leads_outside(page):
    assert page.titles[: len(SECTIONS)] == SECTIONS
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert page.tags.count("img") == 4 + 4 + 8 + 5 + 3  # summary, image to text, text to image, gallery, drawings
    assert page.tags.count("svg") == 3  # losses of both stages, evaluation of stage 2
    assert "picture not kept" not in page.text


def test_what_the_run_holds_never_becomes_markup(page):
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert h("p", '<a b="c">', title='"x"') == '<p title="&quot;x&quot;">&lt;a b=&quot;c&quot;&gt;</p>'


def test_figures_stand_beside_baselines(page):
    assert re.search(r"recall@5\s+0.417\s+chance: 1.000", page.text)
    assert "most frequent caption: 0.400" in page.text  # two of five are "a green star"
    assert re.search(r"less is better\)\s+2.000\s+before training: 9.500\s+with a wrong image: 3.250", page.text)
    assert "80.0% of 0:01:40 was training" in page.text
    assert "restart: worker" in page.text
    assert re.search(r"stage1, step 24\s+worker train-1 was killed.*4\s+12.5 s\s+clear 0.5 s, start 12 s", page.text)
    assert "stage1: largest rank, whole process: 1.60 GB" in page.text


def test_a_caption_of_another_image_is_no_better_than_chance_of_being_right(run):
    measures = captioning(read_folder(run[1], ObjectStore()).stages["stage2"])
    (exact,) = (measure for measure in measures if measure.label.endswith("exact matches"))
    assert {baseline.name: baseline.value for baseline in exact.baselines}["caption of another image"] == 0


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        ("config.yaml", "config.yaml could not be read"),
        ("status.json", "status.json could not be read"),
        ("goodput.json", "goodput.json could not be read"),
        ("stage1/samples/step-000000040/samples.json", "samples.json could not be read"),
    ],
)
def test_a_damaged_file_is_named_in_place(tmp_path, damaged, told):
    _, url = local_run(tmp_path)
    (tmp_path / "demo" / damaged).write_text("{[")
    page = Page(write_report(url, ObjectStore(), tmp_path / "report.html").read_text())
    assert told in page.text
    assert page.titles[: len(SECTIONS)] == SECTIONS


SAMPLES = "stage1/samples/step-000000040/samples.json"
BEYOND = '{"step": 1, "texts": [], "examples": [{"index": 9, "texts": [], "images": []}], "pictures": []}'
ELSEWHERE = '{"step": 1, "texts": [], "examples": [], "pictures": ["../../../run.json"]}'
NO_NUMBERS = '{"step": "5", "loss/total": NaN}\n{"step": 6, "loss/total": "x"}'


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("stage1/metrics/000000005.00.jsonl", NO_NUMBERS, "nothing was recorded"),
        ("config.yaml", "model: [1]\nstage1: yes", "No memory figures|largest rank"),
        ("run.json", '{"version": 1, "attempts": null, "name": 3}', "unknown"),
        (SAMPLES, BEYOND, "lies beyond the 0 texts"),
        (SAMPLES, ELSEWHERE, "should match pattern"),
    ],
)
def test_nonsense_never_breaks_the_page(tmp_path, file, content, told):
    _, url = local_run(tmp_path)
    (tmp_path / "demo" / file).write_text(content)
    page = Page(write_report(url, ObjectStore(), tmp_path / "report.html").read_text())
    assert re.search(told, page.text)
    assert page.titles[: len(SECTIONS)] == SECTIONS


def test_a_folder_with_a_run_record_only_says_what_is_missing(tmp_path):
    _, url = local_run(tmp_path)
    for file in (tmp_path / "demo").rglob("*"):
        if file.is_file() and file.name != "run.json":
            file.unlink()
    page = Page(write_report(url, ObjectStore(), tmp_path / "report.html").read_text())
    for told in (
        "There is no evaluation",
        "There is no goodput ledger",
        "There is no status",
        "There are no memory figures",
    ):
        assert told in page.text


def test_a_folder_of_no_run_is_one_message(tmp_path):
    with pytest.raises(TrainerError, match=r"run\.json: not found"):
        report(str(tmp_path), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_chart_draws_equal_lines_once():
    lines = {"i2t_r1": [(1, 0.2)], "itc_i2t_r1": [(1, 0.2)], "t2i_r1": [(1, 0.3)]}
    chart = line_chart(lines, title="t", x_label="step", y_label="share found")
    assert chart.count("<polyline") == 2
    assert "share found" in chart
    assert "itc_i2t_r1" not in chart


def test_the_first_screen_says_what_happened(page):
    assert "Trained 40 steps of stage 1 and 20 steps of stage 2 on 2 workers" in page.text
    assert "1 restart cost 12 s and 4 repeated steps" in page.text
    assert re.search(r"0.083\s+image to text, recall@1\s+chance 0.200", page.text)
    assert re.search(r"finds:\s+a large red cross", page.text)


def test_a_chart_of_one_point_or_none_is_drawn_or_said():
    assert "<polyline" in line_chart(
        {"a": [(1, 2.0)]}, title="t", x_label="step", y_label="nats", marks=[Mark(1, "here")]
    )
    assert "nothing was recorded" in line_chart({"a": []}, title="t", x_label="step", y_label="nats")


def test_the_demo_adds_unseen_concepts_credits_and_curves(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    figures = {"checkpoint": "c", "data": "d", "figures": {"eval/i2t_r10": 0.5}}
    (tmp_path / "unseen").mkdir()
    (tmp_path / "unseen" / "report.json").write_text(json.dumps(figures))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "val.jsonl").write_text(json.dumps({"path": "images/noto-fox.jpg"}))
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        store = ObjectStore(StoreConfig(region="us-east-1"))
        config = write_run("s3://bucket/runs", store)
        path = write_demo_report(config, store, tmp_path)
        assert store.get(join(config.run.url, config.run.name, "report.html")) == path.read_bytes()
        page = Page(path.read_text())
        monkeypatch.setattr("isthmus.demo.report.BANDS", tmp_path)
        assert "no reference runs" in curve_verdict(config, store)
        band = make_band("recipes/demo.yaml", [read_folder("s3://bucket/runs/demo", store)])
        (tmp_path / "demo.json").write_text(band.model_dump_json())
        assert "learned as expected: all" in curve_verdict(config, store)
        generated = Page(write_demo_report(config, store, tmp_path, "no registry").read_text())
    assert re.search(r"i2t_r10\s+0.500\s", page.text)
    assert "CC-BY-SA-4.0" in page.text
    assert "aws s3 cp --recursive s3://bucket/runs/demo/export export" in page.text
    assert "no registry" in generated.text


def test_losses_are_compared_by_the_mean_of_the_last_ten(run):
    facts = read_folder(run[1], ObjectStore())

    def with_losses(losses):
        records = [{"step": step, "loss/total": loss} for step, loss in enumerate(losses)]
        return replace(facts, stages={"stage1": StageFacts("stage1", records)})

    band = make_band("recipes/demo.yaml", [with_losses([4.0] * 30)])
    one_hard_batch = [4.0] * 20 + [9.0] + [4.0] * 9
    assert compare(band, with_losses(one_hard_batch)) == (30, [])
    no_longer_learning = [4.0] * 20 + [5.4] * 10
    steps = [shortfall.step for shortfall in compare(band, with_losses(no_longer_learning))[1]]
    assert steps == [24, 25, 26, 27, 28, 29], "five of ten exceed the tolerance of 0.6, four do not"


def test_only_what_is_worse_than_the_band_is_reported(run, tmp_path):
    facts = read_folder(run[1], ObjectStore())
    band = make_band("recipes/demo.yaml", [facts], tolerance=0.0)
    limits = band.stages["stage1"]["loss/total"][20]
    band.stages["stage1"]["loss/total"][20] = limits.model_copy(update={"high": 0.5, "low": 0.1})
    compared, outside = compare(band, facts)
    assert compared > 20
    assert [(departure.stage, departure.figure, departure.step) for departure in outside] == [
        ("stage1", "loss/total", 20)
    ]
    assert "learned less than expected: 1 of" in verdict(band, facts)
    assert "stage1 loss/total at step 20: 2.802, expected 0.100 to 0.500" in verdict(band, facts)
    band.stages["stage1"]["loss/total"][20] = limits.model_copy(update={"low": 5.0, "high": 6.0})
    recall = band.stages["stage1"]["eval/i2t_r1"]
    recall[40] = recall[40].model_copy(update={"low": 0.0, "high": 0.01})
    assert compare(band, facts) == (compared, []), "a lower loss and a higher recall are no shortfall"
    recall[40] = recall[40].model_copy(update={"low": 0.5, "high": 0.6})
    assert [shortfall.figure for shortfall in compare(band, facts)[1]] == ["eval/i2t_r1"]
    (tmp_path / "band.json").write_text("{}")
    with pytest.raises(ClusterError, match="not a reference band"):
        load_band(tmp_path / "band.json")
