"""Small caption layers and layered manifests over real data sets."""

import numpy as np

from isthmus.data_pipeline.dataset.manifest import LayerRef, Manifest
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.layers.candidates import WEB, candidate_table
from isthmus.data_pipeline.layers.layer import Layer, LayerWriter
from isthmus.data_pipeline.layers.layered_manifest import Choice, save_manifest, write_shard
from isthmus.data_pipeline.store.object_store import ObjectStore

STORE = ObjectStore()


def shard_candidates(shard, texts_of):
    """The candidates of a shard: `texts_of(key)`, of which the first is the web's."""
    keys = list(ShardIndex.load(shard, STORE).keys())
    texts = [texts_of(key) for key in keys]
    sources = [[WEB, *["tiny"] * (len(one) - 1)] for one in texts]
    return candidate_table(keys, texts, sources, [[None, *range(len(one) - 1)] for one in texts])


def write_layer(manifest_url, folder_url, texts_of) -> Layer:
    """A layer with the candidates `texts_of(key)`."""
    manifest = Manifest.load(manifest_url, STORE)
    writer = LayerWriter(folder_url, manifest.hash, {"captioner": "tiny"}, STORE)
    for number, shard in enumerate(manifest.shards):
        writer.write(number, shard, shard_candidates(shard, texts_of))
    return writer.commit(manifest)


def choice(lists) -> Choice:
    """The choice of these places for each sample, each drawn alike."""
    places = np.array([place for one in lists for place in one], dtype=np.int64)
    return Choice(np.array([len(one) for one in lists]), places, np.ones(len(places), dtype=np.uint16))


def layered(manifest_url, layer, folder_url, places_of) -> str:
    """A layered manifest that keeps the candidates `places_of(key)` of each sample; returns its URL."""
    base = Manifest.load(manifest_url, STORE)
    written = []
    for number, shard in enumerate(base.shards):
        table = layer.read(number)
        chosen = choice([places_of(key) for key in table["key"].to_pylist()])
        written.append(write_shard(folder_url, number, shard, table, chosen, STORE))
    shards, chunks = zip(*written, strict=True)
    ref = LayerRef(layer.url, layer.hash, manifest_url, base.hash, {"test": True})
    save_manifest(folder_url, shards, chunks, base.chunk_bytes, ref, STORE)
    return folder_url
