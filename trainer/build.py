"""The parts of a stage that do not depend on how it is run: model, tokenizer and task."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from isthmus.data_pipeline.order.virtual_ranks import virtual_ranks_of
from isthmus.data_pipeline.reading.batch import TextEncoder
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.compilation import compile_parts
from isthmus.model.frozen.language import LanguageModel
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.communicator import make_communicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.bert_init import load_bert
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.qformer_tokenizer import LanguageEncoder, QFormerEncoder
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.frozen.node_cache import WEIGHT_FILES, local_folder
from isthmus.trainer.frozen.zero3 import check_frozen_lm, load_frozen_lm
from isthmus.trainer.stage1_task import Stage1Task
from isthmus.trainer.stage2_task import Stage2Task
from isthmus.trainer.task import Task


def build_parts(config: TrainConfig, stage: StageName, rank: Rank, store: ObjectStore) -> tuple[Task, TextEncoder]:
    """Build a stage's task and its encoder. Collective if there are several ranks."""
    encoder = build_encoder(config, stage, store)
    return build_task(config, stage, rank, store, encoder), encoder


def build_encoder(config: TrainConfig, stage: StageName, store: ObjectStore) -> TextEncoder:
    """Build what turns captions into a stage's tokens; no weights are read."""
    model_config = config.model_at(stage)
    if stage == "stage2":
        assert model_config.language is not None
        folder = local_folder(model_config.language.path, store, leave_out=WEIGHT_FILES)
        return LanguageEncoder(folder, model_config.language)
    assert config.stage1 is not None
    bridge = model_config.qformer
    tokenizer = bridge.tokenizer or bridge.init_from
    if tokenizer is None:
        raise ConfigError("model.qformer: set tokenizer or init_from, a folder with vocab.txt; stage 1 reads captions")
    encoder = QFormerEncoder(local_folder(tokenizer, store, leave_out=WEIGHT_FILES), config.stage1.loss.max_text_tokens)
    encoder.check(bridge)
    return encoder


def build_task(
    config: TrainConfig,
    stage: StageName,
    rank: Rank,
    store: ObjectStore,
    encoder: TextEncoder,
    *,
    initialize: bool = True,
) -> Task:
    """Build a stage's model with frozen parts loaded and trainable parts initialised from the run's seed.

    Collective if there are several ranks; trainable parts are equal on all.

    Args:
        config: Of the run.
        stage: Which stage.
        rank: Place of this process.
        store: Access to the frozen parts.
        encoder: That of `build_encoder`.
        initialize: The stage begins. False: the trainable parts are left without values, for a checkpoint to fill.
    """
    if stage == "stage1":
        return _build_stage1(config, rank, store, initialize=initialize)
    return _build_stage2(config, rank, store, encoder, initialize=initialize)


def _build_stage1(config: TrainConfig, rank: Rank, store: ObjectStore, *, initialize: bool) -> Stage1Task:
    assert config.stage1 is not None
    if initialize and "stage2" in config.stages:
        from_main_rank(lambda: check_language(config, store))
    model_config = config.model_at("stage1")
    bridge = model_config.qformer
    vision = load_vision(model_config.vision, local_folder(model_config.vision.path, store))
    with _initial_values(config.run.seed, initialize=initialize):
        qformer = QFormer(bridge, vision.width)
        if initialize and bridge.init_from:
            load_bert(qformer, local_folder(bridge.init_from, store))
        model = Stage1Model(vision, qformer, config.stage1.loss)
    compile_parts(model, model_config.compile)
    return Stage1Task(model, _step_context(config, "stage1", rank))


def check_language(config: TrainConfig, store: ObjectStore) -> None:
    """Check the language model of stage 2 and its tokenizer before stage 1 is paid for; no weights are read.

    Raises:
        FrozenWeightsError, ModelError: what stage 2 would raise at its start.
    """
    language = config.model_at("stage2").language
    assert language is not None
    encoder = LanguageEncoder(local_folder(language.path, store, leave_out=WEIGHT_FILES), language)
    encoder(["a caption"], [0])
    check_frozen_lm(language, language.path, store)


def _build_stage2(
    config: TrainConfig, rank: Rank, store: ObjectStore, encoder: TextEncoder, *, initialize: bool
) -> Stage2Task:
    assert config.stage2 is not None
    model_config = config.model_at("stage2")
    assert model_config.language is not None
    assert isinstance(encoder, LanguageEncoder)
    language_config = model_config.language
    vision = load_vision(model_config.vision, local_folder(model_config.vision.path, store))
    language = load_frozen_lm(language_config, language_config.path, store, rank, config.stage2.deepspeed)
    with _initial_values(config.run.seed, initialize=initialize):
        qformer = QFormer(model_config.qformer, vision.width, with_text=False)
        model = Stage2Model(vision, qformer, cast(LanguageModel, language))
    compile_parts(model, model_config.compile)
    return Stage2Task(model, _step_context(config, "stage2", rank), encoder)


def _step_context(config: TrainConfig, stage: StageName, rank: Rank) -> StepContext:
    """Return what all steps of a stage have in common."""
    return StepContext(
        make_communicator(rank.world_size),
        config.stage(stage).micro_batch_size,
        seed=stage_seed(config.run.seed, stage),
        virtual_ranks=own_virtual_ranks(config, rank),
    )


def own_virtual_ranks(config: TrainConfig, rank: Rank) -> Sequence[int]:
    """Return the virtual ranks that a rank computes, in the order of its batches' rows; empty: the run has none."""
    virtual = config.run.virtual_ranks
    return virtual_ranks_of(rank.rank, rank.world_size, virtual) if virtual else ()


def _initial_values(run_seed: int, *, initialize: bool) -> AbstractContextManager[Any]:
    return _seeded_by(run_seed) if initialize else _WithoutValues()


class _WithoutValues(TorchFunctionMode):
    """Modules built inside do not fill their parameters: drawing millions of values takes as long as reading them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skip the functions of torch.nn.init that draw."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def _seeded_by(run_seed: int) -> Iterator[None]:
    """Initialise weights from the run's seed, alike on all ranks, and leave torch's CPU generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("initial weights", run_seed))
        yield


def derive_seed(*place: int | str) -> int:
    """Return a 63-bit seed that depends on every part of the place and on their order."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in place)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stage_seed(run_seed: int, stage: str) -> int:
    """Return the seed that a stage's model functions get; they add the step and the row."""
    return derive_seed("stage", run_seed, stage)
