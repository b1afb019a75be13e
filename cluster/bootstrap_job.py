"""The recipe of a bootstrap: captions for one data set, and what is trained before and after."""

from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from isthmus.bootstrap.config import CaptionConfig, ScoreConfig
from isthmus.bootstrap.select_rule import SelectRule
from isthmus.cluster.config import ClusterConfig, JobConfig
from isthmus.data_pipeline.config import Config, StoreConfig
from isthmus.data_pipeline.store.object_store import join
from isthmus.trainer.config.explain import explain
from isthmus.trainer.config.schema import RunConfig

SELECTED = "selected"
TRAINED = "trained"
"""Model name that refers to the result of this recipe's `training`."""


class BootstrapJob(Config):
    """The content of a bootstrap recipe."""

    run: RunConfig
    """Name and folder: everything is written to `<run.url>/<run.name>/`."""
    store: StoreConfig = StoreConfig()
    """Object-store access."""
    cluster: ClusterConfig = ClusterConfig()
    """Cluster and resources; `cluster.workers` is the pool of captioning and scoring actors."""
    manifest: str
    """URL of the manifest of the data set to caption."""
    training: dict[str, Any] | None = None
    """Training of captioner and filter: a training recipe without run, store and cluster; None means no training."""
    train_again: bool = False
    """Train the same recipe again from scratch on the selected pairs (BLIP's CapFilt)."""
    caption: CaptionConfig
    """The captioner; `model: trained` is the language stage of `training`."""
    score: ScoreConfig = ScoreConfig()
    """The scores; `trained` among its models is stage 1 of `training`."""
    select: SelectRule
    """Which texts and images are kept."""
    duplicates: str | None = None
    """URL of a layer that `isthmus bootstrap duplicates` wrote for the manifest; marked images are excluded."""
    price_per_worker_hour: float = Field(0.0, ge=0)
    """Price of one worker per hour, for the cost estimate, in any currency."""

    @property
    def url(self) -> str:
        """Folder of everything."""
        return join(self.run.url, self.run.name)

    @property
    def selected_url(self) -> str:
        """Manifest of the selected pairs."""
        return join(self.url, SELECTED)

    @property
    def trainings(self) -> tuple[JobConfig, ...]:
        """The training runs: before, and again."""
        if self.training is None:
            return ()
        again = self._run_of("again", [{"manifest": self.selected_url}])
        return (self._run_of("first", None), *([again] if self.train_again else []))

    def _run_of(self, suffix: str, sources: list[dict[str, str]] | None) -> JobConfig:
        assert self.training is not None
        own = {
            "run": {**self.run.model_dump(), "name": f"{self.run.name}-{suffix}"},
            "store": self.store,
            "cluster": self.cluster,
        }
        content = {**self.training, **own}
        if sources:
            content["data"] = {**content.get("data", {}), "sources": sources}
        return JobConfig.model_validate(content)

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        """Check the trainings, and that what should be trained is."""
        try:
            stages = self.trainings[0].stages if self.training is not None else ()
        except ValidationError as error:
            problems = explain(self.training or {}, JobConfig, error)
            raise ValueError("\n".join(f"training.{problem}" for problem in problems)) from error
        if self.train_again and self.training is None:
            raise ValueError("train_again: needs training, which says what to train")
        needs = {"stage2": self.caption.model == TRAINED, "stage1": TRAINED in self.score.models}
        for stage, needed in needs.items():
            if needed and stage not in stages:
                raise ValueError(f"{TRAINED}: needs training.{stage}; configure it, or give the folder of a model")
        return self
