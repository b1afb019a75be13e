"""The identities of a run's frozen parts: hashed once per version of their files, and stored in `run.json`."""

from typing import Any

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.config.schema import StageName, TrainConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.collectives import from_main_rank
from isthmus.trainer.frozen.identity import frozen_identity, text_identity
from isthmus.trainer.frozen.node_cache import folder_version
from isthmus.trainer.frozen.safetensors_index import weight_files
from isthmus.trainer.runs.store import RunStore

FACT = "frozen"


def frozen_identities(
    config: TrainConfig, stage: StageName, run: RunStore, store: ObjectStore, rank: Rank
) -> dict[str, str]:
    """Return the identity of what a stage reads and does not train. Collective.

    These are the weights of each frozen part, under its name, and its configuration and tokenizer, under a longer one.
    The bytes of a model are read only if no earlier start has hashed files of the same names, sizes and etags.
    """
    model = config.model
    weights = {"vision": model.vision.path}
    texts = {"vision": model.vision.path}
    if stage == "stage2" and model.language is not None:
        weights["language"] = texts["language"] = model.language.path
    elif tokenizer := model.qformer.tokenizer or model.qformer.init_from:
        texts["qformer"] = tokenizer
    found = {part: _identity(part, url, run, store, rank) for part, url in weights.items()}
    return found | from_main_rank(
        lambda: {f"{part} config and tokenizer": text_identity(url, store) for part, url in texts.items()}
    )


def _identity(part: str, url: str, run: RunStore, store: ObjectStore, rank: Rank) -> str:
    def look_up() -> tuple[str, str | None]:
        version = folder_version(weight_files(url, store))
        known: dict[str, Any] = run.facts().get(FACT, {}).get(part, {})
        return version, known.get("identity") if known.get("version") == version else None

    version, known = from_main_rank(look_up)
    if known is not None:
        return known
    identity = frozen_identity(url, store, rank)
    if rank.is_main:
        run.record(**{FACT: {part: {"version": version, "identity": identity}}})
    return identity
