"""A batch of the data pipeline on its way to the model: on the device, flipped, normalised."""

from typing import Any

import torch
from torch import Tensor

from isthmus.data_pipeline.reading.batch import Batch


def preprocess_images(batch: Batch, vision: Any, device: torch.device) -> Tensor:
    """Return the batch's images as the encoder reads them: on the device, flipped where asked, float, normalised."""
    images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
    flip_B111 = batch.flip_B.to(device, non_blocking=True)[:, None, None, None]
    return normalize(torch.where(flip_B111, images_BCHW.flip(-1), images_BCHW), vision)


def normalize(images_BCHW: Tensor, vision: Any) -> Tensor:
    """Return uint8 images, in any memory format, as contiguous floats with the encoder's mean and deviation."""
    device = images_BCHW.device
    mean_C11 = torch.as_tensor(vision.image_mean, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    std_C11 = torch.as_tensor(vision.image_std, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    return (images_BCHW.to(torch.float32, memory_format=torch.contiguous_format) / 255.0 - mean_C11) / std_C11
