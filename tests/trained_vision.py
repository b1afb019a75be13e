"""A small image encoder trained to say which coloured shapes and sizes are in a picture: the frozen eye of the tests.

It learns from labels alone (a list of things per picture, no text, no order), as an image classifier does.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTModel

from cluster.tiny.scenes import COLOURS, KINDS, SHAPES, Scene, draw_scene, make_scene
from model.tiny_parts import write_tiny_vision

BATCH = 64
LABELS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES] + ["small", "large"]


def write_trained_vision(
    folder: Path, *, steps: int, num_scenes: int = 6000, width: int = 64, num_layers: int = 3
) -> float:
    """Write an encoder folder and return the loss at the end of its training."""
    write_tiny_vision(folder, width=width, num_layers=num_layers)
    torch.manual_seed(0)
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    head = nn.Linear(width, len(LABELS))
    images, labels = labelled_scenes(num_scenes)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        pixels = (images[chosen].float() / 255 - 0.5) / 0.25
        states = network(pixels).last_hidden_state[:, 1:]
        # The best patch speaks for the picture, so that patches, not the class token, carry what is seen.
        logits = head(states).logsumexp(dim=1) - np.log(states.shape[1])
        loss = F.binary_cross_entropy_with_logits(logits, labels[chosen]) * 10
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    network.eval().save_pretrained(folder)
    return float(loss)


def labelled_scenes(count: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images B, C, H, W and multi-hot labels of scenes that no test uses."""
    images, labels = [], []
    for number in range(count):
        scene, rng = make_scene(2, "eye", number, KINDS)
        images.append(np.asarray(draw_scene(scene, rng)))
        labels.append(label(scene))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def label(scene: Scene) -> list[float]:
    """Return which labels hold of a scene."""
    words = {f"{thing.colour} {thing.shape}" for thing in scene.things} | {thing.size for thing in scene.things}
    return [float(name in words) for name in LABELS]
