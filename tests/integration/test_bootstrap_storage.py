"""Caption, score, select and train from the result, with data set, models and layers on a real S3 server."""

import pytest

from isthmus.bootstrap.caption import caption_work
from isthmus.bootstrap.config import CaptionConfig, ScoreConfig
from isthmus.bootstrap.score import score_work
from isthmus.bootstrap.select import select
from isthmus.bootstrap.select_rule import SelectRule
from isthmus.bootstrap.stage import Pool, run_stage
from isthmus.data_pipeline.dataset.chosen_captions import load_captions
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.process_pool import run_in_processes
from isthmus.data_pipeline.sample.captions import clean_caption
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from tests.seaweed import BUCKET
from tests.tiny_exports import write_exports
from tests.unit.data_pipeline.tar_set import good_sample, loader, take, write_set

pytestmark = pytest.mark.integration
FOLDER = f"s3://{BUCKET}/bootstrap"
HERE = run_in_processes(1)


def test_layers_on_s3_are_written_committed_once_and_trained_from(seaweed, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_CACHE_DIR", str(tmp_path / "cache"))
    store, out = ObjectStore(seaweed.store_config), join(FOLDER, "out")
    for model in write_exports(tmp_path / "exports"):
        for file in (path for path in model.rglob("*") if path.is_file()):
            store.put_file(join(FOLDER, model.name, str(file.relative_to(model))), file)
    url = write_set(
        join(FOLDER, "data"), [good_sample(number) for number in range(12)], samples_per_shard=8, store=store
    )
    manifest = Manifest.load(url, store)
    caption = CaptionConfig(model=join(FOLDER, "captioner"), num_candidates=2, max_new_tokens=4, batch_size=4)
    run_stage(caption_work(manifest, out, caption, store), manifest, out, store, Pool(HERE))
    score = score_work(manifest, out, ScoreConfig(models=(join(FOLDER, "filter"),), batch_size=4), store)
    scores = run_stage(score, manifest, out, store, Pool(HERE))
    assert run_stage(score, manifest, out, store, Pool(HERE)).hash == scores.hash  # nothing is left to do
    selected = join(out, "selected")
    select(url, scores, SelectRule(method="top", score="itc", keep=2), selected, store, HERE)
    lengths = {}
    for shard in Manifest.load(selected, store).shards:
        for key, texts in zip(ShardIndex.load(shard, store).keys(), load_captions(store, shard), strict=True):
            lengths[key] = {len(clean_caption(text, 50)) for text in texts}
    batches = take(loader(selected, store=store, batch=4), 0, 3)
    read = {
        key: int(length) for batch in batches for key, length in zip(batch.keys, batch.tokens["lengths"], strict=True)
    }
    assert len(read) == 12
    assert all(length in lengths[key.partition("#")[2]] for key, length in read.items())
