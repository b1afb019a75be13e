"""Stage 1 as the paper describes it (tests/reference), for the ratio: padded text, a pass per loss, nothing shared."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from benchmarks.gpu.measure import Step
from isthmus.data_pipeline.reading.batch import Batch
from tests.reference import stage1 as plain

TEXT_TOKENS = 32


def training_step(task: Any, batch: Batch) -> Step:
    """Return a function that trains one step of the task's model on the batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = task.model.to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-5, fused=device.type == "cuda")
    missing = TEXT_TOKENS - batch.tokens["input_ids"].shape[1]
    names = ("input_ids", "attention_mask")
    padded = batch._replace(tokens={name: pad(batch.tokens[name], (0, max(0, missing))) for name in names})

    def step(index: int) -> None:
        inputs = task.inputs(padded)
        inputs = replace(inputs, image_BPD=model.vision(inputs.images_BCHW).float(), images_BCHW=None)
        with device, torch.autocast(device.type, dtype=torch.bfloat16):
            loss = plain.total(model, plain.losses(model, inputs, step=index))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
