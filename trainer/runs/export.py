"""Export of a run: the newest checkpoint of its last stage as a folder that runs elsewhere.

It is uploaded to a folder of its own, `<run>/export/<stage>-step-NNNNNNNNN/`, and counts once `run.json` names it; then
earlier exports are deleted. So files of two exports never mix, and one that was interrupted is never taken for whole.
A process that has lost the run without noticing may upload the same bytes again; what it deletes and records, it has
listed and read before it proved its ownership, so nothing of its successor is touched.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from isthmus.data_pipeline.store.local_store import is_local, local_path
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.model.config import LanguageConfig
from isthmus.model.formats.hf_export import export_captioner, export_retriever, hf_can_hold
from isthmus.model.formats.lavis import export_lavis
from isthmus.model.formats.native import export_bridge
from isthmus.model.frozen.language import ENCODER_DECODER_TYPES
from isthmus.model.safetensors_io import read_json
from isthmus.trainer.checkpoint.format import step_name
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, list_checkpoints
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.frozen.node_cache import WEIGHT_FILES, local_folder
from isthmus.trainer.runs.model_card import CARD, model_card
from isthmus.trainer.runs.store import EXPORT, RunStore

logger = logging.getLogger(__name__)
ExportFormat = Literal["auto", "hf", "own", "lavis"]


def export_run(config: TrainConfig, store: ObjectStore, run: RunStore) -> str:
    """Export the last stage's newest checkpoint and return the folder's URL, unless it was exported already.

    The format is transformers' BLIP-2 where it can hold the vision encoder, else our own (model.formats.native).

    Raises:
        CheckpointError: the last stage has no checkpoint.
        ModelError: tensors are missing.
    """
    stage = config.stages[-1]
    found = list_checkpoints(run.checkpoints_url(stage), store)
    if not found:
        raise CheckpointError(f"{run.checkpoints_url(stage)}: no committed checkpoint to export; train the stage first")
    saved = max(found, key=lambda checkpoint: checkpoint.step)
    url = join(run.url, EXPORT, f"{stage}-{step_name(saved.step)}")
    fact = {"stage": stage, "step": saved.step, "url": url}
    if run.facts().get(EXPORT) == fact:
        logger.info("%s: exported already", url)
    else:
        with tempfile.TemporaryDirectory(prefix="isthmus-export-") as temporary:
            folder = Path(temporary) / EXPORT
            with saved.in_use():
                _write(config, store, saved, folder, stage)
            _upload_over(folder, url, store, run)
    earlier = [info.url for info in store.list(join(run.url, EXPORT)) if not info.url.startswith(f"{url}/")]
    run.record(**{EXPORT: fact})
    for other in earlier:
        store.delete(other)
    logger.info("%s: exported %s, step %d", url, stage, saved.step)
    return url


def _upload_over(folder: Path, url: str, store: ObjectStore, run: RunStore) -> None:
    """Upload a folder to where an export of the same step may have been interrupted, or may be whole already."""
    names = {join(url, *path.relative_to(folder).parts) for path in folder.rglob("*")}
    strays = [info.url for info in store.list(url) if info.url not in names]
    run.assert_owner()
    for stray in strays:
        store.delete(stray)
    _upload(folder, url, store)


def export_checkpoint(
    config: TrainConfig,
    store: ObjectStore,
    run_url: str,
    destination: str,
    *,
    stage: StageName | None = None,
    step: int | None = None,
    form: ExportFormat = "auto",
) -> str:
    """Export a committed checkpoint of a run, which may be training, to a folder of the caller's; return its URL.

    Args:
        config: The run's configuration.
        store: Access to run and destination.
        run_url: Folder of the run.
        destination: Folder that is empty or not there; a local one appears whole or not at all.
        stage: Whose checkpoint; None means the last stage that has one.
        step: Which checkpoint; None means the newest.
        form: hf: transformers' BLIP-2. own: the native format. lavis: a `checkpoint.pth` with the original's names.
            auto: hf where it can hold the encoder, else own.

    Raises:
        CheckpointError: no such checkpoint, or the destination is not empty.
        ModelError: transformers cannot hold this encoder.
    """
    saved, stage = _find(config, store, run_url, stage, step)
    with closing(saved), _new_folder(destination, store) as folder, saved.in_use():
        _write(config, store, saved, folder, stage, form)
    return saved.url


@contextmanager
def _new_folder(url: str, store: ObjectStore) -> Iterator[Path]:
    """Yield a folder to fill, which is then moved or uploaded to `url`."""
    if not store.is_empty(url):
        raise CheckpointError(f"{url}: is not empty; give a new folder")
    parent = local_path(url).resolve().parent if is_local(url) else None
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".isthmus-export-", dir=parent) as temporary:
        folder = Path(temporary) / EXPORT
        yield folder
        if parent is not None:
            folder.rename(local_path(url))
        else:
            _upload(folder, url, store)


def _find(
    config: TrainConfig, store: ObjectStore, run_url: str, stage: StageName | None, step: int | None
) -> tuple[SavedCheckpoint, StageName]:
    for name in reversed(config.stages) if stage is None else (stage,):
        found = list_checkpoints(join(run_url, name, "checkpoints"), store)
        chosen = [saved for saved in found if step in (None, saved.step)]
        if chosen:
            return max(chosen, key=lambda saved: saved.step), name
    wanted = f"step {step} of {stage or 'any stage'}" if step is not None else stage or "any stage"
    raise CheckpointError(f"{run_url}: no committed checkpoint of {wanted}; isthmus checkpoints ls shows what there is")


def _upload(folder: Path, url: str, store: ObjectStore) -> None:
    """Upload a folder; the files that a reader opens first come last."""
    for path in sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.suffix == ".json"):
        store.put_file(join(url, *path.relative_to(folder).parts), path)


def _write(
    config: TrainConfig,
    store: ObjectStore,
    saved: SavedCheckpoint,
    folder: Path,
    stage: StageName,
    form: ExportFormat = "auto",
) -> None:
    trained = {name: saved.read_tensor(name) for name in saved.shapes()}
    model = config.model_at(stage)
    if form == "lavis":
        export_lavis(folder, trained, _lavis_llm(model.language, store))
        (folder / CARD).write_text(model_card(config, stage, saved.state, form="lavis"))
        return
    vision = (model.vision, local_folder(model.vision.path, store))
    language = None
    if stage == "stage2" and model.language:
        language = (model.language, local_folder(model.language.path, store))
    vocabulary = model.qformer.tokenizer or model.qformer.init_from
    tokenizer = local_folder(vocabulary, store, leave_out=WEIGHT_FILES) if vocabulary else None
    is_hf = form == "hf" or (form == "auto" and hf_can_hold(vision[1]) and bool(language or tokenizer))
    if not is_hf:
        export_bridge(folder, trained, model.qformer, vision, language, tokenizer)
    elif language:
        export_captioner(folder, trained, model.qformer, vision, language)
    elif tokenizer:
        export_retriever(folder, trained, model.qformer, vision, tokenizer)
    else:
        raise CheckpointError("an export of stage 1 for transformers needs model.qformer.tokenizer; use --to own")
    (folder / CARD).write_text(model_card(config, stage, saved.state, form="hf" if is_hf else "own"))


def _lavis_llm(language: LanguageConfig | None, store: ObjectStore) -> str:
    """Return the original's prefix of the projection into a language model."""
    if language is None:
        return "opt"
    config = read_json(local_folder(language.path, store, leave_out=WEIGHT_FILES) / "config.json")
    return "t5" if config.get("model_type") in ENCODER_DECODER_TYPES else "opt"
