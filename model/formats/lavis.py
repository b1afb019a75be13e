"""Stage-1 weights under the names of the original code (LAVIS), in and out."""

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.model.errors import ModelError
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.objectives.stage1 import Stage1Model

# Tied copies that some files hold as well.
_TIED = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")


def lavis_names(model: Stage1Model) -> dict[str, str]:
    """Return the original's name of every trainable parameter."""
    names = {name: reference_name(name, "lavis") for name in model.trainable_parameters()}
    return {ours: theirs for ours, theirs in names.items() if theirs is not None}


def load_lavis(model: Stage1Model, weights: Mapping[str, Tensor]) -> None:
    """Copy the trainable weights of a stage-1 checkpoint of the original; its other tensors are not read.

    Raises:
        ModelError: a weight is absent or of another shape.
    """
    parameters = model.trainable_parameters()
    names = lavis_names(model)
    missing = sorted(theirs for theirs in names.values() if theirs not in weights)
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weights are not in the LAVIS checkpoint, the first is {missing[0]}; "
            "is it of stage 1, with as many layers?"
        )
    with torch.no_grad():
        for ours, theirs in names.items():
            parameter, value = parameters[ours], weights[theirs]
            if parameter.shape != value.shape:
                raise ModelError(
                    f"{theirs} is {tuple(value.shape)} in the LAVIS checkpoint, here {tuple(parameter.shape)}; "
                    "give model.qformer the dimensions of the checkpoint"
                )
            parameter.copy_(value)


def lavis_state(model: Stage1Model) -> dict[str, Tensor]:
    """Return the trainable weights under the original's names, tied copies included."""
    parameters = model.trainable_parameters()
    state = {theirs: parameters[ours].detach() for ours, theirs in lavis_names(model).items()}
    tied = ("Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.bias")
    return state | {copy: state[source] for copy, source in zip(_TIED, tied, strict=True)}
