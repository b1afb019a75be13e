"""Export of a run: the newest checkpoint of its last stage as a folder that runs elsewhere.

It is uploaded to a folder of its own, `<run>/export/<stage>-step-NNNNNNNNN/`, and counts once `run.json` names it; then
earlier exports are deleted. So files of two exports never mix, and one that was interrupted is never taken for whole.
"""

import logging
import tempfile
from pathlib import Path

from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.model.formats.hf_export import export_captioner, export_retriever, hf_can_hold
from isthmus.model.formats.native import export_bridge
from isthmus.trainer.checkpoint.format import step_name
from isthmus.trainer.checkpoint.reader import SavedCheckpoint, list_checkpoints
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.errors import CheckpointError
from isthmus.trainer.frozen.node_cache import WEIGHT_FILES, local_folder
from isthmus.trainer.runs.model_card import CARD, model_card
from isthmus.trainer.runs.store import EXPORT, RunStore

logger = logging.getLogger(__name__)


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
        return url
    with tempfile.TemporaryDirectory(prefix="isthmus-export-") as temporary:
        folder = Path(temporary) / EXPORT
        with saved.in_use():
            _write(config, store, saved, folder)
        run.assert_owner()
        for info in list(store.list(url)):  # of an export that was interrupted
            store.delete(info.url)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            store.put_file(join(url, *path.relative_to(folder).parts), path)
    run.record(**{EXPORT: fact})
    for earlier in {info.url for info in store.list(join(run.url, EXPORT))} - {info.url for info in store.list(url)}:
        store.delete(earlier)
    logger.info("%s: exported %s, step %d", url, stage, saved.step)
    return url


def _write(config: TrainConfig, store: ObjectStore, saved: SavedCheckpoint, folder: Path) -> None:
    trained = {name: saved.read_tensor(name) for name in saved.shapes()}
    stage = config.stages[-1]
    model = config.model_at(stage)
    vision = (model.vision, local_folder(model.vision.path, store))
    language = None
    if stage == "stage2" and model.language:
        language = (model.language, local_folder(model.language.path, store))
    vocabulary = model.qformer.tokenizer or model.qformer.init_from
    tokenizer = local_folder(vocabulary, store, leave_out=WEIGHT_FILES) if vocabulary else None
    if not hf_can_hold(vision[1]):
        export_bridge(folder, trained, model.qformer, vision, language, tokenizer)
    elif language:
        export_captioner(folder, trained, model.qformer, vision, language)
    elif tokenizer:
        export_retriever(folder, trained, model.qformer, vision, tokenizer)
    else:
        export_bridge(folder, trained, model.qformer, vision)
    is_hf = hf_can_hold(vision[1]) and bool(language or tokenizer)
    (folder / CARD).write_text(model_card(config, stage, saved.state, is_hf=is_hf))
