"""Samples and steps that are left out are part of the order: exact for every world size and from any step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.order.plan import Plan
from isthmus.data_pipeline.order.skipped_steps import SkippedSteps, StepRange
from tests.unit.data_pipeline.planned import PlannedSet, step_samples

pytestmark = pytest.mark.unit

LANES = 4
data_sets = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4).map(PlannedSet)


def plan_of(sources, **left_out):
    return Plan(
        [(data_set, weight) for data_set, weight in sources],
        seed=3, global_batch_size=2 * LANES, lanes=LANES, shuffle_chunks=2, **left_out,
    )  # fmt: skip


@st.composite
def plans(draw):
    """A plan of one or two sources, each without some samples, or none; and which these are."""
    sources = draw(st.lists(st.tuples(data_sets, st.floats(0.2, 3)), min_size=1, max_size=2))
    excluded = {}
    for source, (data_set, _) in enumerate(sources):
        numbers = st.integers(0, data_set.num_samples - 1)
        excluded[source] = np.array(sorted(draw(st.sets(numbers, max_size=data_set.num_samples - 1))), dtype=np.int64)
    return plan_of(sources, excluded=excluded), excluded


def number_of(plan, ref):
    """The number of a sample in its source, over all chunks."""
    chunk = int(plan.manifests[ref.source].shard_chunk_starts[ref.shard]) + ref.chunk
    return int(plan.manifests[ref.source].chunk_samples[:chunk].sum()) + ref.sample


@given(plans(), st.integers(1, 25))
@settings(max_examples=80, deadline=None)
def test_an_epoch_has_every_sample_once_but_the_excluded(planned, num_steps):
    plan, excluded = planned
    epochs = {}
    for step in range(num_steps):
        for ref in step_samples(plan, step):
            epochs.setdefault((ref.source, ref.epoch), []).append(number_of(plan, ref))
    for (source, epoch), numbers in epochs.items():
        kept = sorted(set(range(plan.manifests[source].num_samples)) - set(excluded[source].tolist()))
        assert len(numbers) == len(set(numbers))
        assert set(numbers) <= set(kept)
        if (source, epoch + 1) in epochs:  # the epoch is over
            assert sorted(numbers) == kept


@given(plans(), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_a_sample_is_found_at_the_step_and_row_that_hold_it(planned, step):
    plan, excluded = planned
    for ref in step_samples(plan, step):
        assert plan.find(ref.source, ref.epoch, number_of(plan, ref)) == (step, ref.row)
    for source, numbers in excluded.items():
        assert all(plan.find(source, 0, int(number)) is None for number in numbers)


def test_without_exclusion_the_identity_is_that_of_a_run_that_knows_none():
    sources = [(PlannedSet([[3, 4], [5]]), 1.0)]
    plain = plan_of(sources)
    assert plan_of(sources, excluded={0: np.array([], dtype=np.int64)}).identity == plain.identity
    some = plan_of(sources, excluded={0: np.array([1, 5])})
    assert some.identity != plain.identity
    assert some.identity == plan_of(sources, excluded={0: np.array([5, 1, 1])}).identity
    assert some.identity != plan_of(sources, excluded={0: np.array([1])}).identity


def test_a_source_of_which_nothing_is_left_is_refused():
    with pytest.raises(DataError, match="source 0 of the mixture has no samples"):
        plan_of([(PlannedSet([[2]]), 1.0)], excluded={0: np.array([0, 1])})


@given(data_sets, st.sets(st.integers(0, 20), max_size=8))
@settings(max_examples=60, deadline=None)
def test_training_uses_the_steps_of_the_order_that_are_not_skipped(data_set, steps):
    skipped = SkippedSteps([(step, step) for step in steps])
    plain, plan = plan_of([(data_set, 1.0)]), plan_of([(data_set, 1.0)], skipped=skipped)
    used = [step for step in range(40) if step not in steps]
    for step, data_step in enumerate(used):
        assert skipped.data_step(step) == data_step
        assert skipped.training_step(data_step) == step
    assert all(skipped.training_step(step) is None for step in steps)
    for step in (0, 7, 20):
        assert step_samples(plan, step) == step_samples(plain, used[step])
        for world_size in (2, 4):
            parts = [step_samples(plan, step, range(rank, LANES, world_size)) for rank in range(world_size)]
            rows = sorted((ref for part in parts for ref in part), key=lambda ref: ref.row)
            assert rows == step_samples(plain, used[step])


def test_only_ranges_that_training_has_passed_decide_what_it_was_trained_on():
    skipped = SkippedSteps([(10, 12), (3, 4)])
    assert skipped.ranges == ((3, 4), (10, 12))
    assert skipped.before(0) == skipped.before(3) == ()  # steps 0, 1, 2
    assert skipped.before(4) == ((3, 4),)  # step 3 is data step 5
    assert skipped.before(8) == ((3, 4),)  # step 7 is data step 9
    assert skipped.before(9) == ((3, 4), (10, 12))


def test_ranges_that_overlap_are_one_line():
    with pytest.raises(DataError, match="skipped steps 3-5 and 5-9 overlap"):
        SkippedSteps([(5, 9), (3, 5)])
    with pytest.raises(DataError, match="7-6"):
        SkippedSteps([(7, 6)])


@pytest.mark.parametrize("text", ["", "-", "5-", "-5", "9-8", "a-b", "1-2-3", "1.5"])
def test_a_range_that_cannot_be_read_says_what_one_is(text):
    with pytest.raises(DataError, match="give A-B with A <= B"):
        StepRange.parse(text)
    assert StepRange.parse("7") == (7, 7)
    assert StepRange.parse("7-9") == (7, 9)
