"""A small image encoder trained to tag pictures with what is in them: the frozen encoder of the tests.

It learns from tags alone (no text, no order of words), as an image classifier does. Tags are read from the mean of
the feature map, so that even attention to all patches, which is how a bridge begins, already sees something.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.demo.tiny.scenes import COLOURS, COUNTS, SHAPES, SIZES, Scene, draw_scene, make_scene
from isthmus.model.frozen.efficientnet_lite import EfficientNetLite

BATCH = 64
PEAK_LR = 4e-3
QUESTIONS = (tuple(COLOURS), SHAPES, tuple(SIZES), tuple(COUNTS.values()))
"""Tags that answer each: which colours, which shapes, what size, how many of the first thing."""
# Repeats, kernel, stride, expansion, channels: 64 pixels become 4 x 4 patches.
STAGES = ((1, 3, 2, 2, 32), (1, 3, 2, 3, 64), (1, 3, 2, 3, 96))
MEAN, STD = 0.5, 0.25
SHIFT_PIXELS = 4


def write_trained_vision(
    folder: Path, *, kinds: Sequence[str], steps: int, num_scenes: int = 4000, width: int = 64
) -> float:
    """Write an encoder folder and return the share of fresh scenes that it tags without a mistake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, head = EfficientNetLite(STAGES, width), nn.Linear(width, sum(map(len, QUESTIONS)))
        images, tags = tagged_scenes("eye", num_scenes, kinds)
        optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=PEAK_LR, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.2)
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH,))
            loss = _loss(_tag(network, head, _shifted(images[chosen])), tags[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()
    write_vision(folder, network, width)
    fresh, truth = tagged_scenes("test of the eye", 512, kinds)
    with torch.no_grad():
        said = _tag(network, head, fresh)
    right = [_is_right(*part) for part in zip(_by_question(said), _by_question(truth), strict=True)]
    return float(torch.stack(right).all(dim=0).float().mean())


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


def tagged_scenes(split: str, count: int, kinds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return uint8 images B, C, H, W and float tags B, T: 1 where the picture has it."""
    images, tags = [], []
    for number in range(count):
        scene, rng = make_scene(2, split, number, kinds)
        images.append(np.asarray(draw_scene(scene, rng)))
        present = _tags(scene)
        tags.append([float(tag in present) for question in QUESTIONS for tag in question])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(tags)


def _tags(scene: Scene) -> set[str]:
    """Return what is to be seen: colours, shapes, a size where it is told, how many there are of the first thing."""
    words = {COUNTS[scene.things[0].count]}
    for thing in scene.things:
        words |= {thing.colour, thing.shape, thing.size}
    return words


def _shifted(images_BCHW: Tensor) -> Tensor:
    """Move all pictures of a batch by the same few pixels; what comes in at the edge is the edge's grey."""
    side = images_BCHW.shape[-1]
    padded = F.pad(images_BCHW.float(), (SHIFT_PIXELS,) * 4, mode="replicate")
    top, left = torch.randint(2 * SHIFT_PIXELS + 1, (2,)).tolist()
    return padded[:, :, top : top + side, left : left + side]


def _loss(logits_BT: Tensor, tags_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy of the questions, each against an even share for each of its true tags."""
    losses = []
    for logits, tags in zip(_by_question(logits_BT), _by_question(tags_BT), strict=True):
        shares = tags / tags.sum(dim=1, keepdim=True).clamp_min(1)
        losses.append(F.cross_entropy(logits, shares))
    return torch.stack(losses).sum()


def _by_question(values_BT: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values_BT, [len(question) for question in QUESTIONS], dim=1)


def _is_right(logits_BT: Tensor, tags_BT: Tensor) -> Tensor:
    """Return for each picture whether the true tags come first, bool B."""
    worst_true = logits_BT.masked_fill(tags_BT == 0, torch.inf).amin(dim=1)
    best_wrong = logits_BT.masked_fill(tags_BT == 1, -torch.inf).amax(dim=1)
    return worst_true > best_wrong


def _tag(network: nn.Module, head: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return the logit of each tag, B, T."""
    logits_BT: Tensor = head(network((images_BCHW.float() / 255 - MEAN) / STD).flatten(2).mean(dim=2))
    return logits_BT
