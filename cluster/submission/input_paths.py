"""Every place that a configuration names: where a run reads and writes, by key."""

from collections.abc import Iterator
from typing import NamedTuple

from isthmus.cluster.bootstrap_job import TRAINED, BootstrapJob
from isthmus.cluster.errors import ClusterError
from isthmus.cluster.submission.job import Submitted
from isthmus.data_pipeline.store.local_store import is_local, local_path

TINY_ASSETS = "assets/tiny"


class Place(NamedTuple):
    """A configured path or URL."""

    key: str
    url: str

    @property
    def is_local(self) -> bool:
        """Whether it is a path of a file system, not of an object store."""
        return is_local(self.url)

    @property
    def is_relative(self) -> bool:
        """Whether it depends on the working directory."""
        return self.is_local and not self.url.startswith(("/", "file:///"))


def places(config: Submitted) -> Iterator[Place]:
    """Yield the run's folder, then everything that the run reads."""
    yield Place("run.url", config.run.url)
    yield from inputs(config)


def inputs(config: Submitted) -> Iterator[Place]:
    """Yield what the run reads: manifests, frozen weights, tokenizer, what its stages start from."""
    if isinstance(config, BootstrapJob):
        yield from _bootstrap_inputs(config)
        return
    model, evaluation = config.model, config.evaluation
    for number, source in enumerate(config.data.sources):
        yield Place(f"data.sources.{number}.manifest", source.manifest)
    named = {
        "data.exclude": config.data.exclude,
        "model.vision.path": model.vision.path,
        "model.qformer.init_from": model.qformer.init_from,
        "model.qformer.tokenizer": model.qformer.tokenizer,
        "model.language.path": model.language.path if model.language else None,
        "evaluation.manifest": evaluation.manifest,
    }
    if config.stage2 and config.stage2.init_from not in ("stage1", "random"):
        named["stage2.init_from"] = config.stage2.init_from
    yield from (Place(key, url) for key, url in named.items() if url)


def _bootstrap_inputs(job: BootstrapJob) -> Iterator[Place]:
    """Yield the data set, the models that exist already, and what the first training reads."""
    yield Place("manifest", job.manifest)
    named = {"duplicates": job.duplicates, "caption.model": job.caption.model}
    named |= {f"score.models.{number}": url for number, url in enumerate(job.score.models)}
    yield from (Place(key, url) for key, url in named.items() if url and url != TRAINED)
    for first in job.trainings[:1]:
        yield from (Place(f"training.{place.key}", place.url) for place in inputs(first))


def check_travels(config: Submitted, *, same_machine: bool) -> None:
    """Refuse places that mean nothing, or something else, on the machines of a cluster.

    Args:
        config: Of the run.
        same_machine: The cluster runs on this machine.

    Raises:
        ClusterError: names each key.
    """
    found = [
        place for place in places(config) if place.is_relative or (place.url.startswith("file:") and not same_machine)
    ]
    if found:
        advice = (
            "an absolute path" if same_machine else "s3://BUCKET/PREFIX, or an absolute path that every node mounts"
        )
        raise ClusterError(
            f"{config.run.name}: the cluster cannot find these places; give {advice}:\n"
            + "\n".join(f"  {place.key}: {place.url}" for place in found)
        )


def check_present(config: Submitted) -> None:
    """Check, for a run on this machine, that every local input is there.

    Raises:
        ClusterError: names each key and how to get what is missing.
    """
    missing = [place for place in inputs(config) if place.is_local and not local_path(place.url).exists()]
    if missing:
        tiny = any(place.url.startswith(TINY_ASSETS) for place in missing)
        advice = f"make them with: isthmus assets tiny {TINY_ASSETS}" if tiny else "check the paths"
        raise ClusterError(
            f"{config.run.name}: inputs are missing; {advice}\n"
            + "\n".join(f"  {place.key}: {place.url}" for place in missing)
        )
