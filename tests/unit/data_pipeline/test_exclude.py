"""`data.exclude`: the named samples are in no batch, whatever the world size and wherever a run resumes."""

import pytest

from isthmus.data_pipeline.dataset.keys import find_keys
from isthmus.data_pipeline.dataset.manifest import Manifest
from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.store.object_store import ObjectStore
from tests.unit.data_pipeline.tar_set import assert_equal, good_sample, loader, take, write_set

pytestmark = pytest.mark.unit
NUM_SAMPLES, BATCH = 48, 8
EXCLUDED = ("0/0#000003", "0/1#000025", "000047")
"""Two shards qualified, one bare key."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(str(tmp_path_factory.mktemp("set")), [good_sample(number) for number in range(NUM_SAMPLES)])


@pytest.fixture
def exclude(tmp_path):
    path = tmp_path / "exclude.txt"
    path.write_text("".join(f"{key}\n" for key in EXCLUDED) + "\n")
    return str(path)


def test_an_epoch_is_all_but_the_excluded_and_every_batch_is_full(data, exclude):
    made = loader(data, exclude=exclude)
    assert made.plan.epoch_samples == [NUM_SAMPLES - len(EXCLUDED)]
    batches = take(made, 0, 12)
    rows = [row for batch in batches for row in zip(batch.keys, batch.positions, batch.captions, strict=True)]
    first_epoch = sorted(key.partition("#")[2] for key, (_, epoch, _), _ in rows if epoch == 0)
    assert first_epoch == [f"{number:06d}" for number in range(NUM_SAMPLES) if number not in (3, 25, 47)]
    assert all(batch.valid_B.all() for batch in batches)
    for key, _, caption in rows:  # the bytes are those of the key, not of the neighbour that is left out
        assert caption == f"picture, number {int(key.partition('#')[2])}"
    assert made.take_bad_records() == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resume_at_any_world_size_gives_the_same_rows(data, exclude, world_size):
    skip = ((2, 3),)
    through = take(loader(data, exclude=exclude, skip_steps=skip), 0, 9)
    ranks = [
        take(loader(data, exclude=exclude, skip_steps=skip, rank=rank, world_size=world_size), 5, 4)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(through[5:]):
        rows = {int(row): key for rank in ranks for row, key in zip(rank[step].rows_B, rank[step].keys, strict=True)}
        assert [rows[row] for row in range(BATCH)] == whole.keys
        assert whole.step == 5 + step


def test_skipped_steps_are_the_batches_of_later_steps(data):
    plain = take(loader(data), 0, 8)
    for one, other in zip(take(loader(data, skip_steps=((2, 4),)), 0, 5), [*plain[:2], *plain[5:]], strict=True):
        assert_equal(one._replace(step=0), other._replace(step=0))


def test_the_identity_is_of_what_is_left_out_not_of_the_file(data, exclude, tmp_path):
    identities = {}
    for name, keys in {"same": reversed(EXCLUDED), "fewer": EXCLUDED[:1], "none": ()}.items():
        path = tmp_path / name
        path.write_text("\r\n".join(keys))
        made = loader(data, exclude=str(path))
        identities[name] = made.plan.identity
        made.close()
    plain, excluding = loader(data), loader(data, exclude=exclude)
    plain.close()
    excluding.close()
    assert identities["same"] == excluding.plan.identity
    assert identities["none"] == plain.plan.identity
    assert len({*identities.values()}) == 3


@pytest.mark.parametrize("key", ["0/0#absent", "0/9#000003", "1/0#000003", "absent", "0/1#000003"])
def test_a_key_of_no_sample_is_named(data, tmp_path, key):
    path = tmp_path / "exclude.txt"
    path.write_text(f"000001\n{key}\n")
    with pytest.raises(DataError, match=rf"exclude.txt: 1 of 2 keys are in no source of the run: '{key}'"):
        loader(data, exclude=str(path))


def test_a_file_that_cannot_be_read_is_one_line(data, tmp_path):
    with pytest.raises(DataError, match="absent; give a file with one sample key per line"):
        loader(data, exclude=str(tmp_path / "absent"))
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not text in UTF-8"):
        loader(data, exclude=str(path))


def test_a_bare_key_names_the_sample_of_every_source(data, tmp_path):
    other = write_set(str(tmp_path / "other"), [good_sample(number) for number in range(5)])
    store = ObjectStore()
    manifests = [Manifest.load(url, store) for url in (data, other)]
    by_url = f"{manifests[0].shards[1].url}#000021"
    found = find_keys(["000003", "0/0#000003", "1/0#000004", "000040", by_url], manifests, store)
    assert [(sample.name, sample.number) for sample in found[by_url]] == [("0/1#000021", 21)]
    assert [sample.name for sample in found["000003"]] == ["0/0#000003", "1/0#000003"]
    assert [(sample.source, sample.number) for sample in found["1/0#000004"]] == [(1, 4)]
    assert [(sample.source, sample.number) for sample in found["000040"]] == [(0, 40)]
    assert found["0/0#000003"] == found["000003"][:1]


def test_a_key_that_names_its_shard_costs_one_index(data, monkeypatch):
    manifests, store = [Manifest.load(data, ObjectStore())], ObjectStore()
    asked = []
    get = ObjectStore.get
    monkeypatch.setattr(ObjectStore, "get", lambda self, url: asked.append(url) or get(self, url))
    assert find_keys(["0/1#000021", "0/1#000022"], manifests, store)["0/1#000022"]
    assert asked == [manifests[0].shards[1].index_url]
    find_keys(["0/1#000021", "000003"], manifests, store)
    assert len(asked) == 1 + len(manifests[0].shards)
