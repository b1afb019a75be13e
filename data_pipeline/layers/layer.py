"""A layer: one Parquet file per shard of a data set, rows in the order of the shard's index, committed by `layer.json`.

    FOLDER/tables/000000-shard-000000.parquet   put if absent
    FOLDER/tables/000000-shard-000000.json      its record, put if absent after it: this shard is done
    FOLDER/layer.json                           put if absent after all records: the layer is complete

A shard that is computed again, after a kill or because two workers had the same one, must have the same bytes; other
bytes are refused. docs/data-format.md is the contract.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from isthmus.data_pipeline.dataset.manifest import Manifest, Shard
from isthmus.data_pipeline.dataset.tables import read_table, sha256_of, table_bytes
from isthmus.data_pipeline.errors import DataError, NotFoundError
from isthmus.data_pipeline.store.object_store import ObjectStore, join

FORMAT = "isthmus-layer"
VERSION = 1
FILE_NAME = "layer.json"
_FOLDER = "tables"
_THREADS = 16


@dataclass(frozen=True, slots=True)
class LayerFile:
    """The file of one shard."""

    name: str
    """Relative to the layer's folder."""
    shard: str
    """File name of the shard."""
    index_hash: str
    """Identity of the shard's index: of all keys and bytes."""
    rows: int
    bytes: int
    sha256: str
    counts: dict[str, int]
    """Counts of its stage, such as samples that could not be captioned."""


class LayerWriter:
    """Writes the files of a layer; picklable, so that any process may write any shard.

    Args:
        folder_url: Folder of the layer.
        base_hash: Hash of the manifest whose samples the rows are.
        made_by: What decides the content: model, seed, rule. JSON values.
        store: Access to the folder.
        parent_hash: Hash of the layer that this one was made from; None if it was made from the data set alone.
    """

    def __init__(
        self,
        folder_url: str,
        base_hash: str,
        made_by: Mapping[str, Any],
        store: ObjectStore,
        parent_hash: str | None = None,
    ) -> None:
        self.folder_url, self.base_hash, self.parent_hash = folder_url.rstrip("/"), base_hash, parent_hash
        self.made_by, self._store = dict(made_by), store
        self.identity = _maker_hash(base_hash, parent_hash, self.made_by)
        """Hash of the arguments but for the folder; every record holds it."""

    def written(self, number: int, shard: Shard) -> LayerFile | None:
        """Return the file of a shard if it was written before.

        Raises:
            DataError: it was made by something else, or for another shard.
        """
        url = join(self.folder_url, _record_name(number, shard))
        try:
            fields = json.loads(self._store.get(url))
            maker, file = fields.pop("made_by"), LayerFile(**fields)
        except NotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{url} is damaged ({error!r}); delete it") from error
        if maker != self.identity or file.index_hash != shard.index_hash:
            what = "for another shard" if maker == self.identity else "by another model, seed or rule"
            raise DataError(f"{url} was made {what}; write into another folder")
        return file

    def write(self, number: int, shard: Shard, table: pa.Table, counts: Mapping[str, int] | None = None) -> LayerFile:
        """Write the table of a shard, whole or not at all; return its file.

        Args:
            number: Number of the shard in the manifest.
            shard: The shard.
            table: One row per sample, with a column `key`.
            counts: What to sum over shards for a report. As a function of the same inputs as the table.

        Raises:
            DataError: the table does not have the shard's number of rows, or the folder holds other bytes for it.
        """
        if table.num_rows != shard.num_samples:
            raise DataError(f"{shard.url}: {table.num_rows} rows were made for {shard.num_samples} samples")
        stem = _stem(number, shard)
        facts = {"shard": _shard_name(shard), "index_hash": shard.index_hash, "made_by": self.identity}
        data = table_bytes(table, facts)
        name = f"{_FOLDER}/{stem}.parquet"
        counted = dict(sorted((counts or {}).items()))
        file = LayerFile(name, facts["shard"], shard.index_hash, table.num_rows, len(data), sha256_of(data), counted)
        self._store.put_same(join(self.folder_url, name), data)
        record = json.dumps(asdict(file) | {"made_by": self.identity})
        self._store.put_same(join(self.folder_url, _record_name(number, shard)), record.encode())
        return file

    def commit(self, manifest: Manifest) -> "Layer":
        """Write `layer.json`, once every shard has its file; again is fine.

        Raises:
            DataError: shards without a file, the first of them named; or another layer is committed here.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            files = list(pool.map(self.written, range(len(manifest.shards)), manifest.shards))
        missing = [shard.url for shard, file in zip(manifest.shards, files, strict=True) if file is None]
        if missing:
            raise DataError(f"{self.folder_url}: {len(missing)} shards are not done yet, for example {missing[0]}")
        done = tuple(file for file in files if file is not None)
        layer = Layer(self.folder_url, self.base_hash, self.parent_hash, self.made_by, done, self._store)
        self._store.remove_unfinished(self.folder_url)
        self._store.put_same(join(self.folder_url, FILE_NAME), layer.to_bytes())
        return layer


class Layer:
    """A complete layer.

    Args:
        folder_url: Its folder.
        base_hash: Hash of the manifest that it was made for.
        parent_hash: Hash of the layer that it was made from, if any.
        made_by: What decided its content.
        files: One per shard of the manifest, in its order.
        store: Access to the folder.
    """

    def __init__(
        self,
        folder_url: str,
        base_hash: str,
        parent_hash: str | None,
        made_by: Mapping[str, Any],
        files: Sequence[LayerFile],
        store: ObjectStore,
    ) -> None:
        self.url, self.base_hash, self.parent_hash = folder_url, base_hash, parent_hash
        self.made_by, self.files, self._store = dict(made_by), tuple(files), store
        self.hash = _layer_hash(_maker_hash(base_hash, parent_hash, self.made_by), self.files)
        """Identity of the layer (hex SHA-256): of what it was made from and by, and of every file."""

    @staticmethod
    def load(folder_url: str, store: ObjectStore) -> "Layer":
        """Read a layer's `layer.json`.

        Raises:
            NotFoundError: there is none; the layer is not complete.
            DataError: it is damaged or of another format or version.
        """
        url = join(folder_url, FILE_NAME)
        try:
            fields = json.loads(store.get(url))
            if (fields["format"], fields["version"]) != (FORMAT, VERSION):
                raise DataError(f"{url}: format {fields['format']} {fields['version']} is unknown here")
            files = [LayerFile(**file) for file in fields["files"]]
            layer = Layer(
                folder_url.rstrip("/"), fields["base_hash"], fields["parent_hash"], fields["made_by"], files, store
            )
        except NotFoundError as error:
            raise NotFoundError(f"{url}: absent; the layer was not finished, run its command again") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{url} is damaged ({error!r}); make the layer again") from error
        if layer.hash != fields["hash"]:
            raise DataError(
                f"{url} was truncated or edited: its content does not have the recorded hash; make the layer again"
            )
        return layer

    def to_bytes(self) -> bytes:
        """Return `layer.json`; equal layers give equal bytes."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "hash": self.hash,
            "base_hash": self.base_hash,
            "parent_hash": self.parent_hash,
            "made_by": self.made_by,
            "files": [asdict(file) for file in self.files],
        }
        return json.dumps(fields, indent=1, sort_keys=True).encode()

    def check_base(self, manifest: Manifest) -> None:
        """Check that the layer was made for this manifest.

        Raises:
            DataError: it was not; names the layer, and the first shard that differs.
        """
        if self.base_hash == manifest.hash:
            return
        detail = f"it has {len(self.files)} shards, the manifest {len(manifest.shards)}"
        for shard, file in zip(manifest.shards, self.files, strict=False):
            if shard.index_hash != file.index_hash:
                detail = f"its rows are those of {file.shard}, the manifest has {shard.url}"
                break
        raise DataError(
            f"the layer {self.url} was made for the manifest {self.base_hash[:16]}, this one is {manifest.hash[:16]}: "
            f"{detail}; give the manifest that it was made for, or make the layer again"
        )

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the table of a shard, or some columns of it.

        Raises:
            DataError: the file is missing or not the one that was committed.
        """
        file = self.files[number]
        return read_table(join(self.url, file.name), file.sha256, self._store, columns)

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.read(0).column_names)


def _maker_hash(base_hash: str, parent_hash: str | None, made_by: Mapping[str, Any]) -> str:
    parts = json.dumps([VERSION, base_hash, parent_hash, dict(made_by)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def _layer_hash(maker_hash: str, files: Iterable[LayerFile]) -> str:
    digest = hashlib.sha256(f"{maker_hash}\n".encode())
    for file in files:
        digest.update(f"{file.index_hash} {file.rows} {file.sha256}\n".encode())
    return digest.hexdigest()


def _shard_name(shard: Shard) -> str:
    return shard.url.rpartition("/")[2]


def _stem(number: int, shard: Shard) -> str:
    return f"{number:06d}-{_shard_name(shard).removesuffix('.tar')}"


def _record_name(number: int, shard: Shard) -> str:
    return f"{_FOLDER}/{_stem(number, shard)}.json"
