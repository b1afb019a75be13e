"""Checks whether models fit a recipe, using only their configuration, tokenizer and tensor shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from isthmus.cluster.checks.dry_run import Images, run_stage1, run_stage2
from isthmus.cluster.checks.model_headers import Headers
from isthmus.cluster.errors import first_line
from isthmus.model.config import LanguageConfig
from isthmus.model.errors import ModelError
from isthmus.model.frozen.language import LOGIT_RULES, LanguageModel, build_language
from isthmus.model.frozen.vision import VisionEncoder, build_vision
from isthmus.model.imports.architecture import check_architecture
from isthmus.model.qformer.bert_init import check_dimensions
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

    config: TrainConfig
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    _language: tuple[LanguageModel, LanguageEncoder] | None = None
    _vision: VisionEncoder | None = None

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        try:
            yield
        except (ModelError, ConfigError) as error:
            self.misfits.append(first_line(error))

    def add_language(self, found: Headers) -> None:
        """Check weights, tokenizer and context of a language model."""
        config = self.config.model_at("stage2" if self.config.stage2 else "stage1")
        assert config.language is not None
        # Recomputation does not know the meta device and changes no shape.
        language = config.language.model_copy(update={"activation_checkpointing": False})
        built: LanguageModel | None = None
        with self._collecting():
            check_architecture(found.model, found.place)
            with torch.device("meta"):
                built = build_language(language, found.folder, found.model.tensors.keys())
            self._add_weights("language", found)
            self._add_context(found.place, built.context_tokens, language, config.qformer.num_queries)
            self._add_special_cases(built)
        with self._collecting():
            encoder = LanguageEncoder(found.folder, language)
            self._add_tokenizer(found, encoder)
            self._language = (built, encoder) if built else None

    def add_vision(self, found: Headers) -> None:
        """Check weights, image size and preprocessing of an image encoder."""
        config = self.config.model_at(self.config.stages[0]).vision
        with self._collecting():
            check_architecture(found.model, found.place)
            self._add_weights("vision", found)
            patch, side = int(found.model.config.get("patch_size") or 1), config.image_size_pixels
            self.rows.append(("vision", "image", f"{side} pixels, patches of {patch}"))
            if side % patch:
                raise ModelError(f"{found.place}: patches of {patch} do not divide {side} pixels")
            with torch.device("meta"):
                self._vision = build_vision(config, found.folder)
            self.rows.append(("vision", "features", f"{self._vision.num_patches} of width {self._vision.width}"))
            self.rows.append(("vision", "mean, std", f"{self._vision.image_mean}, {self._vision.image_std}"))

    def add_bert(self, found: Headers) -> None:
        """Compare weights, dimensions and vocabulary of a BERT with the Q-Former."""
        config, stage1 = self.config.model.qformer, self.config.stage1
        with self._collecting():
            check_dimensions(config, found.folder)
            check_architecture(found.model, found.place)
            self.rows.append(("bert", "dimensions", f"{config.num_layers} layers of {config.hidden_size}"))
        with self._collecting():
            encoder = QFormerEncoder(found.folder, stage1.loss.max_text_tokens if stage1 else config.max_positions)
            self.rows.append(("bert", "vocabulary", f"{encoder.vocab_size:,} with [DEC]"))
            encoder.check(config)

    def add_steps(self) -> None:
        """Run a step of each stage on the meta device, unless something did not fit before."""
        if self.misfits or self._language is None:
            return
        with self._collecting():
            images = Images(self._vision, load_parts(self.config)[0].vision)
            for stage in self.config.stages:
                step = (
                    run_stage1(self.config, images)
                    if stage == "stage1"
                    else run_stage2(self.config, images, *self._language)
                )
                self.rows.append((stage, "trained", f"{step.num_trained:,} parameters"))
                self.rows.append((stage, "losses", f"{', '.join(step.losses)}: forward and backward, all shapes agree"))

    def add_memory(self, cluster: Cluster) -> None:
        """Estimate the memory of the recipe's stages."""
        with self._collecting():
            parts, _ = load_parts(self.config)
            for stage in self.config.stages:
                fitted = divisible(self.config, cluster.num_gpus)
                estimate = estimate_stage(fitted, stage, parts, cluster, Assumptions())
                memory = f"{estimate.memory.total / GIB:.1f} GiB a GPU at micro-batch {estimate.micro_batch}"
                where = f"{cluster.num_gpus} x {cluster.gpu.name}"
                self.rows.append((stage, "memory", f"{memory} on {where}; fits: {estimate.largest_micro_batch}"))
                if not estimate.largest_micro_batch:
                    self.misfits.append(f"{stage} does not fit into {where}, not even one sample; use more GPUs")

    def _add_weights(self, part: str, found: Headers) -> None:
        tensors = found.model.tensors.values()
        types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        how = ", ".join(types) if found.compared else "PyTorch files, not compared before isthmus models get"
        self.rows += [
            (part, "type", str(found.model.config["model_type"])),
            (part, "parameters", f"{sum(tensor.numel for tensor in tensors):,} as {how}"),
        ]

    def _add_context(self, place: str, context: int | None, config: LanguageConfig, num_queries: int) -> None:
        needed = num_queries + config.max_text_tokens
        self.rows.append(("language", "context", f"{context or 'unlimited'} tokens, {needed} needed"))
        if context is not None and needed > context:
            self.misfits.append(
                f"{place}: {num_queries} queries and {config.max_text_tokens} tokens of text exceed the context of "
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

    def _add_tokenizer(self, found: Headers, encoder: LanguageEncoder) -> None:
        tokenizer, rows = encoder.tokenizer, int(str(found.model.config.get("vocab_size") or 0))
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
                f"{found.place}: {len(beyond)} tokens have no embedding, the first is {min(beyond)} of {rows:,} rows; "
                "the tokenizer belongs to another model"
            )
