"""Initialises stage 2 from trained tensors.

The choice is made once and recorded in `run.json` before anything is trained; a run killed in between takes the same
checkpoint again.
"""

import logging
from typing import Any

import torch
from torch import nn

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.formats.key_mapping import by_layer
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, list_checkpoints
from isthmus.trainer.checkpoint.retention import best_step
from isthmus.trainer.config.schema import Stage2Config, TrainConfig
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.runs.init_sources import Source, open_source
from isthmus.trainer.runs.store import RunStore

logger = logging.getLogger(__name__)
FRESH = "random"
OWN_STAGE = "stage1"
NEW_IN_STAGE2 = ("projection.",)
"""Prefixes of tensors that stage 2 initialises itself where its source has none."""


def init_from_stage1(
    config: TrainConfig, run: RunStore, store: ObjectStore, parameters: dict[str, nn.Parameter]
) -> dict[str, Any] | None:
    """Give stage 2's parameters, not yet under an engine, the values that training begins with. Collective.

    Taken are the tensors of the same name; what stage 2 does not have (text side, heads) is dropped by name.

    Args:
        config: Says where from.
        run: Where the decision is recorded.
        store: Access to it.
        parameters: Trainable parameters by name; changed in place.

    Returns:
        The record; none when stage 2 begins with random values.

    Raises:
        CheckpointError: the source is missing, damaged, of another model or not the one that was recorded.
    """
    assert config.stage2 is not None
    if config.stage2.init_from == FRESH:
        return None
    record = from_main_rank(lambda: _decide(config, run, store, parameters))
    source = open_source(record["url"], store, parameters)
    _check_recorded(source, record)
    with torch.no_grad():
        for name in record["taken"]:
            parameters[name].copy_(source.read_tensor(name))
    new = parameters.keys() - set(record["taken"])
    new_names, left_names = (", ".join(by_layer(sorted(names))) or "none" for names in (new, record["dropped"]))
    count = len(record["taken"])
    logger.info(
        "stage 2 starts from %d tensors of %s; new: %s; ignored: %s", count, record["url"], new_names, left_names
    )
    return record


def _decide(
    config: TrainConfig, run: RunStore, store: ObjectStore, parameters: dict[str, nn.Parameter]
) -> dict[str, Any]:
    """Return the recorded decision, or take it, verify its source, and record it."""
    assert config.stage2 is not None
    recorded: dict[str, Any] | None = run.facts().get("handoffs", {}).get("stage2")
    if recorded is not None and recorded["init_from"] == config.stage2.init_from:
        return recorded
    source: Source
    if config.stage2.init_from == OWN_STAGE:
        source = _chosen(config, config.stage2, run, store)
    else:
        source = open_source(config.stage2.init_from, store, parameters)
        if isinstance(source, SavedCheckpoint):
            _verify(source)
    taken, dropped = match(source, parameters)
    record = {
        "init_from": config.stage2.init_from,
        "url": source.url,
        "identity": source.identity(),
        "taken": taken,
        "dropped": dropped,
    }
    run.record(handoffs={"stage2": record})
    return record


def match(source: Source, parameters: dict[str, nn.Parameter]) -> tuple[list[str], list[str]]:
    """Return the names taken from the source and those that are dropped.

    Raises:
        CheckpointError: the source lacks tensors, or has them in another shape.
    """
    shapes = source.shapes()
    lacking = sorted(n for n in parameters.keys() - shapes.keys() if not n.startswith(NEW_IN_STAGE2))
    other = [
        f"{name}: {shapes[name]}, the model has {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in shapes and shapes[name] != tuple(parameter.shape)
    ]
    if lacking or other:
        raise CheckpointError(
            f"{source.url}: belongs to another model: missing {lacking or 'none'}; different shape {other or 'none'}; "
            "give stage2.init_from a checkpoint of the same Q-Former and vision width"
        )
    return sorted(parameters.keys() & shapes.keys()), sorted(shapes.keys() - parameters.keys())


def _chosen(config: TrainConfig, stage2: Stage2Config, run: RunStore, store: ObjectStore) -> SavedCheckpoint:
    """Return the verified checkpoint of this run's stage 1: the last, or the best."""
    folder = run.checkpoints_url(OWN_STAGE)
    found = list_checkpoints(folder, store)
    if not found or config.stage1 is None or found[0].step < config.stage1.steps:
        at = f"stands at step {found[0].step}" if found else "has no checkpoint"
        raise CheckpointError(f"{folder}: stage 1 is not finished ({at}); finish it, then start stage 2")
    saved = found[0]
    if stage2.init_choice == "best":
        metric = config.checkpoint.keep_best
        best = best_step({item.step: item.state.metrics for item in found}, metric)
        if best is None:
            raise CheckpointError(
                f"{folder}: no checkpoint has the metric of checkpoint.keep_best ({metric}); set it to one that "
                "evaluation measures, or stage2.init_choice=last"
            )
        saved = next(item for item in found if item.step == best)
    _verify(saved)
    return saved


def _verify(saved: SavedCheckpoint) -> None:
    problems = saved.verify()
    if problems:
        raise CheckpointError(
            f"{saved.url}: is damaged ({'; '.join(problems)}); delete it: stage 1 then resumes from the previous one"
        )


def _check_recorded(source: Source, record: dict[str, Any]) -> None:
    if source.identity() != record["identity"]:
        raise CheckpointError(
            f"{source.url}: is not what stage 2 was initialised from (see handoffs in run.json); restore it, or start "
            "a new run from it with stage2.init_from"
        )
