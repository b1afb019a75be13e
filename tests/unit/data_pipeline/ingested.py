"""Ingests small sources and reads what was written."""

import json
from pathlib import Path

import webdataset

from isthmus.data_pipeline.ingest.records import Columns
from isthmus.data_pipeline.ingest.shards import ingest
from isthmus.data_pipeline.ingest.sources import open_source
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.store.object_store import ObjectStore

STORE = ObjectStore()


def write(source, folder, *, per_shard=2, kind=None, images=None, columns=None, processes=1, **options):
    """Ingest; return the outcomes of the shards."""
    shards = []
    opened = open_source(source, kind, images, columns or Columns())
    run = run_in_processes(processes)
    ingest(opened, str(folder), STORE, run, samples_per_shard=per_shard, on_shard=shards.append, **options)
    return sorted(shards, key=lambda shard: shard.url)


def drops(shards):
    """Record number and cause of what was dropped."""
    return [(drop["record"], drop["cause"]) for shard in shards for drop in shard.dropped]


def stored(folder):
    """What plain webdataset reads, shard after shard."""
    tars = sorted(str(path) for path in Path(folder).glob("*.tar"))
    return [
        {key: value for key, value in item.items() if key not in ("__url__", "__local_path__")}
        for item in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    ]


def as_lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path
