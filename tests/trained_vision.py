"""A small image encoder trained to name the colour, shape and size in a picture: the frozen eye of the tests.

It learns from labels alone (no text, no order of words), as an image classifier does. Labels are read from the mean of
the feature map, so that an even look at all patches, which is how a bridge begins, already sees something.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.tiny.scenes import COLOURS, SHAPES, SIZES, draw_scene, make_scene
from model.efficientnet_lite import EfficientNetLite

BATCH = 64
QUESTIONS = (tuple(COLOURS), SHAPES, tuple(SIZES))
"""Possible answers to each: what colour, what shape, what size."""
# Repeats, kernel, stride, expansion, channels: 64 pixels become 4 x 4 patches.
STAGES = ((1, 3, 2, 2, 32), (1, 3, 2, 2, 48), (1, 3, 2, 2, 64))
MEAN, STD = 0.5, 0.25


def write_trained_vision(folder: Path, *, steps: int, num_scenes: int = 2000, width: int = 64) -> float:
    """Write an encoder folder and return the share of fresh scenes whose labels it names without a mistake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, head = EfficientNetLite(STAGES, width), nn.Linear(width, sum(map(len, QUESTIONS)))
        images, labels = labelled_scenes("eye", num_scenes)
        parameters = [*network.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH,))
            answers = zip(_answers(network, head, images[chosen]), labels[chosen].T, strict=True)
            loss = torch.stack([F.cross_entropy(logits, right) for logits, right in answers]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()
    write_vision(folder, network, width)
    fresh, truth = labelled_scenes("test of the eye", 256)
    with torch.no_grad():
        said = torch.stack([logits.argmax(dim=1) for logits in _answers(network, head, fresh)], dim=1)
    return float((said == truth).float().amin(dim=1).mean())


def write_vision(folder: Path, network: nn.Module, width: int) -> None:
    """Write weights, description and pixel statistics as the published encoder's folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    description = {"model_type": "efficientnet-lite", "stages": STAGES, "hidden_size": width}
    (folder / "config.json").write_text(json.dumps(description))
    statistics = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def labelled_scenes(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images B, C, H, W of one thing each, and int64 [B, 3]: its colour, shape and size."""
    images, labels = [], []
    for number in range(count):
        scene, rng = make_scene(2, split, number, ("one",))
        images.append(np.asarray(draw_scene(scene, rng)))
        thing = scene.things[0]
        said = (thing.colour, thing.shape, thing.size)
        labels.append([answers.index(answer) for answers, answer in zip(QUESTIONS, said, strict=True)])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _answers(network: nn.Module, head: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Return the logits of each question."""
    mean_BC = network((images.float() / 255 - MEAN) / STD).flatten(2).mean(dim=2)
    return torch.split(head(mean_BC), [len(answers) for answers in QUESTIONS], dim=1)
