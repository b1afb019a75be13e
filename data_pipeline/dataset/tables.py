"""Parquet files in a store, identified by their SHA-256; equal tables produce equal bytes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa


def read_table(url: str, sha256: str, store: ObjectStore, columns: Sequence[str] | None = None) -> "pa.Table":
    """Read a Parquet file, or some columns of it, and check its content.

    Raises:
        DataError: it is missing, or not the file with this SHA-256.
    """
    import pyarrow as pa  # noqa: PLC0415 - slow to import, and readers without a layer do not need it
    import pyarrow.parquet as pq  # noqa: PLC0415

    data = store.get(url)
    if sha256_of(data) != sha256:
        raise DataError(f"{url} is not the file that was committed; restore it, or make its layer or manifest again")
    names = None if columns is None else list(columns)
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=names, use_threads=False)


def table_bytes(table: "pa.Table", facts: Mapping[str, str]) -> bytes:
    """Return a table as a Parquet file with the facts in its metadata, under `isthmus`."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata({"isthmus": json.dumps(dict(facts), sort_keys=True)})
    pq.write_table(described, sink, compression="zstd", compression_level=3, write_statistics=False, store_schema=False)
    return bytes(sink.getvalue())


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of a file, as hex."""
    return hashlib.sha256(data).hexdigest()
