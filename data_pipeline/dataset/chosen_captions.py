"""The captions of a shard in a layered manifest: one Parquet file, with rows in the index's order.

| column | type | meaning |
|---|---|---|
| `key` | string | the sample's key |
| `texts` | list of strings | its captions, at least one |
| `sources` | list of strings | where each comes from: `web`, or a captioner's name |
| `chosen` | list of uint8 | the place of each among the candidates of the layer |
| `draws` | list of uint16 | how often each counts when one is drawn: 1, but where a rule mixes sources unevenly |
"""

from typing import TYPE_CHECKING

from isthmus.data_pipeline.dataset.manifest import Shard
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.dataset.tables import read_table
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa


def load_captions(store: ObjectStore, shard: Shard, first: int = 0, count: int | None = None) -> list[list[str]]:
    """Return the captions that a layered manifest has for a shard's samples, or for `count` of them from `first`.

    A caption with n draws occurs n times in its list.

    Raises:
        NotFoundError: the file is missing.
        DataError: it is not the file that the manifest names.
    """
    table = _read(shard, store, ["texts", "draws"]).slice(first, count)
    columns = zip(table["texts"].to_pylist(), table["draws"].to_pylist(), strict=True)
    return [[text for text, n in zip(texts, draws, strict=True) for _ in range(n)] for texts, draws in columns]


def check_captions(shard: Shard, index: ShardIndex, store: ObjectStore) -> None:
    """Check that the captions of a shard are those of its index's samples.

    Raises:
        DataError: they are missing, of other samples, or not what the manifest names.
    """
    if shard.captions_url is None:
        return
    if _read(shard, store, ["key"])["key"].to_pylist() != list(index.keys()):
        raise DataError(f"{shard.captions_url} has the captions of other samples; run `isthmus bootstrap select` again")


def _read(shard: Shard, store: ObjectStore, columns: list[str]) -> "pa.Table":
    assert shard.captions_url is not None
    table = read_table(shard.captions_url, shard.captions_hash or "", store, columns)
    if table.num_rows != shard.num_samples:
        raise DataError(f"{shard.captions_url} has {table.num_rows} rows, the manifest {shard.num_samples} samples")
    return table
