"""Load a whole captioning model into one process from an export: ours, or transformers' BLIP-2."""

import tempfile
from pathlib import Path

from isthmus.model.errors import ModelError
from isthmus.model.formats.hf_import import import_blip2
from isthmus.model.formats.native import DESCRIPTION, bridge_configs, load_trained
from isthmus.model.frozen.language import load_language
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_tokenizer import LanguageEncoder


def load_captioner(folder: Path) -> tuple[Stage2Model, LanguageEncoder]:
    """Return the model, in eval mode, and its tokeniser.

    Args:
        folder: own export, or a `Blip2ForConditionalGeneration` folder, which is what EVA-CLIP runs export.

    Raises:
        ModelError: neither of them, or an export of stage 1.
    """
    if (folder / DESCRIPTION).exists():
        return _load_native(folder)
    with tempfile.TemporaryDirectory() as place:
        import_blip2(folder, Path(place) / "native")
        model, encoder = _load_native(Path(place) / "native")
        _ = encoder.tokenizer  # loaded before its folder goes
    return model, encoder


def _load_native(folder: Path) -> tuple[Stage2Model, LanguageEncoder]:
    qformer_config, vision_config, language_config = bridge_configs(folder)
    if language_config is None:
        raise ModelError(f"{folder}: an export of stage 1 has no language model; give one of stage 2")
    vision = load_vision(vision_config, folder / "vision")
    qformer = QFormer(qformer_config, vision.width, with_text=False)
    model = Stage2Model(vision, qformer, load_language(language_config, folder / "language"))
    load_trained(model, folder)
    return model.eval(), LanguageEncoder(folder / "language", language_config)
