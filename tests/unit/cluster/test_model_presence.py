"""Preflight says which models a run lacks, with the command that brings each."""

import pytest

from isthmus.cluster.checks.store_checks import check_weights
from isthmus.data_pipeline.errors import DataError
from isthmus.model.tiny import write_tiny_language, write_tiny_vision

from .configs import job_config

pytestmark = pytest.mark.unit


def config_of(folder):
    return job_config(
        str(folder),
        model={
            "vision": {"path": str(folder / "eva-clip-vit-g-14")},
            "qformer": {"init_from": str(folder / "bert-base-uncased")},
            "language": {"path": str(folder / "mine")},
        },
    )


def test_each_missing_model_is_named_with_its_command(tmp_path):
    write_tiny_language(tmp_path / "mine", "opt")
    with pytest.raises(DataError) as error:
        check_weights(config_of(tmp_path))
    commands = (
        f"isthmus models get Salesforce/blip2-itm-vit-g {tmp_path}/eva-clip-vit-g-14 --part vision; "
        f"isthmus models get google-bert/bert-base-uncased {tmp_path}/bert-base-uncased"
    )
    assert str(error.value) == f"2 models are missing: {commands}"


def test_a_model_whose_conversion_was_interrupted_is_missing(tmp_path):
    """`isthmus models get` writes config.json last, so the same command resumes."""
    for name in ("eva-clip-vit-g-14", "bert-base-uncased"):
        write_tiny_vision(tmp_path / name)
    write_tiny_language(tmp_path / "mine", "opt")
    assert "Q-Former 0.00 GB in 1 files" in check_weights(config_of(tmp_path))
    (tmp_path / "mine" / "config.json").unlink()
    with pytest.raises(DataError, match=f"1 models are missing: isthmus models get NAME_OR_FOLDER {tmp_path}/mine$"):
        check_weights(config_of(tmp_path))
