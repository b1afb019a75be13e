"""Configuration of a training run: what is trained, on which data, how it is saved and monitored."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from isthmus.data_pipeline.config import Config, DataConfig, StoreConfig
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.order.skipped_steps import SkippedSteps
from isthmus.model.config import STORAGE_TYPES, ModelConfig, PrecisionName, Stage1LossConfig

StageName = Literal["stage1", "stage2"]
SameBits = Literal["world_size", "run", "none"]
TrackerName = Literal["wandb", "mlflow", "trackio"]
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class RunConfig(Config):
    """Identity of a run."""

    name: RunName
    """Name of the run: lower-case letters, digits and dashes."""
    url: str
    """Folder that holds the run's folder `<name>/`: a local path or s3://bucket/prefix."""
    seed: int = Field(0, ge=0)
    """Seed of all randomness."""
    export: bool = True
    """Export the result after the last stage."""
    virtual_ranks: int | None = Field(None, gt=0)
    """Number of equal parts of the global batch, each with its own dropout masks, that are computed identically on any
    number of workers that divides it: a power of two that divides data.lanes. None means one part per worker."""


class OptimizerConfig(Config):
    """AdamW with warm-up and cosine decay, per step (BLIP-2, appendix)."""

    peak_lr: float = Field(1e-4, gt=0)
    """Learning rate after warm-up."""
    min_lr: float = Field(1e-5, ge=0)
    """Floor of the cosine."""
    warmup_start_lr: float = Field(1e-6, ge=0)
    """Learning rate of the first step."""
    warmup_steps: int = Field(2000, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """Term added to the denominator."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices; vectors and biases have none."""
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Learning-rate factors by prefix of the parameter name, such as {projection: 10} in stage 2."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Global norm to which gradients are clipped; 0: no clipping."""


class StageConfig(Config):
    """Settings that both stages share."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    skip_steps: tuple[tuple[int, int], ...] = ()
    """Ranges [first, last] of steps of the sample order, counted from 0, whose samples are skipped; later steps move
    up. `isthmus resume RUN --skip-steps A-B` adds one."""
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(gt=0)
    """Samples per forward pass on one rank; changes memory and speed, not the expected loss."""
    deepspeed: str | dict[str, Any]
    """Name of a template in ds_configs/ (without .json), path of a JSON file, or the content of such a file."""
    precision: PrecisionName = "fp32"
    """Compute type: fp32, tf32 (fp32 with TensorFloat-32 products on CUDA), bf16 or fp16 (both by autocast)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""

    @field_validator("skip_steps")
    @classmethod
    def _in_order(cls, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """Refuse ranges that overlap; sort them."""
        try:
            return tuple((first, last) for first, last in SkippedSteps(ranges).ranges)
        except DataError as error:
            raise ValueError(str(error)) from error


class Stage1Config(StageConfig):
    """Stage 1: the Q-Former on frozen image features."""

    loss: Stage1LossConfig = Stage1LossConfig()
    """The three losses."""


class Stage2Config(StageConfig):
    """Stage 2: Q-Former and projection, through the frozen language model."""

    init_from: str = "stage1"
    """stage1: this run's stage 1. random: an untrained Q-Former. Otherwise the URL of a checkpoint or export."""
    init_choice: Literal["last", "best"] = "last"
    """Which checkpoint of this run's stage 1 to start from."""


class CheckpointConfig(Config):
    """When checkpoints are saved and which are kept."""

    every_steps: int | None = Field(None, gt=0)
    """Steps between saves; None means saving by time."""
    every_minutes: float | None = Field(None, gt=0)
    """Minutes between saves. If every_steps is not set either, the interval is automatic (Young-Daly)."""
    keep_last: int = Field(2, ge=2)
    """Number of newest checkpoints to keep."""
    keep_every_steps: int | None = Field(None, gt=0)
    """Checkpoints at multiples of this are never deleted."""
    keep_best: str | None = None
    """Metric whose best checkpoint is kept, such as eval/r1; every evaluation then saves a checkpoint. Larger is better
    unless the name ends in loss."""
    peer_memory_every_steps: int = Field(0, ge=0)
    """Steps between snapshots in the memory of other nodes (Ray only, twice the state per copy); 0 disables them."""
    save_timeout_seconds: float = Field(600.0, gt=0)
    """The run stops if no save has succeeded for this long after one was due."""


class LoggingConfig(Config):
    """Console, TensorBoard, JSONL and experiment trackers."""

    every_steps: int = Field(10, gt=0)
    """Steps between console lines and records."""
    profile_steps: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    """First and last step of each stage, counted from 1, for which rank 0 writes a torch.profiler trace into the
    stage's folder profile/; None disables it."""
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers: wandb, mlflow, trackio; each needs the extra of that name."""
    project: str = Field("isthmus", min_length=1)
    """Project in Weights & Biases, experiment in MLflow."""

    @model_validator(mode="before")
    @classmethod
    def _read_wandb_project(cls, raw: Any) -> Any:
        """`wandb_project: NAME`, the key of the first release, means trackers: [wandb], project: NAME."""
        if not isinstance(raw, dict) or "wandb_project" not in raw:
            return raw
        raw = dict(raw)
        project = raw.pop("wandb_project")
        return raw if project is None else {"trackers": ["wandb"], "project": project, **raw}


class EvaluationConfig(Config):
    """Held-out evaluation."""

    manifest: str | None = None
    """URL of a held-out manifest; None means no evaluation and no figures."""
    every_steps: int = Field(0, ge=0)
    """Steps between evaluations with figures; 0 means only at the end of a stage."""
    before_training: bool = False
    """Also evaluate the untrained model before a stage's first step."""
    batch_size: int | None = Field(None, gt=0)
    """Global evaluation batch, without micro-batching; None means as in training. Larger batches all-gather the frozen
    weights less often."""
    num_samples: int = Field(1000, gt=0)
    """Number of samples to evaluate, at most those in the manifest; rounded up to whole batches."""
    rerank_top_k: int = Field(16, ge=0)
    """Number of candidates to re-rank by ITM; 0 disables re-ranking."""
    caption_samples: int = Field(1000, gt=0)
    """Number of samples to caption in stage 2, at most num_samples, because generation is slow; rounded up to whole
    batches."""
    max_new_tokens: int = Field(30, gt=0)
    """Longest generated caption, in tokens."""
    num_beams: int = Field(1, gt=0)
    """Number of beams for generated captions; 1 is greedy search."""


class SafetyConfig(Config):
    """Limits after which a run stops instead of hanging or diverging."""

    max_nonfinite_steps: int = Field(5, gt=0)
    """Number of consecutive non-finite steps after which the run stops."""
    step_timeout_seconds: float = Field(1800.0, gt=0)
    """A rank that makes no progress for this long dumps its stacks and is killed."""
    collective_timeout_seconds: float = Field(300.0, gt=0)
    """Time limit of one collective operation."""
    same_bits: SameBits | None = None
    """When an interrupted run is bit-identical to an uninterrupted one. run: on as many workers (on CUDA with
    deterministic algorithms, which are slower; always on CPU). world_size: on any number of workers, with sums in a
    fixed order; needs run.virtual_ranks. None means world_size with virtual ranks, otherwise none."""

    @model_validator(mode="before")
    @classmethod
    def _read_deterministic(cls, raw: Any) -> Any:
        """`deterministic: true`, the key of the first release, means same_bits: run."""
        if not isinstance(raw, dict) or "deterministic" not in raw:
            return raw
        raw = dict(raw)
        return {"same_bits": "run", **raw} if raw.pop("deterministic") else raw


class TrainConfig(Config):
    """A whole run: stages in order, data, model, checkpoints, monitoring."""

    run: RunConfig
    """Identity of the run."""
    store: StoreConfig = StoreConfig()
    """Object-store access."""
    data: DataConfig
    """Training data."""
    model: ModelConfig
    """Model parts."""
    stage1: Stage1Config | None = None
    """Stage 1; None means not run."""
    stage2: Stage2Config | None = None
    """Stage 2; None means not run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig()
    """Logging and traces."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    safety: SafetyConfig = SafetyConfig()
    """Limits."""

    @property
    def stages(self) -> tuple[StageName, ...]:
        """Names of the configured stages, in the order in which they run."""
        return tuple(name for name in ("stage1", "stage2") if getattr(self, name) is not None)

    def stage(self, name: StageName) -> Stage1Config | Stage2Config:
        """Return the configuration of a stage that is part of the run."""
        stage = self.stage1 if name == "stage1" else self.stage2
        assert stage is not None, name
        return stage

    @property
    def same_bits(self) -> SameBits:
        """What ends with the same bits."""
        return self.safety.same_bits or ("world_size" if self.run.virtual_ranks else "none")

    def model_at(self, name: StageName) -> ModelConfig:
        """Return the model's configuration in a stage: frozen types that follow the stage's precision are resolved."""
        return self.model.at(self.stage(name).precision)

    @property
    def matched_share(self) -> float:
        """Share of stage 1's rows whose matching pairs are run at each step."""
        rows = self.stage1.loss.itm_rows if self.stage1 else None
        return min(1.0, rows / self.stage1.global_batch_size) if self.stage1 and rows else 1.0

    def slow_frozen_parts(self, name: StageName) -> list[str]:
        """Return a warning for each frozen part of a stage that computes in fp32 while the stage does not."""
        stage, model = self.stage(name), self.model_at(name)
        half = STORAGE_TYPES[stage.precision] != "float32"
        frozen = {"vision": model.vision, "language": model.language if name == "stage2" else None}
        return [
            f"model.{part}.dtype is float32 while {name}.precision is {stage.precision}: on a GPU this frozen model "
            "runs about ten times slower than in the stage's type and takes twice the memory; "
            f"remove model.{part}.dtype or set it to auto"
            for part, config in frozen.items()
            if half and config is not None and config.dtype == "float32"
        ]

    @model_validator(mode="after")
    def _check_across_fields(self) -> Self:
        problems = [*_cross_field_problems(self), *_virtual_rank_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _cross_field_problems(config: TrainConfig) -> list[str]:
    """Return one message per rule that spans several keys and is broken."""
    problems = []
    if config.stage1 and (config.stage1.loss.itm_rows or 0) > config.stage1.global_batch_size:
        problems.append(
            f"stage1.loss.itm_rows: {config.stage1.loss.itm_rows} exceeds stage1.global_batch_size = "
            f"{config.stage1.global_batch_size}; lower it, or leave it out to match all rows"
        )
    if not config.stages:
        problems.append("stage1, stage2: neither is set; configure at least one stage")
    batches = {f"{name}.global_batch_size": config.stage(name).global_batch_size for name in config.stages}
    batches["evaluation.batch_size"] = config.evaluation.batch_size or 0
    for key, batch in batches.items():
        if batch % config.data.lanes:
            problems.append(
                f"{key}: {batch} is not divisible by data.lanes = {config.data.lanes}; "
                f"set a multiple of {config.data.lanes}"
            )
    if config.stage2 and config.stage2.init_from == "stage1" and not config.stage1:
        problems.append(
            "stage2.init_from: 'stage1' but stage1 is not configured; "
            "configure stage1, or give the URL of a checkpoint, or 'random'"
        )
    if config.stage2 and config.stage2.init_choice == "best" and config.stage2.init_from == "stage1":
        missing = {
            "checkpoint.keep_best": config.checkpoint.keep_best,
            "evaluation.manifest": config.evaluation.manifest,
        }
        problems += [
            f"stage2.init_choice: 'best' needs {key}, which says how checkpoints of stage 1 are compared; set it, or "
            "use 'last'"
            for key, value in missing.items()
            if value is None
        ]
    if config.stage2 and not config.model.language:
        problems.append("model.language: needed by stage2; set model.language.path")
    return problems


def _virtual_rank_problems(config: TrainConfig) -> list[str]:
    """Return one message per rule about virtual ranks that is broken."""
    virtual = config.run.virtual_ranks
    if virtual is None:
        wanted = config.safety.same_bits == "world_size"
        return ["safety.same_bits: 'world_size' needs run.virtual_ranks; set it in a new run"] if wanted else []
    problems = []
    if virtual & (virtual - 1):
        problems.append(
            f"run.virtual_ranks: {virtual} is not a power of two; set {1 << virtual.bit_length() - 1}, or another one"
        )
    if config.data.lanes % virtual:
        problems.append(f"run.virtual_ranks: {virtual} does not divide data.lanes = {config.data.lanes}; change either")
    for name in config.stages:
        stage = config.stage(name)
        if stage.global_batch_size > virtual * stage.micro_batch_size:
            problems.append(
                f"{name}.micro_batch_size: {stage.micro_batch_size}, but a virtual rank is computed at once and has "
                f"{stage.global_batch_size // virtual} rows (global_batch_size / run.virtual_ranks); raise either"
            )
    return problems
