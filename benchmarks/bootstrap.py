"""Does bootstrapping help? Five runs of equal length on scenes of whose captions 30% are exchanged, per seed.

    OMP_NUM_THREADS=1 python -m benchmarks.bootstrap FOLDER [--seeds 1 2] [--out docs/curves/bootstrap.json]

`recipes/bootstrap-demo.yaml` trains captioner and filter on a clean tenth (arm `tenth`) and bootstraps. The same
training is then repeated on the selection (`bootstrapped`), on the noisy captions as they are (`raw`), on those of
them that the filter keeps (`filtered`), and on the same images with their own captions (`true`). Finished runs are not
repeated; `--arms` selects the runs, so that several processes can share them.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bootstrap_scenes import Corpus, write_scenes
from isthmus.bootstrap.samples import stored_samples
from isthmus.bootstrap.score import SCORED
from isthmus.bootstrap.select import select
from isthmus.cluster.bootstrap_driver import run_bootstrap_here
from isthmus.cluster.bootstrap_job import BootstrapJob
from isthmus.cluster.config import JobConfig
from isthmus.data_pipeline.dataset.chosen_captions import load_captions
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.layers.candidates import SCORE_PREFIX, WEB, add_scores, candidate_table
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.sample.captions import read_captions
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.loading import load_config
from isthmus.trainer.run_local import train_here
from tests.learning import curve

MEASURES = {"R@1": ("stage1", "eval/itc_r1"), "CIDEr-D": ("stage2", "eval/cider_d"), "exact": ("stage2", "eval/exact")}
ARMS = ("tenth", "bootstrapped", "filtered", "raw", "true")


def main() -> None:
    """Run what is not finished, then print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("bootstrap.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    corpus = write_scenes(folder)
    figures = {seed: run_seed(folder, corpus, seed, options.arms) for seed in options.seeds}
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    for seed, of_seed in figures.items():
        print(f"seed {seed}")
        for arm, measures in of_seed.items():
            print(f"  {arm:<14}" + "  ".join(f"{name} {value:.3f}" for name, value in measures.items()))


def run_seed(folder: Path, corpus: Corpus, seed: int, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run the arms of a seed; return their figures and which share of their texts is true."""
    values = corpus.settings | {
        "run.name": f"seed-{seed}", "run.url": folder / "runs", "run.seed": seed,
        "manifest": corpus.noisy, "train_again": False,
    }  # fmt: skip
    job = load_config(corpus.recipe, [f"{key}={value}" for key, value in values.items()], BootstrapJob)
    (first,), store, figures = job.trainings, ObjectStore(), {}
    for arm in arms:
        config, manifest = first, ""
        if arm != "tenth":
            manifest = {"raw": str(corpus.noisy), "true": str(corpus.true)}.get(arm) or chosen(job, arm, store)
            config = on_data(first, f"{job.run.name}-{arm}", manifest)
        train_here(config)
        figures[arm] = reached(config) | ({} if arm == "tenth" else true_texts(manifest, corpus, store))
    return figures


def on_data(config: JobConfig, name: str, manifest: str) -> JobConfig:
    """Return the same training run on other data."""
    content = config.model_dump()
    content["run"]["name"], content["data"]["sources"] = name, [{"manifest": manifest}]
    return JobConfig.model_validate(content)


def chosen(job: BootstrapJob, arm: str, store: ObjectStore) -> str:
    """Bootstrap, and select from all texts or, for `filtered`, from the web's alone; return the manifest's URL."""
    run_bootstrap_here(job, on_ray=False)
    scores = Layer.load(f"{job.url}/{SCORED}", store)
    rule = job.select
    if arm == "filtered":
        scores, rule = web_alone(job, scores, store), rule.model_copy(update={"method": "match"})
    url = f"{job.url}/{arm}"
    select(job.manifest, scores, rule, url, store, run_in_processes(1))
    return url


def web_alone(job: BootstrapJob, scores: Layer, store: ObjectStore) -> Layer:
    """Return the layer without generated texts."""
    base = Manifest.load(job.manifest, store)
    writer = LayerWriter(f"{job.url}/web", base.hash, {"of": "web texts"}, store, scores.hash)
    score = f"{SCORE_PREFIX}{job.select.score}"
    for number, shard in enumerate(base.shards):
        rows = scores.read(number).to_pylist()
        columns = {name: [of_web(row, name) for row in rows] for name in ("texts", "sources", "seeds", score)}
        values = columns.pop(score)
        table = candidate_table([row["key"] for row in rows], **columns)
        writer.write(number, shard, add_scores(table, {str(job.select.score): values}))
    return writer.commit(base)


def of_web(row: dict[str, Any], column: str) -> list[Any]:
    """Return a column's values of the web's texts."""
    return [value for value, source in zip(row[column], row["sources"], strict=True) if source == WEB]


def reached(config: JobConfig) -> dict[str, float]:
    """Return the last held-out figures of a run."""
    run = Path(config.run.url) / config.run.name
    return {name: curve(run, stage, figure)[-1][1] for name, (stage, figure) in MEASURES.items()}


def true_texts(manifest: str, corpus: Corpus, store: ObjectStore) -> dict[str, float]:
    """Count the images and texts of a manifest, and return which share of the texts are the images' own."""
    own, told = texts_by_key(str(corpus.true), store), texts_by_key(manifest, store)
    right = [text in own[key] for key, texts in told.items() for text in texts]
    return {"images": len(told), "texts": len(right), "true": round(sum(right) / len(right), 4)}


def texts_by_key(manifest: str, store: ObjectStore) -> dict[str, set[str]]:
    """Return the texts of every sample of a manifest, in lower case, as training reads them."""
    found = {}
    for shard in Manifest.load(manifest, store).shards:
        samples: Iterable[tuple[str, list[str]]]
        if shard.captions_url is None:
            samples = ((key, read_captions(members)[0]) for key, members in stored_samples(shard, store))
        else:
            samples = zip(ShardIndex.load(shard, store).keys(), load_captions(store, shard), strict=True)
        found |= {key: {text.lower() for text in texts} for key, texts in samples}
    return found


if __name__ == "__main__":
    main()
