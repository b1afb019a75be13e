"""The frozen language model behind one small protocol: token embeddings, hidden states, and logits at target positions.

Letters: B rows, Q queries, T text tokens, L = Q + T, D width, N target tokens of all rows, V vocabulary.

In training the weights are ZeRO-3 partitions that exist only while a module's forward runs, so nothing here reads a
`.weight`: embedding, backbone and head are called as modules. Logits are formed at the N target tokens only: with a
vocabulary of 50272 the head and the loss over all B * L positions would cost as much as half of a 125M-parameter model.
"""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, masking_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from isthmus.model.config import LanguageConfig
from isthmus.model.errors import ModelError
from isthmus.model.safetensors_io import copy_checked, tensor_files
from isthmus.model.text.language_batch import IGNORED, LanguageTokens

ENCODER_DECODER_TYPES = ("t5", "mt5", "umt5")
OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.(attn|attention|self_attention)\.(masked_)?bias$")
"""Constants, masks among them, that older versions of transformers wrote into the files."""
# Models that change the logits after lm_head; for these the model's own head path is used.
LOGIT_RULES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class LanguageModel(nn.Module):
    """A frozen `transformers` model; `weight_names` maps each parameter to its tensor in the files, without repeats."""

    is_encoder_decoder: ClassVar[bool]

    def __init__(self, model: PreTrainedModel, config: LanguageConfig, weight_names: Mapping[str, str]) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.weight_names = dict(weight_names)
        model.requires_grad_(requires_grad=False)
        # Generation takes the last position of B, L, D. From such a view torch computes B products with B copies of the
        # head's weight: tens of GB for some hundred rows.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        if config.activation_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.train(mode=False)

    @property
    def width(self) -> int:
        """Width of the token embeddings, which the projected queries must have."""
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def context_tokens(self) -> int | None:
        """Longest input in positions, queries included; None means unlimited (relative positions)."""
        return None if self.is_encoder_decoder else getattr(self.model.config, "max_position_embeddings", None)

    @property
    def decoder_start_id(self) -> int | None:
        """First decoder token of an encoder-decoder; none for the others."""
        start = getattr(self.model.config, "decoder_start_token_id", None) if self.is_encoder_decoder else None
        return self.model.config.pad_token_id if self.is_encoder_decoder and start is None else start

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stay in eval mode unless `config.dropout` asks for the original's behaviour."""
        super().train(mode and self.config.dropout)
        if self.config.activation_checkpointing and mode:
            for layer in self.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # it recomputes only in train mode; dropout is zero or wanted
        return self

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Return the token embeddings as B, T, D."""
        embedded: Tensor = self.model.get_input_embeddings()(ids_BT)
        return embedded

    def target_logits(self, visual_BQD: Tensor, tokens: LanguageTokens) -> Tensor:
        """Return the logits of all K targets, K, V, row by row."""
        raise NotImplementedError

    def forward(self, visual_BQD: Tensor, tokens: LanguageTokens) -> Tensor:
        """Return the cross-entropy summed over the targets (no label smoothing), as fp32.

        The model runs in its own type, as the vision encoder does: autocast would cast between its layers.
        """
        with torch.autocast(visual_BQD.device.type, enabled=False), _no_packed_sequences():
            logits_KV = self.target_logits(visual_BQD, tokens)
            return F.cross_entropy(logits_KV.float(), tokens.label_K, ignore_index=IGNORED, reduction="sum")

    def inputs(self, visual_BQD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries followed by text as embeddings (B, L, D) and the mask (B, L)."""
        text_BTD = self.embed(ids_BT)
        if visual_BQD.shape[-1] != text_BTD.shape[-1]:
            raise ModelError(
                f"projected queries have width {visual_BQD.shape[-1]}, the language model's embeddings "
                f"{text_BTD.shape[-1]}; the projection belongs to another language model"
            )
        embeds_BLD = torch.cat([visual_BQD.to(text_BTD.dtype), text_BTD], dim=1)
        return embeds_BLD, torch.cat([mask_BT.new_ones(visual_BQD.shape[:2]), mask_BT], dim=1)


class DecoderLanguageModel(LanguageModel):
    """Decoder only (OPT, Llama, Qwen, ...): text follows the queries; all attention is causal, as in the original."""

    is_encoder_decoder = False

    def target_logits(self, visual_BQD: Tensor, tokens: LanguageTokens) -> Tensor:
        """Labels stand under the tokens that they repeat: column t is predicted from what precedes it."""
        embeds_BLD, _ = self.inputs(visual_BQD, tokens.input_ids_BT, tokens.attention_mask_BT)
        # The token at column t is predicted from the position before it; the first one from the last query.
        rows_K, positions_K = tokens.row_K, tokens.column_K + visual_BQD.shape[1] - 1
        # No mask: padding follows the text, so causal attention alone keeps it from every target.
        inputs = {"inputs_embeds": embeds_BLD, "use_cache": False}
        if any(getattr(self.model.config, rule, None) is not None for rule in LOGIT_RULES):
            logits_KV: Tensor = self.model(**inputs).logits[rows_K, positions_K]
        else:
            hidden_BLD = self.model.base_model(**inputs).last_hidden_state
            logits_KV = self.model.get_output_embeddings()(hidden_BLD[rows_K, positions_K])
        return logits_KV


class EncoderDecoderLanguageModel(LanguageModel):
    """T5 family: queries and prefix in the encoder, targets in the decoder."""

    is_encoder_decoder = True

    def target_logits(self, visual_BQD: Tensor, tokens: LanguageTokens) -> Tensor:
        """Labels are the decoder's output; its input is the labels shifted right behind the start token."""
        embeds_BLD, mask_BL = self.inputs(visual_BQD, tokens.input_ids_BT, tokens.attention_mask_BT)
        mask = self._attention_mask(mask_BL)
        encoded_BLD = self.model.encoder(inputs_embeds=embeds_BLD, attention_mask=mask).last_hidden_state
        # Padding only follows a row's targets, so the causal mask alone keeps it from them.
        hidden_BTD = self.model.decoder(
            inputs_embeds=self.embed(self.model._shift_right(tokens.labels_BT)),
            encoder_hidden_states=encoded_BLD,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        hidden_KD = hidden_BTD[tokens.row_K, tokens.column_K]
        if self.model.config.scale_decoder_outputs:
            hidden_KD = hidden_KD * self.model.model_dim**-0.5
        logits_KV: Tensor = self.model.lm_head(hidden_KD)
        return logits_KV

    def _attention_mask(self, mask_BL: Tensor) -> Tensor:
        """Return the mask as transformers would make it: given B, L it first asks the device whether all are ones."""
        if self.model.config._attn_implementation != "sdpa":
            return mask_BL
        return mask_BL[:, None, None, :].bool()


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Keep transformers from looking for several sequences in a row: that waits for the device, and there are none."""
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield


def build_language(config: LanguageConfig, folder: Path, tensor_names: Collection[str] | None = None) -> LanguageModel:
    """Build the frozen model of `folder` (config.json) with weights tied but not yet loaded.

    May run under `deepspeed.zero.Init`. `tensor_names` are the names in the weight files; None means those of `folder`.
    Each entry of the result's `weight_names` (name in `named_parameters()` -> name in the files) is to be filled.

    Raises:
        ModelError: unknown architecture, no `inputs_embeds`, or the files lack tensors or hold others.
    """
    names = tensor_files(folder) if tensor_names is None else tensor_names
    hf_config = _hf_config(folder, dropout=config.dropout)
    factory: Any = AutoModelForSeq2SeqLM if hf_config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with no_init_weights():
            model = factory.from_config(hf_config, dtype=getattr(torch, config.torch_dtype))
    except ValueError as error:
        raise ModelError(
            f"{folder}: transformers has no language model of type {hf_config.model_type}; model.language.path must "
            "be the folder of a decoder or of T5"
        ) from error
    _check_takes_embeddings(model, folder)
    weight_names = _tie_and_map(model, set(names), folder)
    kind = EncoderDecoderLanguageModel if hf_config.is_encoder_decoder else DecoderLanguageModel
    return kind(model, config, {f"model.{name}": tensor for name, tensor in weight_names.items()})


def load_language(config: LanguageConfig, folder: Path) -> LanguageModel:
    """Build the frozen model and read all its weights into this process."""
    language = build_language(config, folder)
    files = tensor_files(folder)
    parameters = dict(language.named_parameters())
    for path in sorted(set(files.values())):
        with safe_open(str(path), "pt") as file:
            for name, tensor_name in language.weight_names.items():
                if files[tensor_name] == path:
                    copy_checked(parameters[name], file.get_tensor(tensor_name), tensor_name, str(folder))
    return language


def _hf_config(folder: Path, *, dropout: bool) -> Any:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json; model.language.path must be a Hugging Face folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: config.json cannot be read by transformers: {line:.200}") from error
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODER_TYPES:
        raise ModelError(
            f"{folder}: encoder-decoder of type {config.model_type}; supported are {', '.join(ENCODER_DECODER_TYPES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{folder}: the weights are quantised (quantization_config in config.json); the frozen model is read in "
            "float32, bfloat16 or float16: take the folder of the model before quantisation"
        )
    if not dropout:
        for key, value in vars(config).items():
            if ("dropout" in key or "pdrop" in key or key == "layerdrop") and isinstance(value, int | float):
                setattr(config, key, 0.0)
    return config


def _check_takes_embeddings(model: PreTrainedModel, folder: Path) -> None:
    module = model.encoder if model.config.is_encoder_decoder else model.base_model
    if "inputs_embeds" not in inspect.signature(module.forward).parameters:
        raise ModelError(
            f"{folder}: {type(model).__name__} takes no inputs_embeds, so the projected queries cannot be fed to it; "
            "choose a model whose forward has that argument (OPT, Llama, Qwen, T5, ...)"
        )


def _tie_and_map(model: PreTrainedModel, names: set[str], folder: Path) -> dict[str, str]:
    """Tie what the files do not hold separately; return parameter name -> tensor name, each parameter once.

    The files decide, not the configuration: transformers 5 claims `tie_word_embeddings` for every T5, although the
    v1.1 and Flan files hold an lm_head of their own.
    """
    prefix = f"{model.base_model_prefix}."
    spelled = {name: _spelling(name, prefix, names) for name, _ in model.named_parameters(remove_duplicate=False)}
    groups: dict[str, list[str]] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        groups.setdefault(source, [source]).append(target)
    for group in groups.values():
        held = [name for name in group if spelled.get(name)]
        for name in group if held else []:
            if name not in held:
                _set_parameter(model, name, model.get_parameter(held[0]))
    own = [name for name, _ in model.named_parameters()]
    missing = sorted(name for name in own if not spelled[name])
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), *OLD_BUFFERS]
    tied = {tensor for tensor in spelled.values() if tensor}
    extra = sorted(name for name in names - tied if not any(_matches(pattern, name) for pattern in ignored))
    if (missing or extra) and get_checkpoint_conversion_mapping(model.config.model_type):
        raise ModelError(
            f"{folder}: transformers renames or merges tensors of {model.config.model_type} models while it reads "
            "them, which sharded reading cannot do; choose another family (docs/operators.md)"
        )
    if missing or extra:
        raise ModelError(
            f"{folder}: the files and {type(model).__name__} do not match: missing {_few(missing)}, "
            f"unexpected {_few(extra)}; config.json and weights belong to different models"
        )
    return {name: str(spelled[name]) for name in own}


def _spelling(name: str, prefix: str, names: set[str]) -> str | None:
    """Return the name under which the files hold a parameter: bare models leave out or add the base prefix."""
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in names:
            return candidate
    return None


def _matches(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


def _few(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
