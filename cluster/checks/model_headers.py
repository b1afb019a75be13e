"""A model opened without reading its weights: configuration, tokenizer, tensor shapes."""

from dataclasses import dataclass
from pathlib import Path

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.imports.architecture import shapes_by_config
from isthmus.model.imports.hub import read_headers
from isthmus.model.imports.published import Part, Published, choose_part, open_published, read_config
from isthmus.model.imports.tensors import shape_only
from isthmus.trainer.frozen.node_cache import WEIGHT_FILES, local_folder
from isthmus.trainer.frozen.safetensors_index import read_entries


@dataclass(frozen=True)
class Headers:
    """A model of which no weights were read.

    Attributes:
        place: What the operator wrote.
        folder: Local folder with config.json and the tokenizer's files.
        model: Configuration and shapes.
        compared: Whether the shapes are those of the files; if not, they follow from the configuration.
    """

    place: str
    folder: Path
    model: Published
    compared: bool = True


def open_headers(place: str, store: ObjectStore, part: Part = "auto") -> Headers:
    """Open a local folder, a folder of a bucket or a name on the Hugging Face Hub.

    Raises:
        ModelError, TrainerError, DataError: it is not there, or a header is damaged.
    """
    if "://" in place:
        folder = local_folder(place.rstrip("/"), store, leave_out=WEIGHT_FILES)
        entries = read_entries(place.rstrip("/"), store).values()
        tensors = {entry.name: shape_only(entry.shape, entry.dtype) for entry in entries}
        return Headers(place, folder, choose_part(read_config(folder), tensors, part, place))
    if Path(place).exists() or place.startswith((".", "/")):
        return Headers(place, Path(place), open_published(Path(place), part))
    folder, found = read_headers(place)
    shapes = shapes_by_config(folder) if found is None else found
    return Headers(place, folder, choose_part(read_config(folder), shapes, part, place), compared=found is not None)
