"""The identities of a run's frozen parts: hashed once per version of their files, and stored in `run.json`."""

from typing import Any

from isthmus.data_pipeline.store.object_store import ObjectInfo, ObjectStore
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.frozen.identity import frozen_identity, text_files, text_identity
from isthmus.trainer.frozen.node_cache import folder_version
from isthmus.trainer.frozen.safetensors_index import weight_files
from isthmus.trainer.runs.store import RunStore

FACT = "frozen"


def frozen_identities(
    config: TrainConfig, stage: StageName, run: RunStore, store: ObjectStore, rank: Rank
) -> dict[str, str]:
    """Return the identity of what a stage reads and does not train. Collective.

    These are the weights of each frozen part, under its name, and its configuration and tokenizer, under a longer one.
    Files are read only if no earlier start has hashed files of the same names, sizes and etags.
    """
    model = config.model
    weights = {"vision": model.vision.path}
    texts = {"vision": model.vision.path}
    if stage == "stage2" and model.language is not None:
        weights["language"] = texts["language"] = model.language.path
    elif tokenizer := model.qformer.tokenizer or model.qformer.init_from:
        texts["qformer"] = tokenizer

    def look_up() -> tuple[dict[str, list[ObjectInfo]], dict[str, Any]]:
        files = {part: weight_files(url, store) for part, url in weights.items()}
        files |= {f"{part} config and tokenizer": text_files(url, store) for part, url in texts.items()}
        return files, run.facts().get(FACT, {})

    files, known = from_main_rank(look_up)
    found = {}
    for part, listed in files.items():
        entry = known.get(part, {})
        if entry.get("version") != (version := folder_version(listed)):
            entry = {"version": version, "identity": _identity(weights.get(part), listed, store, rank)}
            if rank.is_main:
                run.record(**{FACT: {part: entry}})
        found[part] = entry["identity"]
    return found


def _identity(weights: str | None, texts: list[ObjectInfo], store: ObjectStore, rank: Rank) -> str:
    if weights is not None:
        return frozen_identity(weights, store, rank)
    return from_main_rank(lambda: text_identity(texts, store))
