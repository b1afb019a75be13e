"""What `benchmarks.bootstrap` trains on: a clean tenth, noisy captions, the same images with their own, held-out pairs.

30% of the captions in `noisy` are those of other images. The filter's threshold is set without a look at which.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from isthmus.data_pipeline.dataset.index_build import IndexOptions, build_manifest
from isthmus.data_pipeline.ingest.shards import ingest
from isthmus.data_pipeline.ingest.sources import Source
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.tiny.assets import CAPTIONS_READ, write_corpus
from isthmus.demo.tiny.language import write_trained_language
from isthmus.demo.tiny.scenes import KINDS, exchanged_captions, make_scene
from isthmus.model.tiny import BERT_SPECIALS, write_tiny_vocabulary
from tests.learning import EYE_SCENES, EYE_STEPS, write_language
from tests.trained_vision import write_trained_vision

RECIPES = Path(__file__).parents[1] / "recipes"
EXCHANGED = 0.3
SCENES, SCENES_HELD_OUT, SCENES_STEPS = 4000, 160, 300
EMOJI_STEPS = {"stage1": 100, "stage2": 80}
BERT_LAYERS, LANGUAGE_STEPS = 3, 300
SCENES_MIN_SCORE = 0.75
"""Between the two heaps of the filter's scores of web texts, as the report of a run on easier scenes showed them."""
SAMPLES_PER_SHARD = 500
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """A recipe on a corpus and its frozen models."""

    recipe: Path
    settings: dict[str, Any]
    """Overrides of the recipe."""
    noisy: Path
    true: Path
    """Manifests of the same images."""
    min_score: float | None = None
    """Lowest score of a text that is kept; None: the quantile of the web's texts at the share that is exchanged."""


def write_scenes(folder: Path) -> Corpus:
    """Draw the scenes of recipes/bootstrap-demo.yaml; train an encoder to see and a model to write them."""
    parts = folder / "parts"
    if not (parts / "done").exists():
        write_tiny_vocabulary(parts / "bert", [make_scene(0, "train", n)[0].caption for n in range(CAPTIONS_READ)])
        write_trained_vision(parts / "vision", kinds=KINDS, steps=EYE_STEPS, num_scenes=EYE_SCENES)
        write_language(parts, "opt")
        write_corpus(parts, "clean", SCENES // 10)
        write_corpus(parts, "noisy", SCENES, exchanged=EXCHANGED)
        write_corpus(parts / "true", "noisy", SCENES)
        write_corpus(parts, "held-out", SCENES_HELD_OUT, unique=True)
        (parts / "done").touch()
    settings = {
        "training.data.sources.0.manifest": parts / "clean",
        "training.data.crop_scale": "[1.0, 1.0]",
        "training.model.vision.path": parts / "vision",
        "training.model.qformer.tokenizer": parts / "bert",
        "training.model.language.path": parts / "opt",
        "training.evaluation.manifest": parts / "held-out",
        "training.evaluation.num_samples": SCENES_HELD_OUT,
        "training.evaluation.caption_samples": SCENES_HELD_OUT,
        "training.stage1.loss.itc_grad": "full",
        "training.checkpoint.every_steps": 1000,
        "training.logging.every_steps": 20,
        "select.min_score": SCENES_MIN_SCORE,
    }
    for stage in ("stage1", "stage2"):
        for key, value in {"steps": SCENES_STEPS, "global_batch_size": 64, "micro_batch_size": 64}.items():
            settings[f"training.{stage}.{key}"] = value
        settings |= {f"training.{stage}.optimizer.peak_lr": 2e-3, f"training.{stage}.optimizer.warmup_steps": 20}
    recipe = RECIPES / "bootstrap-demo.yaml"
    return Corpus(recipe, settings, parts / "noisy", parts / "true" / "noisy", SCENES_MIN_SCORE)


def write_emoji(folder: Path, cache: Path) -> Corpus:
    """Index the pictures that `make demo` has drawn, and put its recipe, made smaller, into that of a bootstrap.

    The Q-Former has half of the layers, and the rows of the vocabulary that names need; the language model is a tiny
    one that has read the noisy texts. Images of one name are not known as such, since an exchanged caption would give
    that away: equal texts match instead.
    """
    parts, models = folder / "parts", cache / "models"
    if not (parts / "done").exists():
        texts = _write_emoji_pairs(parts, cache / "corpus")
        shrink_bert(models / "minilm", parts / "bert", texts)
        write_trained_language(parts / "opt", "opt", steps=LANGUAGE_STEPS, captions=texts)
        (parts / "done").touch()
    settings = {
        "training.data.sources.0.manifest": parts / "clean",
        "training.data.backend": "process",
        "training.data.readers": 0,
        "training.model.vision.path": models / "efficientnet-lite0",
        "training.model.qformer.init_from": parts / "bert",
        "training.model.qformer.num_layers": BERT_LAYERS,
        "training.model.qformer.vocab_size": len((parts / "bert" / "vocab.txt").read_text().splitlines()) + 1,  # [DEC]
        "training.model.language.path": parts / "opt",
        "training.model.language.prompt": "''",
        "training.evaluation.manifest": parts / "held-out",
        "training.evaluation.max_new_tokens": 16,
        "training.stage1.micro_batch_size": 64,
        "training.stage1.loss.match_equal_texts": True,
        "training.stage2.global_batch_size": 64,
        "training.stage2.micro_batch_size": 64,
        "training.stage2.deepspeed": "stage1_zero1",  # one process has nothing to shard
        "training.stage2.optimizer": "{peak_lr: 6.0e-4, min_lr: 6.0e-5, warmup_steps: 5}",
        "training.checkpoint.every_steps": 1000,
        "caption.num_candidates": 3,
        "select.method": "match",  # BLIP's; most captions of so weak a writer fit no better than an exchanged one
        "select.min_score": -1,
    }
    settings |= {f"training.{stage}.steps": steps for stage, steps in EMOJI_STEPS.items()}
    return Corpus(_emoji_recipe(folder), settings, parts / "noisy", parts / "true")


def _write_emoji_pairs(parts: Path, corpus: Path) -> list[str]:
    """Write the four manifests and return the noisy texts."""
    train, held_out = (_pairs(corpus / f"{split}.jsonl") for split in ("train", "val"))
    random.Random(0).shuffle(train)
    train = [{name: pair[name] for name in ("path", "caption")} for pair in train]
    clean, true = train[: len(train) // 10], train[len(train) // 10 :]
    carried = exchanged_captions(range(len(true)), EXCHANGED)
    noisy = [pair | {"caption": true[carried.get(n, n)]["caption"]} for n, pair in enumerate(true)]
    for name, pairs in {"clean": clean, "noisy": noisy, "true": true, "held-out": held_out}.items():
        _write_pairs(parts / name, pairs, corpus)
    return [pair["caption"].lower() for pair in noisy]


def shrink_bert(source: Path, target: Path, texts: Iterable[str]) -> None:
    """Write a BERT's first layers, and of its vocabulary what some texts and any new word need."""
    vocabulary = (source / "vocab.txt").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(source)
    used = {token for text in set(texts) for token in tokenizer.tokenize(text)}
    kept = [
        row
        for row, token in enumerate(vocabulary)
        if token in used or token in BERT_SPECIALS or len(token.removeprefix("##")) == 1
    ]
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.txt").write_text("".join(f"{vocabulary[row]}\n" for row in kept))
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": BERT_LAYERS, "vocab_size": len(kept)}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    small = {name: value for name, value in tensors.items() if not _is_dropped(name)}
    for name in [name for name in small if "word_embeddings" in name]:
        small[name] = small[name][kept].clone()
    save_file(small, target / "model.safetensors")


def _is_dropped(name: str) -> bool:
    layer = re.search(r"layer\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= BERT_LAYERS


def _pairs(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _write_pairs(folder: Path, pairs: list[dict[str, str]], images: Path) -> None:
    """Write shards as `isthmus data ingest` and `isthmus data index` do."""
    folder.mkdir(parents=True)
    listed, shards, store = folder / "pairs.jsonl", folder / "shards", ObjectStore()
    listed.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    source = Source(listed, "jsonl", images)
    ingest(source, str(shards), store, run_in_processes(1), samples_per_shard=SAMPLES_PER_SHARD)
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    build_manifest(tars, str(folder), store, IndexOptions(CHUNK_BYTES), run_in_processes(1))


def _emoji_recipe(folder: Path) -> Path:
    demo, bootstrap = (yaml.safe_load((RECIPES / name).read_text()) for name in ("demo.yaml", "bootstrap-demo.yaml"))
    bootstrap["training"] = {key: demo[key] for key in demo if key not in ("run", "store", "cluster")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(bootstrap, sort_keys=False))
    return recipe
