"""Batches: what is in them, that nothing depends on rank or starting step, and that bad samples are masked."""

import io
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import isthmus.data_pipeline.reading.loader as loader_module
import isthmus.data_pipeline.reading.reader as reader_module
from isthmus.data_pipeline.config import BudgetConfig, DataConfig
from isthmus.data_pipeline.dataset.shard_index import ShardIndex
from isthmus.data_pipeline.errors import DataError, NotFoundError, PoisonPartError, ReadersUnavailable, UnavailableError
from isthmus.data_pipeline.reading import part_queue
from isthmus.data_pipeline.reading.backend import InProcessBackend, ReaderDied
from isthmus.data_pipeline.reading.chunk_memory import ChunkMemory
from isthmus.data_pipeline.reading.quarantine import BudgetExceeded
from isthmus.data_pipeline.store.local_store import LocalBackend
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.unit.data_pipeline.tar_set import (
    Encoder,
    assert_equal,
    good_sample,
    loader,
    picture,
    take,
    tar_files,
    write_set,
)

pytestmark = pytest.mark.unit

NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_set(str(tmp_path_factory.mktemp("set")), [good_sample(i) for i in range(NUM_SAMPLES)])


def test_a_batch_holds_what_its_rows_say(manifest):
    (batch,) = take(loader(manifest), 3, 1)
    assert batch.step == 3
    assert batch.rows_B.tolist() == list(range(8))
    assert batch.images_BCHW.shape == (8, 3, 32, 32)
    assert batch.images_BCHW.dtype == torch.uint8
    assert batch.valid_B.all()
    numbers = [int(key.split("#")[1]) for key in batch.keys]
    assert batch.captions == [f"picture, number {number}" for number in numbers]
    assert batch.tokens["lengths"].tolist() == [len(caption) for caption in batch.captions]
    assert batch.image_ids_B.unique().numel() == 8
    assert [position[:2] for position in batch.positions] == [(0, 0)] * 8
    assert [position[2] for position in batch.positions] == list(range(24, 32))


def test_an_epoch_has_every_key_once_and_the_next_follows(manifest):
    batches = take(loader(manifest), 0, 15)  # 120 rows: two epochs of 60, the border inside a batch
    rows = [(position[1], key) for batch in batches for position, key in zip(batch.positions, batch.keys, strict=True)]
    assert set(Counter(rows).values()) == {1}
    assert Counter(epoch for epoch, _ in rows) == {0: 60, 1: 60}


def test_starting_anywhere_gives_the_same_batches(manifest):
    walked = take(loader(manifest), 0, 10)
    for start in (0, 4, 9):
        for one, other in zip(take(loader(manifest), start, 10 - start), walked[start:], strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_world_size_has_the_same_global_batch(manifest, world_size):
    (whole,) = take(loader(manifest), 2, 1)
    for rank in range(world_size):
        (part,) = take(loader(manifest, rank=rank, world_size=world_size), 2, 1)
        rows = part.rows_B
        assert [int(row) // 2 % world_size for row in rows] == [rank] * len(rows)
        assert torch.equal(part.images_BCHW, whole.images_BCHW[rows])
        assert torch.equal(part.flip_B, whole.flip_B[rows])
        assert torch.equal(part.tokens["seeds"], whole.tokens["seeds"][rows])
        assert part.keys == [whole.keys[row] for row in rows]


@pytest.mark.parametrize(("world_size", "lanes"), [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]])])
def test_a_rank_has_the_lanes_of_its_virtual_ranks(manifest, world_size, lanes):
    for rank in range(world_size):
        (part,) = take(loader(manifest, rank=rank, world_size=world_size, virtual_ranks=4), 2, 1)
        assert [row // 2 for row in part.rows_B.tolist()[::2]] == lanes[rank]


def test_augmentation_changes_between_epochs_and_with_the_seed(manifest):
    def by_key(start, seed=5):
        batches = take(loader(manifest, seed=seed), start, 8)
        return {key: image for b in batches for key, image, p in zip(b.keys, b.images_BCHW, b.positions, strict=True)}

    first, later, other = by_key(0), by_key(15), by_key(0, seed=6)
    assert sum(torch.equal(first[key], later[key]) for key in first.keys() & later.keys()) <= 1
    assert sum(torch.equal(first[key], other[key]) for key in first.keys() & other.keys()) <= 1


def test_evaluation_shows_whole_images_once(manifest):
    batches = take(loader(manifest, train=False, batch=16), 0, 4)
    seen = [key for batch in batches for key, valid in zip(batch.keys, batch.valid_B, strict=True) if valid]
    assert len(seen) == len(set(seen)) == NUM_SAMPLES
    assert sum(int((~batch.valid_B).sum()) for batch in batches) == 4
    assert not any(batch.flip_B.any() for batch in batches)
    number = int(batches[0].keys[0].split("#")[1])
    whole = Image.open(io.BytesIO(picture(number))).resize((32, 32), Image.Resampling.BICUBIC)
    found = batches[0].images_BCHW[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.asarray(whole)).max() <= 2


def test_a_mixture_keeps_its_shares(tmp_path):
    one = write_set(str(tmp_path / "one"), [good_sample(i) for i in range(24)])
    two = write_set(str(tmp_path / "two"), [good_sample(i) for i in range(12)])
    made = loader((one, 3.0), (two, 1.0))
    batches = take(made, 0, 12)
    assert all(sum(position[0] for position in batch.positions) == 2 for batch in batches)
    assert made.metrics()["epoch/0"] == 72 / 24
    assert made.metrics()["epoch/1"] == 24 / 12


BAD = {
    "cut image": ({"jpg": picture(1)[:200], "txt": b"cut"}, "undecodable_image"),
    "no image": ({"txt": b"none"}, "no_image"),
    "no caption": ({"jpg": picture(1)}, "no_caption"),
    "empty caption": ({"jpg": picture(1), "txt": b"..."}, "no_caption"),
    "not utf-8": ({"jpg": picture(1), "txt": b"\xff\xfe\xfa"}, "caption_encoding"),
    "bomb": ({"jpg": picture(1, (2000, 2000)), "txt": b"bomb"}, "too_many_pixels"),
    "one pixel": ({"png": picture(1, (1, 1), "PNG"), "txt": b"dot"}, "image_too_small"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_masked_and_shifts_nothing(tmp_path, name):
    members, cause = BAD[name]
    samples = [good_sample(i) for i in range(16)]
    good = write_set(str(tmp_path / "good"), samples, chunk_bytes=1 << 20)
    samples[5] = ("../../5", members)
    bad = write_set(str(tmp_path / "bad"), samples, chunk_bytes=1 << 20)
    made = loader(bad, max_image_pixels=1_000_000)
    expected = take(loader(good), 0, 2)
    found = take(made, 0, 2)
    assert sum(int((~batch.valid_B).sum()) for batch in found) == 1
    for one, other in zip(found, expected, strict=True):
        assert one.positions == other.positions
        keep = one.valid_B
        assert torch.equal(one.images_BCHW[keep], other.images_BCHW[keep])
        assert not one.images_BCHW[~keep].any()
        assert [c for c, valid in zip(one.captions, keep, strict=True) if not valid] in ([], [""])
    (record,) = made.take_bad_records()
    assert (record.cause, record.key) == (cause, "../../5")
    assert record.shard.endswith("bad/00000.tar")
    assert record.offset > 0
    assert made.metrics()[f"bad_samples/{cause}"] == 1
    assert made.take_bad_records() == []


def test_ten_thousand_words_are_cut_to_the_limit(tmp_path):
    samples = [good_sample(i) for i in range(7)] + [("long", {"jpg": picture(1), "txt": b"word " * 10_000})]
    (batch,) = take(loader(write_set(str(tmp_path), samples), max_caption_words=20), 0, 1)
    assert batch.captions[[key.endswith("long") for key in batch.keys].index(True)] == " ".join(["word"] * 20)


def test_several_captions_are_all_used_over_epochs(tmp_path):
    document = b'{"captions": ["one", "two", "three"], "image_id": "same"}'
    samples = [(f"{i}", {"jpg": picture(i), "json": document}) for i in range(8)]
    batches = take(loader(write_set(str(tmp_path), samples)), 0, 12)
    assert {caption for batch in batches for caption in batch.captions} == {"one", "two", "three"}
    assert len({int(image_id) for batch in batches for image_id in batch.image_ids_B}) == 1


def test_damaged_bytes_are_read_again_and_then_masked(tmp_path):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(16)], damaged_key="000003")
    made = loader(url)
    batches = take(made, 0, 2)
    (record,) = made.take_bad_records()
    assert (record.cause, record.key) == ("checksum", "000003")
    assert sum(int((~batch.valid_B).sum()) for batch in batches) == 1
    assert made.metrics()["damaged_reads"] == 2


def test_a_damaged_cache_file_is_fetched_again(tmp_path):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(16)])
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 1 << 20}
    expected = take(loader(url, **cache), 0, 2)
    files = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".chunk"]
    assert files
    for path in files:
        path.write_bytes(bytes(path.stat().st_size))
    made = loader(url, **cache)
    for one, other in zip(take(made, 0, 2), expected, strict=True):
        assert_equal(one, other)
    assert made.metrics()["damaged_reads"] == len(files)
    again = loader(url, **cache)
    take(again, 0, 2)
    assert again.metrics()["disk_cache_hits"] == len(files)
    assert "chunks_fetched" not in again.metrics()


def test_a_cache_that_cannot_be_written_costs_fetches_and_is_counted(tmp_path):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(16)])
    expected = take(loader(url), 0, 2)
    (tmp_path / "cache").write_bytes(b"a file, where a folder should be")
    made = loader(url, cache_dir=str(tmp_path / "cache"), cache_bytes=1 << 20)
    for one, other in zip(take(made, 0, 2), expected, strict=True):
        assert_equal(one, other)
    assert made.metrics()["disk_cache_skipped"] == made.metrics()["chunks_fetched"] > 0


@pytest.mark.parametrize(
    ("damage", "cause"), [("delete", "shard_missing"), ("cut", "shard_changed"), ("replace", "shard_changed")]
)
def test_a_lost_shard_is_masked_until_the_budget_stops_and_names_it(tmp_path, damage, cause):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(40)], samples_per_shard=20)
    path = tar_files(tmp_path / "set")[1]
    if damage == "delete":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4000])
    else:
        path.write_bytes(path.read_bytes() + b"more")
    made = loader(url)
    batches = take(made, 0, 5)
    assert sum(int((~batch.valid_B).sum()) for batch in batches) == 20
    assert {record.cause for record in made.take_bad_records()} == {cause}
    strict = loader(url, budget=BudgetConfig(max_bad_fraction=0.1, window_samples=40, max_consecutive=100))
    with pytest.raises(BudgetExceeded, match=r"Worst shard: .*00001\.tar"):
        take(strict, 0, 5)


def test_sizes_that_do_not_divide_are_refused(manifest):
    with pytest.raises(DataError, match=r"3 ranks do not divide data.lanes = 4"):
        loader(manifest, world_size=3)
    with pytest.raises(DataError, match=r"3 workers cannot share 4 virtual ranks equally; use 1, 2, 4 workers"):
        loader(manifest, world_size=3, lanes=12, batch=12, virtual_ranks=4)
    with pytest.raises(DataError, match=r"data.lanes = 4 does not divide the global batch size 10"):
        loader(manifest, batch=10)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="no-such-set"):
        loader(str(tmp_path / "no-such-set"))


def test_an_index_of_another_data_set_is_refused(tmp_path):
    url = write_set(str(tmp_path / "one"), [good_sample(i) for i in range(8)])
    write_set(str(tmp_path / "two"), [good_sample(i) for i in range(8, 16)])
    index = "manifest/indexes/00000.idx"
    (tmp_path / "one" / index).write_bytes((tmp_path / "two" / index).read_bytes())
    with pytest.raises(DataError, match=r"00000\.idx is not the index"):
        take(loader(url), 0, 1)


class Silent(InProcessBackend):
    """A reader that answers nothing until it has been replaced often enough."""

    is_async = True

    def __init__(self, make_reader, replacements):
        super().__init__(make_reader)
        self.left, self.asked = replacements, []

    def submit(self, request):
        if self.left == 0:
            return super().submit(request)
        self.asked.append(Future())
        return self.asked[-1]

    def replace(self, lane):
        self.left -= 1
        asked, self.asked = self.asked, []
        for future in asked:
            future.set_exception(ReaderDied("replaced", while_reading=future is asked[0]))


def test_a_silent_reader_is_replaced_and_asked_again(manifest, monkeypatch):
    expected = take(loader(manifest), 0, 4)
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Silent(make, replacements=2))
    made = loader(manifest, reader_timeout_seconds=0.5)
    for one, other in zip(take(made, 0, 4), expected, strict=True):
        assert_equal(one, other)
    assert made.metrics()["parts_asked_again"] == 2 * 3 * 4  # twice, three steps ahead, four lanes


def test_a_thread_that_waits_for_a_reader_ends_with_the_loader(manifest, monkeypatch):
    backend = []
    monkeypatch.setattr(
        loader_module, "_open_backend", lambda config, make, *_: backend.append(Silent(make, 1)) or backend[0]
    )
    made = loader(manifest)
    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(take, made, 0, 1)
        while not backend[0].asked:
            time.sleep(0.01)
        made.close()
        backend[0].replace(0)  # as closing a backend kills its readers
        with pytest.raises(DataError, match="the loader was closed"):
            batches.result(10)
    assert backend[0].asked == []


class Watched(InProcessBackend):
    """Notes the steps that are asked for."""

    is_async = True

    def __init__(self, make_reader):
        super().__init__(make_reader)
        self.steps = []

    def submit(self, request):
        self.steps.append(request.step)
        return super().submit(request)


def test_what_was_asked_for_ahead_is_not_requested_again(manifest, monkeypatch):
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Watched(make))
    plain, made = (loader(manifest, prefetch_steps=2) for _ in range(2))
    made.ask(3, 5)
    assert sorted(set(made._backend.steps)) == [3, 4, 5]
    expected, got = (take(batches, 3, 5) for batches in (plain, made))
    assert [batch.keys for batch in got] == [batch.keys for batch in expected]
    assert sorted(made._backend.steps) == sorted(plain._backend.steps)


@pytest.mark.parametrize("begin", [(4, 4), (3, 1)])
def test_what_was_asked_for_ahead_is_forgotten_where_other_batches_are_read(manifest, monkeypatch, begin):
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Watched(make))
    made = loader(manifest, prefetch_steps=2)
    made.ask(3, 5)
    expected, got = (take(batches, *begin) for batches in (loader(manifest), made))
    assert [batch.step for batch in got] == list(range(begin[0], begin[0] + begin[1]))
    assert [batch.keys for batch in got] == [batch.keys for batch in expected]


def test_no_more_requests_are_in_flight_than_steps_are_prefetched(manifest, monkeypatch):
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Watched(make))
    made = loader(manifest, prefetch_steps=2)
    for step, _ in enumerate(made.batches(0, 8)):  # a slow trainer: nothing more is asked while it holds a batch
        assert max(made._backend.steps) == min(step + 2, 7)
        assert len(made._backend.steps) == 4 * min(step + 3, 8)


def test_samples_that_silence_three_readers_end_the_run_and_are_named(manifest, monkeypatch):
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Silent(make, replacements=9))
    monkeypatch.setattr(part_queue, "_REPLACE_PAUSE_SECONDS", 0.0)
    made = loader(manifest, reader_timeout_seconds=0.05)
    first = made.plan.lane_samples(0, 0)
    with pytest.raises(PoisonPartError, match=r"step 0, lane 0: 3 readers ended.*last: replaced") as caught:
        take(made, 0, 4)
    assert str(caught.value).count(".tar#0000") == len(first)
    assert not caught.value.retryable


class Mortal(InProcessBackend):
    """Readers that die, a number of times, before they begin."""

    is_async = True
    runs = True

    def __init__(self, make_reader, deaths):
        super().__init__(make_reader)
        self.deaths = deaths

    def submit(self, request):
        if self.deaths == 0:
            return super().submit(request)
        self.deaths -= 1
        future = Future()
        if self.runs:
            future.set_exception(ReaderDied("actor reader-3: its node has died"))
        return future

    def has_started(self, lane):
        return self.runs


def test_readers_that_die_before_they_read_are_replaced_without_end(manifest, monkeypatch):
    expected = take(loader(manifest), 0, 2)
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Mortal(make, deaths=70))
    monkeypatch.setattr(part_queue, "_REPLACE_PAUSE_SECONDS", 0.0)
    for one, other in zip(take(loader(manifest), 0, 2), expected, strict=True):
        assert_equal(one, other)


def test_no_reader_for_too_long_is_no_error_of_the_user_and_has_its_cause(manifest, monkeypatch):
    monkeypatch.setattr(loader_module, "_open_backend", lambda config, make, *_: Mortal(make, deaths=10**9))
    monkeypatch.setattr(part_queue, "_REPLACE_PAUSE_SECONDS", 0.01)
    with pytest.raises(ReadersUnavailable, match=r"step 0, lane 0: no reader for.*its node has died") as caught:
        take(loader(manifest, reader_timeout_seconds=0.1), 0, 2)
    assert caught.value.retryable
    monkeypatch.setattr(Mortal, "runs", False)
    with pytest.raises(ReadersUnavailable, match="it has not started; check that nodes with free CPUs"):
        take(loader(manifest, reader_timeout_seconds=0.1), 0, 2)


@pytest.mark.parametrize("start", [0, 3])
def test_a_chunk_is_released_after_its_last_sample_wherever_reading_began(manifest, start):
    made = loader(manifest)
    memory = made._backend._reader._memory
    done = set()
    for step, _ in enumerate(made.batches(start, 14), start):
        for ref in (ref for lane in made.lanes for ref in made.plan.lane_samples(step, lane)):
            shard = made.plan.manifests[0].shards[ref.shard]
            chunk = reader_module._chunk_id(shard, ShardIndex.load(shard, ObjectStore()).of_chunk(ref.chunk))
            done = done | {chunk} if ref.is_last_of_chunk else done - {chunk}
        assert done & memory._chunks.keys() <= memory._released
    made.close()
    assert len(done) > 10


def test_a_store_that_is_far_too_slow_is_no_reader_that_hangs(tmp_path, monkeypatch):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(40)])
    read = LocalBackend.read_into
    made = loader(url, reader_timeout_seconds=3.0)
    monkeypatch.setattr(LocalBackend, "read_into", lambda *words: (time.sleep(1.2), read(*words)))
    with pytest.raises(UnavailableError, match=r"the store took .* s for earlier samples"):
        take(made, 0, 4)
    made = loader(url, reader_timeout_seconds=0.4)
    with pytest.raises(UnavailableError, match=r"not read within 0\.2 s"):
        take(made, 0, 4)


def test_a_shard_that_comes_back_is_read_again(tmp_path, monkeypatch):
    url = write_set(str(tmp_path / "set"), [good_sample(i) for i in range(16)])
    made = loader(url)
    path, index = tar_files(tmp_path / "set")[0], tmp_path / "set" / "manifest" / "indexes" / "00000.idx"
    batches = made.batches(0, 6)
    for file, cause in ((path, "shard_missing"), (index, "index_missing")):
        away = file.rename(file.with_suffix(".away"))
        made._backend._reader._memory.close()
        made._backend._reader._memory = ChunkMemory(made._backend._reader._fetch, 1 << 20)
        made._backend._reader._load_index.cache_clear()
        assert not next(batches).valid_B.any()
        assert {record.cause for record in made.take_bad_records()} == {cause}
        away.rename(file)
        assert not next(batches).valid_B.any()  # remembered, and not asked for each sample
        monkeypatch.setattr(reader_module.time, "monotonic", lambda now=time.monotonic: now() + 600)
        assert next(batches).valid_B.all()
        monkeypatch.undo()
        made.take_bad_records()
        made._backend._reader._unusable.clear()
    made.close()


def test_metrics_are_plain_numbers(manifest):
    made = loader(manifest)
    take(made, 0, 5)
    metrics = made.metrics()
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert metrics["samples"] == 40
    assert metrics["bytes_read"] > 0
    assert 0 < metrics["get_seconds/p50"] <= metrics["get_seconds/p99"]
    assert metrics["epoch/0"] == pytest.approx(40 / 60)
    assert metrics["wait_seconds"] > 0
    assert metrics["queue_bytes"] > 0


def test_a_stored_configuration_with_the_former_backend_name_is_read():
    stored = {"sources": ({"manifest": "m"},), "lanes": 4, "backend": "inline"}
    assert DataConfig(**stored).backend == "process"
    assert DataConfig(**stored | {"backend": "ray"}).backend == "ray"


class Picky(Encoder):
    """Refuses some captions, as tokenizers do, or everything, as a wrong configuration does."""

    def __init__(self, refused):
        self.refused = refused

    def __call__(self, captions, seeds):
        for caption in captions:
            if self.refused in caption:
                raise TypeError(f"cannot encode {caption}")
        return super().__call__(captions, seeds)


def read_only(submit):
    """Make the arrays of parts read-only, as those of Ray's object store are."""

    def submitted(*arguments):
        future = submit(*arguments)
        future.result().images_BHWC.flags.writeable = False
        return future

    return submitted


def test_a_caption_that_the_encoder_refuses_is_masked_with_its_key_and_shifts_nothing(manifest, monkeypatch):
    batches = {}
    monkeypatch.setattr(InProcessBackend, "submit", read_only(InProcessBackend.submit))
    for encoder in (Encoder(), Picky("number 7")):
        made = loader(manifest, batch=20, encoder=encoder)
        batches[type(encoder)] = take(made, 0, 1)[0]
    whole, masked = batches[Encoder], batches[Picky]
    (row,) = (i for i, key in enumerate(whole.keys) if key.endswith("#000007"))
    others = [i for i in range(20) if i != row]
    assert masked.valid_B.tolist() == [i != row for i in range(20)]
    assert masked.keys == whole.keys
    assert not masked.images_BCHW[row].any()
    assert torch.equal(masked.images_BCHW[others], whole.images_BCHW[others])
    assert torch.equal(masked.tokens["lengths"][others], whole.tokens["lengths"][others])
    (record,) = made.take_bad_records()
    assert (record.cause, record.key, record.row) == ("caption_refused", "000007", row)


def test_an_encoder_that_refuses_everything_is_an_error_of_its_own(manifest):
    with pytest.raises(TypeError, match="cannot encode"):
        take(loader(manifest, encoder=Picky("")), 0, 1)
