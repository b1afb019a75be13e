"""The model card of an export: a README.md with metadata for the Hugging Face Hub and information for users."""

from typing import Any, Literal

import yaml

from isthmus.trainer.checkpoint.train_state import TrainState
from isthmus.trainer.config.loading import to_yaml
from isthmus.trainer.config.schema import StageName, TrainConfig

CARD = "README.md"
_USE = {
    "hf": """```python
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor, GenerationConfig

model = Blip2ForConditionalGeneration.from_pretrained(FOLDER).eval()
processor = Blip2Processor.from_pretrained(FOLDER)
inputs = processor(images=Image.open(PICTURE).convert("RGB"), text="", return_tensors="pt")
tokens = model.generate(**inputs, generation_config=GenerationConfig.from_pretrained(FOLDER))
print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
```""",
    "own": """```
pip install isthmus
isthmus caption FOLDER PICTURE
isthmus ask FOLDER PICTURE "question"
isthmus serve FOLDER
```""",
    "lavis": "`checkpoint.pth` holds the trained part under LAVIS' names: `model.load_checkpoint` of LAVIS reads it.",
    "stage1": "An export of stage 1 holds the Q-Former for retrieval; stage 2 continues from it (`stage2.init_from`).",
}


def model_card(config: TrainConfig, stage: StageName, state: TrainState, *, form: Literal["hf", "own", "lavis"]) -> str:
    """Return the card of an export.

    Args:
        config: Configuration of the run.
        stage: Stage that is exported.
        state: State of the exported checkpoint; its metrics are the figures of its evaluation, if there was one.
        form: Format of the export.
    """
    use = "stage1" if stage == "stage1" and form != "lavis" else form
    sections = [
        _front_matter(stage, is_hf=form == "hf"),
        f"# {config.run.name}",
        _summary(config, stage, state),
        "## Use",
        _USE[use],
        "## Evaluation",
        _figures(state.metrics),
        "## Data",
        _data(config, state),
        "## Frozen parts",
        _frozen(config, stage, state),
        "## Configuration",
        f"```yaml\n{to_yaml(config).strip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(stage: StageName, *, is_hf: bool) -> str:
    fields: dict[str, Any] = {
        "license": "other",
        "license_name": "fill-in",
        "pipeline_tag": "image-to-text" if stage == "stage2" else "zero-shot-image-classification",
        "tags": ["blip-2", "vision-language", "isthmus"],
    }
    if is_hf:
        fields["library_name"] = "transformers"
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _summary(config: TrainConfig, stage: StageName, state: TrainState) -> str:
    trained = config.stage(stage)
    versions = ", ".join(f"{name} {version}" for name, version in state.versions.items())
    return (
        f"A BLIP-2 bridge (Q-Former{' and projection' if stage == 'stage2' else ''}) trained with isthmus: {stage}, "
        f"step {state.step:,} of {trained.steps:,}, global batch {trained.global_batch_size:,}, "
        f"{trained.precision}, {state.step * trained.global_batch_size:,} samples seen. Versions: {versions}.\n\n"
        "The license is that of the strictest part: set `license` above after checking the frozen models and the data."
    )


def _figures(metrics: dict[str, float]) -> str:
    if not metrics:
        return "Not evaluated at this step."
    rows = [f"| {name.removeprefix('eval/')} | {value:.4f} |" for name, value in sorted(metrics.items())]
    return "\n".join(["| figure | held-out data |", "|---|---|", *rows])


def _data(config: TrainConfig, state: TrainState) -> str:
    rows = [f"| {source.manifest} | {source.weight:g} |" for source in config.data.sources]
    identity = f"Identity of data and order: `{state.data_identity}`."
    return "\n".join(["| manifest | weight |", "|---|---|", *rows, "", identity])


def _frozen(config: TrainConfig, stage: StageName, state: TrainState) -> str:
    paths = {"vision": config.model.vision.path}
    if stage == "stage2" and config.model.language is not None:
        paths["language"] = config.model.language.path
    rows = [f"| {part} | {path} | `{state.frozen_identity.get(part, '-')[:16]}` |" for part, path in paths.items()]
    return "\n".join(["| part | weights | SHA-256 |", "|---|---|---|", *rows])
