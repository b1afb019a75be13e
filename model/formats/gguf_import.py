"""Turn a GGUF file (quantised weights and tokenizer in one file) into a Hugging Face folder with bf16 safetensors."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from isthmus.model.errors import ModelError
from isthmus.model.safetensors_io import replace_folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write `folder` with config.json, tokenizer and model.safetensors (bf16) from a Llama-like GGUF file, atomically.

    Needs the packages gguf and accelerate (extra `demo`). The dequantised model cannot be saved as transformers loads
    it (it keeps its quantiser), so its weights move into a plain model of the same configuration.

    Raises:
        ModelError: the file is damaged or holds another architecture, or the packages are not installed.
    """
    try:
        source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ModelError(f"{file}: reading GGUF needs gguf and accelerate: pip install 'isthmus[demo]'") from error
    except (ValueError, OSError, KeyError, IndexError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file}: cannot be read as GGUF ({cause:.160}); download the file again") from error
    if source.config.model_type != "llama":
        raise ModelError(f"{file}: architecture {source.config.model_type}; only llama files can be converted")
    fields = {key: value for key, value in source.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with replace_folder(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
