"""An exported model on this machine: image files in, text out, for all commands that use one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.sample.images import decode_image, resize_whole
from isthmus.data_pipeline.store.object_store import NotFoundError, ObjectStore, join
from isthmus.model.decoding import Decoding
from isthmus.model.formats.captioner import load_captioner
from isthmus.model.generate import generate
from isthmus.trainer.frozen.node_cache import local_folder
from isthmus.trainer.runs.store import RUN, export_folder, read_run

MAX_IMAGE_PIXELS = int(DataConfig.model_fields["max_image_pixels"].default)


class Captioner:
    """A captioning model with its tokenizer, on the GPU if there is one."""

    def __init__(self, folder: Path) -> None:
        """Load a native export.

        Raises:
            ModelError: no export, or one of stage 1.
        """
        model, self.encoder = load_captioner(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)

    @classmethod
    def open(cls, place: str, store: ObjectStore) -> "Captioner":
        """Load an export, or the export of a run, from a local folder or a bucket."""
        try:
            store.head(join(place, RUN))
        except NotFoundError:
            return cls(local_folder(place.rstrip("/"), store))
        return cls(local_folder(join(place, export_folder(read_run(place, store))), store))

    def pixels(self, images: Sequence[bytes]) -> Tensor:
        """Return images as the encoder expects them: upright, resized to its square, normalised; B, C, H, W.

        Raises:
            BadSample: a picture cannot be decoded or has too many pixels.
        """
        vision = self.model.vision
        assert vision is not None  # an export holds its encoder
        side = vision.config.image_size_pixels
        squares = [resize_whole(decode_image(image, MAX_IMAGE_PIXELS), side) for image in images]
        return vision.normalize(torch.from_numpy(np.stack(squares)).to(self.device).permute(0, 3, 1, 2))

    def write(self, images: Sequence[bytes], prompts: Sequence[str | None], decoding: Decoding) -> list[str]:
        """Return one text per image, continuing its prompt; None means the prompt of training."""
        texts = [self.encoder.config.prompt if prompt is None else prompt for prompt in prompts]
        return generate(self.model, self.encoder, self.pixels(images), texts, decoding)
