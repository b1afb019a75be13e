"""Whether models fit a recipe, from their config.json, tokenizer and the shapes of their weights alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from isthmus.cluster.errors import first_line
from isthmus.model.config import LanguageConfig, QFormerConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import LOGIT_RULES, LanguageModel, build_language
from isthmus.model.frozen.vision import image_statistics
from isthmus.model.imports.architecture import check_architecture
from isthmus.model.imports.published import Published, open_published
from isthmus.model.qformer.bert_init import check_dimensions
from isthmus.model.safetensors_io import read_json
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.model.text.qformer_tokenizer import QFormerEncoder
from isthmus.trainer.config.schema import TrainConfig
from isthmus.trainer.errors import ConfigError
from isthmus.trainer.estimate.architectures import load_parts
from isthmus.trainer.estimate.hardware import GIB, Assumptions, Cluster
from isthmus.trainer.estimate.step import divisible, estimate_stage


@dataclass
class ModelChecks:
    """What was found: rows of (part, property, value), and one line for each thing that does not fit."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        try:
            yield
        except (ModelError, ConfigError) as error:
            self.misfits.append(first_line(error))

    def add_language(self, folder: Path, config: LanguageConfig, num_queries: int) -> None:
        """Check weights, tokenizer and context of a language model."""
        with self._collecting():
            model = open_published(folder)
            check_architecture(model, str(folder))
            with torch.device("meta"):
                built = build_language(config, folder, model.tensors.keys())
            self._add_weights("language", model)
            self._add_context(folder, built.context_tokens, config, num_queries)
            self._add_special_cases(built)
        with self._collecting():
            self._add_tokenizer(folder, config)

    def add_vision(self, folder: Path, image_size_pixels: int) -> None:
        """Check weights, image size and preprocessing of an image encoder."""
        with self._collecting():
            model = open_published(folder, "vision")
            check_architecture(model, str(folder))
            self._add_weights("vision", model)
            patch = int(model.config.get("patch_size") or 1)
            self.rows.append(("vision", "image", f"{image_size_pixels} pixels, patches of {patch}"))
            if image_size_pixels % patch:
                self.misfits.append(f"{folder}: patches of {patch} do not divide {image_size_pixels} pixels")
        with self._collecting():
            mean, std = image_statistics(folder)
            self.rows.append(("vision", "mean, std", f"{mean}, {std}"))

    def add_bert(self, folder: Path, config: QFormerConfig, max_text_tokens: int) -> None:
        """Compare dimensions and vocabulary of a BERT folder with the Q-Former."""
        with self._collecting():
            check_dimensions(config, folder)
            self.rows.append(("bert", "dimensions", f"{config.num_layers} layers of {config.hidden_size}"))
        with self._collecting():
            encoder = QFormerEncoder(folder, max_text_tokens)
            self.rows.append(("bert", "vocabulary", f"{encoder.vocab_size:,} with [DEC]"))
            encoder.check(config)

    def add_memory(self, config: TrainConfig, cluster: Cluster) -> None:
        """Estimate the memory of the recipe's stages."""
        with self._collecting():
            parts, _ = load_parts(config)
            for stage in config.stages:
                fitted = divisible(config, cluster.num_gpus)
                estimate = estimate_stage(fitted, stage, parts, cluster, Assumptions())
                memory = f"{estimate.memory.total / GIB:.1f} GiB a GPU at micro-batch {estimate.micro_batch}"
                where = f"{cluster.num_gpus} x {cluster.gpu.name}"
                self.rows.append((stage, "memory", f"{memory} on {where}; fits: {estimate.largest_micro_batch}"))
                if not estimate.largest_micro_batch:
                    self.misfits.append(f"{stage} does not fit into {where}, not even one sample; use more GPUs")

    def _add_weights(self, part: str, model: Published) -> None:
        parameters = sum(tensor.numel for tensor in model.tensors.values())
        types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.tensors.values()})
        self.rows += [
            (part, "type", str(model.config["model_type"])),
            (part, "parameters", f"{parameters:,} as {', '.join(types)}"),
        ]

    def _add_context(self, folder: Path, context: int | None, config: LanguageConfig, num_queries: int) -> None:
        needed = num_queries + config.max_text_tokens
        self.rows.append(("language", "context", f"{context or 'unlimited'} tokens, {needed} needed"))
        if context is not None and needed > context:
            self.misfits.append(
                f"{folder}: {num_queries} queries and {config.max_text_tokens} tokens of text exceed the context of "
                f"{context}; lower model.language.max_text_tokens"
            )

    def _add_special_cases(self, language: LanguageModel) -> None:
        facts = language.model.config
        rules = [rule for rule in LOGIT_RULES if getattr(facts, rule, None) not in (None, 1.0)]
        cases = [f"logits are changed after the head ({rule})" for rule in rules]
        if language.is_encoder_decoder:
            cases.append("encoder-decoder: the prefix goes to the encoder")
        if facts.model_type == "opt":
            cases.append("captions end with a newline, </s> comes first")
        self.rows.append(("language", "special cases", "; ".join(cases) or "none"))

    def _add_tokenizer(self, folder: Path, config: LanguageConfig) -> None:
        encoder = LanguageEncoder(folder, config)
        tokenizer, rows = encoder.tokenizer, int(str(read_json(folder / "config.json").get("vocab_size") or 0))
        names = tokenizer.convert_ids_to_tokens([encoder.pad_id, encoder.stop_id])
        self.rows += [
            ("language", "pad token", f"{names[0]!r} ({encoder.pad_id})"),
            ("language", "stop token", f"{names[1]!r} ({encoder.stop_id})"),
            ("language", "vocabulary", f"{len(tokenizer):,} tokens, {rows:,} embeddings"),
        ]
        # A pad token without a row is replaced, see LanguageEncoder.pad_id.
        beyond = {i for i in tokenizer.get_vocab().values() if i >= rows} - {tokenizer.pad_token_id}
        if rows and beyond:
            self.misfits.append(
                f"{folder}: {len(beyond)} tokens have no embedding, the first is {min(beyond)} of {rows:,} rows; "
                "the tokenizer belongs to another model"
            )
