"""Load a whole captioning model of one process from an own export."""

from pathlib import Path

from isthmus.model.errors import ModelError
from isthmus.model.formats.native import bridge_configs, load_trained
from isthmus.model.frozen.language import load_language
from isthmus.model.frozen.vision import load_vision
from isthmus.model.objectives.stage2 import Stage2Model
from isthmus.model.qformer.qformer import QFormer
from isthmus.model.text.language_tokenizer import LanguageEncoder


def load_captioner(folder: Path) -> tuple[Stage2Model, LanguageEncoder]:
    """Return the model, in eval mode, and its tokeniser.

    Raises:
        ModelError: no own export, or one of stage 1.
    """
    qformer_config, vision_config, language_config = bridge_configs(folder)
    if language_config is None:
        raise ModelError(f"{folder}: an export of stage 1 has no language model; give one of stage 2")
    vision = load_vision(vision_config, folder / "vision")
    qformer = QFormer(qformer_config, vision.width, with_text=False)
    model = Stage2Model(vision, qformer, load_language(language_config, folder / "language"))
    load_trained(model, folder)
    return model.eval(), LanguageEncoder(folder / "language", language_config)
