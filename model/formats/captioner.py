"""Loads a whole model into one process from a native export or a transformers BLIP-2 folder."""

import tempfile
from pathlib import Path
from typing import cast

from isthmus.model.config import Stage1LossConfig
from isthmus.model.errors import ModelError
from isthmus.model.formats.hf_import import import_blip2
from isthmus.model.formats.key_mapping import reference_name
from isthmus.model.formats.native import DESCRIPTION, bridge_configs, load_trained
from isthmus.model.frozen.language import load_language
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.model.text.qformer_tokenizer import QFormerEncoder

Loaded = tuple[Stage1Model, QFormerEncoder] | tuple[Stage2Model, LanguageEncoder]


def load_captioner(folder: Path) -> tuple[Stage2Model, LanguageEncoder]:
    """Return the model, in eval mode, and its tokeniser.

    Args:
        folder: native export, or a `Blip2ForConditionalGeneration` folder, which is what EVA-CLIP runs export.

    Raises:
        ModelError: neither of them, or an export of stage 1.
    """
    model, encoder = load_export(folder)
    if isinstance(model, Stage1Model):
        raise ModelError(f"{folder}: an export of stage 1 has no language model; give one of stage 2")
    return model, cast(LanguageEncoder, encoder)


def load_export(folder: Path) -> Loaded:
    """Return the model of either stage, in eval mode, and its tokeniser.

    Args:
        folder: native export, or a folder of `Blip2ForConditionalGeneration` or `Blip2ForImageTextRetrieval`.

    Raises:
        ModelError: none of them, or one of stage 1 without the Q-Former's vocabulary.
    """
    if (folder / DESCRIPTION).exists():
        return _load_native(folder)
    with tempfile.TemporaryDirectory() as place:
        import_blip2(folder, Path(place) / "native")
        loaded = _load_native(Path(place) / "native")
        _ = loaded[1].tokenizer  # loaded before its folder goes
    return loaded


def _load_native(folder: Path) -> Loaded:
    qformer_config, vision_config, language_config = bridge_configs(folder)
    vision = load_vision(vision_config, folder / "vision")
    if language_config is None:
        if not (folder / "tokenizer").is_dir():
            raise ModelError(f"{folder}: contains no Q-Former tokenizer; import it again with --tokenizer")
        retriever = Stage1Model(vision, QFormer(qformer_config, vision.width))
        # transformers' retrieval model has no temperature and no language head: only training reads them.
        trained_only = [name for name in retriever.trainable_parameters() if reference_name(name, "hf") is None]
        load_trained(retriever, folder, optional=trained_only)
        return retriever.eval(), QFormerEncoder(folder / "tokenizer", Stage1LossConfig().max_text_tokens)
    qformer = QFormer(qformer_config, vision.width, with_text=False)
    model = Stage2Model(vision, qformer, load_language(language_config, folder / "language"))
    load_trained(model, folder)
    return model.eval(), LanguageEncoder(folder / "language", language_config)
