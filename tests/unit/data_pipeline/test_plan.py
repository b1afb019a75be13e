"""The order: exactly once per epoch, the same for every world size, the same from any starting step."""

import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.hashing import stable_hash
from isthmus.data_pipeline.order.plan import Plan
from tests.unit.data_pipeline.planned import PlannedSet, step_samples

pytestmark = pytest.mark.unit

chunk_sizes = st.integers(1, 9)
data_sets = st.lists(st.lists(chunk_sizes, min_size=1, max_size=5), min_size=1, max_size=5).map(PlannedSet)
mixtures = st.lists(st.tuples(data_sets, st.floats(0.05, 10)), min_size=1, max_size=3)


@st.composite
def plans(draw):
    sources = draw(mixtures)
    lanes = draw(st.integers(1, 6))
    return Plan(
        sources,
        seed=draw(st.integers(0, 3)),
        global_batch_size=lanes * draw(st.integers(1, 5)),
        lanes=lanes,
        shuffle_chunks=draw(st.integers(1, 4)),
    )


@given(plans(), st.integers(1, 25))
@settings(max_examples=150, deadline=None)
def test_every_sample_once_per_epoch_and_no_gap_between_epochs(plan, num_steps):
    seen = defaultdict(Counter)
    positions = defaultdict(list)
    for step in range(num_steps):
        for ref in step_samples(plan, step):
            seen[ref.source, ref.epoch][ref.shard, ref.chunk, ref.sample] += 1
            positions[ref.source].append((ref.epoch, ref.position))
    for (source, epoch), counts in seen.items():
        assert set(counts.values()) == {1}
        if (source, epoch + 1) in seen:  # the epoch is over: nothing was left out
            assert sorted(counts) == plan.manifests[source].all_samples()
    for source, walked in positions.items():
        size = plan.epoch_samples[source]
        assert walked == [divmod(i, size) for i in range(len(walked))]


@given(plans(), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_world_sizes_share_one_order(plan, step):
    whole = step_samples(plan, step)
    assert [ref.row for ref in whole] == list(range(plan.global_batch_size))
    for world_size in (w for w in range(1, plan.lanes + 1) if plan.lanes % w == 0):
        parts = [step_samples(plan, step, range(rank, plan.lanes, world_size)) for rank in range(world_size)]
        assert all(part == sorted(part, key=lambda ref: ref.row) for part in parts)
        assert sorted((ref for part in parts for ref in part), key=lambda ref: ref.row) == whole


@given(plans(), st.integers(0, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_seeking_equals_walking(plan, step, data):
    """A plan that is asked out of order gives what a fresh plan gives that walks."""
    fresh = Plan(
        [(manifest, weight) for manifest, weight in zip(plan.manifests, plan.weights, strict=True)],
        seed=plan.seed,
        global_batch_size=plan.global_batch_size,
        lanes=plan.lanes,
        shuffle_chunks=plan.shuffle_chunks,
    )
    asked = data.draw(st.lists(st.integers(0, 60), max_size=5))
    for other in [*asked, step]:
        found = step_samples(plan, other)
    assert [step_samples(fresh, walked) for walked in range(step + 1)][-1] == found


@given(mixtures, st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_sources_keep_their_shares_at_every_step(sources, lanes, width):
    plan = Plan(sources, seed=0, global_batch_size=lanes * width, lanes=lanes, shuffle_chunks=2)
    total = sum(weight for _, weight in sources)
    counts = Counter()
    for step in range(20):
        counts.update(ref.source for ref in step_samples(plan, step))
        drawn = (step + 1) * lanes * width
        for source, (_, weight) in enumerate(sources):
            # One lane's rounding is below one slot per source before it; the lanes' phases cancel most of it.
            assert abs(counts[source] - drawn * weight / total) <= len(sources) * (1 + lanes / 4)


def test_two_equal_sources_alternate_exactly():
    sets = [(PlannedSet([[50]], "a"), 1.0), (PlannedSet([[50]], "b"), 1.0)]
    plan = Plan(sets, seed=0, global_batch_size=8, lanes=4, shuffle_chunks=1)
    assert [sum(ref.source for ref in step_samples(plan, step)) for step in range(10)] == [4] * 10


def test_a_set_smaller_than_the_batch_repeats_within_a_step():
    plan = Plan([(PlannedSet([[3]]), 1.0)], seed=0, global_batch_size=8, lanes=2, shuffle_chunks=1)
    refs = step_samples(plan, 0)
    assert [(ref.epoch, ref.position) for ref in refs] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 1),
    ]
    assert sorted(ref.sample for ref in refs[:3]) == sorted(ref.sample for ref in refs[3:6]) == [0, 1, 2]


def test_epochs_and_seeds_differ():
    sizes = PlannedSet([[20] * 10] * 4)

    def order(seed, first):
        plan = Plan([(sizes, 1.0)], seed=seed, global_batch_size=8, lanes=4, shuffle_chunks=2)
        steps = range(first, first + sizes.num_samples // 8)
        return [(ref.shard, ref.chunk, ref.sample) for step in steps for ref in step_samples(plan, step)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, sizes.num_samples // 8)
    assert sorted(order(0, 0)) == sorted(order(0, sizes.num_samples // 8))


def test_a_lane_has_at_most_its_window_of_chunks_open():
    sizes = PlannedSet([[10] * 20] * 4)
    plan = Plan([(sizes, 1.0)], seed=0, global_batch_size=8, lanes=2, shuffle_chunks=3)
    uses = defaultdict(list)
    for step in range(sizes.num_samples // 8):
        for ref in plan.lane_samples(step, 0):
            uses[ref.shard, ref.chunk].append(step)
    open_chunks = [sum(min(steps) <= step <= max(steps) for steps in uses.values()) for step in range(100)]
    assert max(open_chunks) <= 2 * 3  # the end of one window and the start of the next may share a step
    assert sorted(open_chunks)[50] == 3


@given(plans())
@settings(max_examples=50, deadline=None)
def test_the_last_sample_of_each_chunk_in_a_lane_is_marked(plan):
    for lane in range(plan.lanes):
        refs = [ref for step in range(60) for ref in plan.lane_samples(step, lane)]
        last = {(ref.source, ref.epoch, ref.shard, ref.chunk): place for place, ref in enumerate(refs)}
        newest = {ref.source: ref.epoch for ref in refs}  # an epoch that may continue after the steps seen
        for place, ref in enumerate(refs):
            if ref.epoch < newest[ref.source]:
                assert ref.is_last_of_chunk == (last[ref.source, ref.epoch, ref.shard, ref.chunk] == place)


def test_the_order_is_a_contract():
    """These numbers may change only with ORDER_VERSION and a line in CHANGELOG.md."""
    sets = [(PlannedSet([[3, 4], [5]], "a"), 2.0), (PlannedSet([[2, 2]], "b"), 1.0)]
    plan = Plan(sets, seed=7, global_batch_size=6, lanes=2, shuffle_chunks=2)
    found = [(r.source, r.epoch, r.position, r.shard, r.chunk, r.sample) for r in step_samples(plan, 5)]
    assert found == [
        (1, 2, 2, 0, 1, 0),
        (0, 1, 8, 0, 0, 0),
        (0, 1, 9, 0, 1, 1),
        (0, 1, 10, 1, 0, 4),
        (1, 2, 3, 0, 0, 1),
        (0, 1, 11, 1, 0, 0),
    ]
    assert plan.identity == "fa174be7a47a0e3937bc318e85a129bb"


def test_hashes_are_stable_and_take_any_text():
    assert stable_hash("caption", 7, "é") == 16132844152072763273
    assert stable_hash("image", "\ud800") != stable_hash("image", "\ud801")  # as JSON may hold them


def test_the_identity_covers_all_that_moves_samples():
    def identity(seed=0, batch=8, lanes=4, window=2, weight=1.0, data="a"):
        sets = [(PlannedSet([[5]], data), weight), (PlannedSet([[5]], "z"), 1.0)]
        return Plan(sets, seed=seed, global_batch_size=batch, lanes=lanes, shuffle_chunks=window).identity

    changed = [identity(seed=1), identity(batch=12), identity(lanes=2), identity(window=3), identity(weight=2.0)]
    assert len({identity(), *changed, identity(data="b")}) == 7
    assert identity() == identity()


def test_a_lane_count_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(DataError, match=r"data.lanes = 3 does not divide the global batch size 8"):
        Plan([(PlannedSet([[5]]), 1.0)], seed=0, global_batch_size=8, lanes=3, shuffle_chunks=1)


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="source 0 of the mixture has no samples"):
        Plan([(PlannedSet([[]]), 1.0)], seed=0, global_batch_size=8, lanes=4, shuffle_chunks=1)


def test_planning_memory_is_bounded_by_the_chunks():
    """At 5 million chunks (100,000 shards, a billion samples) 32 bytes a chunk are 160 MB."""
    num_chunks = 400_000

    class Large:
        hash = "large"
        chunk_samples = np.full(num_chunks, 200, dtype=np.int32)
        shard_chunk_starts = np.arange(0, num_chunks + 1, 50)

    tracemalloc.start()
    plan = Plan([(Large(), 1.0)], seed=0, global_batch_size=64, lanes=8, shuffle_chunks=4)
    epoch_steps = plan.epoch_samples[0] // 64
    for step in (0, epoch_steps // 2, epoch_steps, 2 * epoch_steps, 7 * epoch_steps):
        plan.lane_samples(step, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * num_chunks + 16e6  # and a few blocks of temporaries


def test_seeking_far_needs_no_walk():
    """The ten-millionth step of a set with a million chunks: one permutation, whatever the step."""
    rng = np.random.default_rng(0)

    class Large:
        hash = "large"
        chunk_samples = rng.integers(150, 250, 1_000_000).astype(np.int32)
        shard_chunk_starts = np.arange(0, 1_000_001, 50)

    plan = Plan([(Large(), 1.0)], seed=0, global_batch_size=2048, lanes=256, shuffle_chunks=4)
    refs = step_samples(plan, 10_000_000)
    assert {ref.epoch for ref in refs} == {10_000_000 * 2048 // int(Large.chunk_samples.sum())}
    assert len({(ref.shard, ref.chunk, ref.sample) for ref in refs}) == 2048
