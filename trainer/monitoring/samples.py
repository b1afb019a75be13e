"""`<stage>/samples/step-000000160/`: inputs and outputs of an evaluation, for browsing and for the report.

samples.json    {"step", "texts": one entry per sample, "examples", "pictures": file names}
NNNNN.jpg       thumbnail of sample NNNNN, which is its index in "texts"
<name>.png      figures: samples, similarity, attention
"""

import json
from dataclasses import asdict
from typing import Any

from isthmus.trainer.evaluation.figures import to_png
from isthmus.trainer.evaluation.result import EvalResult
from isthmus.trainer.monitoring.synced_folder import SyncedFolder

FOLDER = "samples"
INDEX = "samples.json"


def write_samples(synced: SyncedFolder, step: int, result: EvalResult) -> None:
    """Write an evaluation's folder, the index last; one of the same step that a killed process left is replaced."""
    name = f"{FOLDER}/step-{step:09d}"
    files = {f"{index:05d}.jpg": data for index, data in result.examples.thumbnails.items()}
    files |= {f"{title}.png": to_png(picture) for title, picture in result.pictures.items()}
    index: dict[str, Any] = {
        "step": step,
        "texts": list(result.texts),
        "examples": [asdict(example) for example in result.examples.shown],
        "pictures": [f"{title}.png" for title in result.pictures],
    }
    files[INDEX] = json.dumps(index, ensure_ascii=False).encode()
    for file, data in files.items():
        synced.write(f"{name}/{file}", data)
