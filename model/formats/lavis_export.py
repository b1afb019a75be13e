"""The trained part under the names of the original code, as its checkpoints hold it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from isthmus.model.formats.key_mapping import reference_name

WEIGHTS = "checkpoint.pth"
# The original's language head has copies of its own of what is tied.
_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


def export_lavis(folder: Path, trained: Mapping[str, Tensor], llm: str) -> None:
    """Write `checkpoint.pth` into a new folder: {"model": tensors by LAVIS' names}.

    Args:
        folder: Target; made here.
        trained: Tensors by the names of `trainable_parameters` of either stage.
        llm: The original's prefix of the projection: opt or t5.
    """
    names = {name: reference_name(name, "lavis", llm) for name in trained}
    state = {theirs: trained[ours].detach().cpu() for ours, theirs in names.items() if theirs}
    state |= {copy: state[source] for copy, source in _TIED.items() if source in state}
    folder.mkdir(parents=True)
    torch.save({"model": state}, folder / WEIGHTS)
