"""The order of all samples as a pure function of (manifests, weights, seed, batch size, lanes, window). No I/O.

An epoch of a source is one permutation of its chunks. Read as one sequence of samples it is cut into one segment per
lane, at sample granularity, each exactly as long as the lane's slots in that epoch ask for: every sample is consumed
once per epoch and the next epoch begins in the very next slot. Inside its segment a lane shuffles samples over windows
of K chunks.

Nothing depends on the world size: rank r of W merely owns lanes r, r + W, ... Finding any step costs a few array
operations on L lanes; memory is one permutation and one cumulative count over the chunks per epoch in use.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from isthmus.data_pipeline.errors import DataError
from isthmus.data_pipeline.hashing import permutation, stable_hash
from isthmus.data_pipeline.order.exclusion import Exclusion
from isthmus.data_pipeline.order.mixture import Mixture
from isthmus.data_pipeline.order.skipped_steps import SkippedSteps

_BLOCK = 1 << 18
ORDER_VERSION = 1  # part of the identity: a change of the order is a change of the contract

T = TypeVar("T")
IntArray = NDArray[np.int64]


class PlannedManifest(Protocol):
    """What the order needs to know of a data set."""

    @property
    def hash(self) -> str:
        """Identity of the data set."""

    @property
    def shards(self) -> Sequence[Any]:
        """The shards, which are only handed on."""

    @property
    def chunk_samples(self) -> NDArray[np.integer[Any]]:
        """Samples of every chunk, shard after shard."""

    @property
    def shard_chunk_starts(self) -> NDArray[np.integer[Any]]:
        """Index of each shard's first chunk in `chunk_samples`, and its length at the end."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a row of the global batch comes from."""

    source: int
    epoch: int
    position: int
    """Place in the source's epoch, in order of consumption."""
    shard: int
    chunk: int
    """Index of the chunk in its shard."""
    sample: int
    """Index of the sample in its chunk."""
    row: int
    is_last_of_chunk: bool
    """No later sample of the lane is in the chunk, in this epoch."""


class _Window(NamedTuple):
    """Samples of up to K chunks that a lane shuffles together."""

    start: int  # first sample, as an index into the epoch's permuted sequence
    first_chunk: int  # its chunk, as an index into the permuted chunks
    order: NDArray[np.int32]  # permutation of the window's samples
    is_last: NDArray[np.bool_]  # by place in the order: the last one of its chunk


class _Epoch(NamedTuple):
    """One permutation of a source's chunks."""

    chunks: NDArray[np.int32]  # permuted chunk ids
    ends: IntArray  # cumulative samples after each permuted chunk


class Plan:
    """The order of the samples of one or more weighted sources.

    Args:
        sources: Manifests with their weights.
        seed: Seed of the order.
        global_batch_size: Rows per step over all ranks; a multiple of `lanes`.
        lanes: Number of sample streams L.
        shuffle_chunks: Chunks K over which a lane shuffles samples.
        excluded: Samples of each source that are left out, by source, counted over all chunks of the source. The
            order is that of a data set without them.
        skipped: Steps of the order that training skips. Not part of the identity: a checkpoint records them.

    Raises:
        DataError: `lanes` does not divide the batch, or a source has no samples.
    """

    def __init__(
        self,
        sources: Sequence[tuple[PlannedManifest, float]],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int,
        shuffle_chunks: int,
        excluded: Mapping[int, IntArray] | None = None,
        skipped: SkippedSteps | None = None,
    ) -> None:
        if global_batch_size % lanes:
            raise DataError(
                f"data.lanes = {lanes} does not divide the global batch size {global_batch_size}; "
                f"choose a global batch size that is a multiple of {lanes}"
            )
        self.seed, self.lanes, self.shuffle_chunks = seed, lanes, shuffle_chunks
        self.global_batch_size = global_batch_size
        self.lane_batch_size = global_batch_size // lanes
        self.manifests = [manifest for manifest, _ in sources]
        self.weights = [float(weight) for _, weight in sources]
        self.skipped = skipped or SkippedSteps()
        self._exclusions = {
            source: Exclusion(self.manifests[source].chunk_samples, samples)
            for source, samples in (excluded or {}).items()
            if len(samples)
        }
        self.epoch_samples = [int(self._chunk_samples(source).sum()) for source in range(len(sources))]
        for source, num_samples in enumerate(self.epoch_samples):
            if num_samples == 0:
                advice = "exclude fewer samples" if source in self._exclusions else "index it again"
                raise DataError(f"source {source} of the mixture has no samples; {advice} or remove it")
        self._mixture = Mixture([weight for _, weight in sources], lanes)
        parts = [str(part) for manifest, weight in sources for part in (manifest.hash, repr(float(weight)))]
        parts += [f"without {source}:{exclusion.hash}" for source, exclusion in sorted(self._exclusions.items())]
        fixed = (ORDER_VERSION, seed, global_batch_size, lanes, shuffle_chunks)
        self.identity = f"{stable_hash(*fixed, *parts):016x}{stable_hash('identity', *fixed, *parts):016x}"
        self._memory: dict[str, OrderedDict[Hashable, Any]] = {}

    def lane_samples(self, step: int, lane: int) -> list[SampleRef]:
        """Return the samples of a lane in a training step, in row order. Any step costs the same."""
        step = self.skipped.data_step(step)
        width = self.lane_batch_size
        counts = self._mixture.lane_counts(step * width, width, lane)
        drawn = np.diff(counts, axis=1)
        source_of = drawn.argmax(axis=0)
        refs: list[SampleRef | None] = [None] * width
        for source in np.flatnonzero(drawn.any(axis=1)):
            slots = np.flatnonzero(source_of == source)
            firsts, before = self._step_start(int(source), step)
            position = int(firsts[lane])  # global count of this source before the lane's first slot of the step
            for offset, slot in enumerate(slots):
                row = lane * width + int(slot)
                refs[slot] = self._locate(int(source), position + offset, lane, int(before[lane]) + offset, row)
        return [ref for ref in refs if ref is not None]

    def find(self, source: int, epoch: int, number: int) -> tuple[int, int] | None:
        """Return the data step and the row at which a sample comes in an epoch; None if it is excluded.

        The inverse of `lane_samples`, but for skipped steps: `skipped.training_step` tells which step uses a data step.

        Costs O(chunks) for the epoch, whose permutation is kept, the size of one window, and a binary search over the
        lane's slots: nothing grows with the number of steps but its logarithm.

        Args:
            source: Number of the source.
            epoch: Epoch of that source.
            number: Number of the sample in the source, counted over all chunks.
        """
        sizes = self.manifests[source].chunk_samples
        ends = np.cumsum(sizes, dtype=np.int64)
        chunk = int(np.searchsorted(ends, number, side="right"))
        sample = number - (int(ends[chunk]) - int(sizes[chunk]))
        exclusion = self._exclusions.get(source)
        kept = exclusion.kept(chunk, sample) if exclusion else sample
        if kept is None:
            return None
        order = self._epoch(source, epoch)
        index = int(np.flatnonzero(order.chunks == chunk)[0])
        shuffled = int(order.ends[index]) - int(self._chunk_samples(source)[chunk]) + kept
        starts, lane_starts = self._segments(source, epoch)
        lane = int(np.searchsorted(starts, shuffled, side="right")) - 1
        window = self._window(source, epoch, lane, index)
        place = int(np.flatnonzero(window.order == shuffled - window.start)[0])
        lane_count = int(lane_starts[lane]) + window.start + place - int(starts[lane])
        step, slot = divmod(self._slot_of(source, lane, lane_count), self.lane_batch_size)
        return step, lane * self.lane_batch_size + slot

    def epochs(self, step: int) -> list[float]:
        """Return for every source how many epochs of it are consumed, or skipped, before a training step."""
        counts = self._mixture.counts(self.skipped.data_step(step) * self.lane_batch_size).sum(axis=1)
        return [float(count) / size for count, size in zip(counts, self.epoch_samples, strict=True)]

    def _chunk_samples(self, source: int) -> NDArray[np.integer[Any]]:
        """Return how many samples of every chunk of a source are in the order."""
        exclusion = self._exclusions.get(source)
        return exclusion.chunk_samples if exclusion else self.manifests[source].chunk_samples

    def _locate(self, source: int, count: int, lane: int, lane_count: int, row: int) -> SampleRef:
        """Find the sample that the `count`-th slot of a source holds, the `lane_count`-th of it in its lane."""
        epoch, position = divmod(count, self.epoch_samples[source])
        starts, lane_starts = self._segments(source, epoch)
        offset = int(starts[lane]) + lane_count - int(lane_starts[lane])
        order = self._epoch(source, epoch)
        index = int(np.searchsorted(order.ends, offset, side="right"))
        window = self._window(source, epoch, lane, index)
        place = offset - window.start
        shuffled = window.start + int(window.order[place])
        index = window.first_chunk + int(
            np.searchsorted(
                order.ends[window.first_chunk : window.first_chunk + self.shuffle_chunks], shuffled, side="right"
            )
        )
        chunk = int(order.chunks[index])
        manifest = self.manifests[source]
        shard = int(np.searchsorted(manifest.shard_chunk_starts, chunk, side="right")) - 1
        sample = shuffled - (int(order.ends[index]) - int(self._chunk_samples(source)[chunk]))
        if exclusion := self._exclusions.get(source):
            sample = exclusion.sample(chunk, sample)
        chunk -= int(manifest.shard_chunk_starts[shard])
        return SampleRef(source, epoch, position, shard, chunk, sample, row, bool(window.is_last[place]))

    def _step_start(self, source: int, step: int) -> tuple[IntArray, IntArray]:
        """Return, per lane, the source's counts, global and in the lane, before the lane's first slot of a step."""

        def compute() -> tuple[IntArray, IntArray]:
            before = self._mixture.counts(step * self.lane_batch_size)[source]
            drawn = self._mixture.counts((step + 1) * self.lane_batch_size)[source] - before
            return before.sum() + np.cumsum(drawn) - drawn, before

        return self._remember("steps", (source, step), 4 * len(self.manifests) + 60, compute)

    def _lane_counts_at(self, source: int, count: int) -> IntArray:
        """Return how many of the source's first `count` slots each lane has."""
        low, high = 0, 1
        while self._mixture.counts(high * self.lane_batch_size)[source].sum() <= count:
            low, high = high, high * 2
        while high - low > 1:  # the last step that begins at or before `count`
            middle = (low + high) // 2
            if self._mixture.counts(middle * self.lane_batch_size)[source].sum() <= count:
                low = middle
            else:
                high = middle
        firsts, before = self._step_start(source, low)
        drawn = self._mixture.counts(high * self.lane_batch_size)[source] - before
        return before + np.clip(count - firsts, 0, drawn)

    def _slot_of(self, source: int, lane: int, lane_count: int) -> int:
        """Return the slot of a lane that holds the source's sample number `lane_count` in that lane."""

        def count(slots: int) -> int:
            return int(self._mixture.lane_counts(slots, 0, lane)[source, 0])

        low, high = 0, 1
        while count(high) <= lane_count:
            low, high = high, high * 2
        while high - low > 1:  # the last slot before which there are at most `lane_count`
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= lane_count else (low, middle)
        return low

    def _segments(self, source: int, epoch: int) -> tuple[IntArray, IntArray]:
        """Return, per lane, where its segment of the epoch starts, and its count of the source at that time."""

        def compute() -> tuple[IntArray, IntArray]:
            size = self.epoch_samples[source]
            first = self._lane_counts_at(source, epoch * size)
            lengths = self._lane_counts_at(source, (epoch + 1) * size) - first
            return np.concatenate([[0], np.cumsum(lengths)]), first

        return self._remember("segments", (source, epoch), 4 * len(self.manifests), compute)

    def _epoch(self, source: int, epoch: int) -> _Epoch:
        def compute() -> _Epoch:
            sizes = self._chunk_samples(source)
            chunks = permutation(len(sizes), "chunks", self.seed, source, epoch)
            ends = np.empty(len(sizes), dtype=np.int64)
            for first in range(0, len(sizes), _BLOCK):  # fancy indexing makes 8-byte copies of its indices
                ends[first : first + _BLOCK] = sizes[chunks[first : first + _BLOCK]]
            return _Epoch(chunks, np.cumsum(ends, out=ends))

        # Two per source: while an epoch ends, the readers already look into the next one.
        return self._remember(f"epochs-{source}", epoch, 2, compute)

    def _window(self, source: int, epoch: int, lane: int, index: int) -> _Window:
        """Return the window of a lane that contains the permuted chunk `index`."""
        order = self._epoch(source, epoch)
        starts, _ = self._segments(source, epoch)
        low, high = int(starts[lane]), int(starts[lane + 1])
        segment_chunk = int(np.searchsorted(order.ends, low, side="right"))
        # The first windows of the lanes differ in length, so that the lanes do not all ask for new chunks at once.
        number = (index - segment_chunk + lane) // self.shuffle_chunks
        first = max(segment_chunk, segment_chunk + number * self.shuffle_chunks - lane)
        last = segment_chunk + (number + 1) * self.shuffle_chunks - lane

        def compute() -> _Window:
            start = max(low, int(order.ends[first - 1]) if first else 0)
            end = min(high, int(order.ends[min(last, len(order.ends)) - 1]))
            shuffled = permutation(end - start, "window", self.seed, source, epoch, lane, number)
            return _Window(start, first, shuffled, _last_of_each_chunk(start + shuffled, order.ends[first:last]))

        return self._remember("windows", (source, epoch, lane, number), 2 * self.lanes * len(self.manifests), compute)

    def _remember(self, kind: str, key: Hashable, capacity: int, compute: Callable[[], T]) -> T:
        """Return `compute()`, kept among the `capacity` most recently used values of its kind."""
        values = self._memory.setdefault(kind, OrderedDict())
        if key in values:
            values.move_to_end(key)
            return values[key]  # type: ignore[no-any-return]
        while len(values) >= capacity:  # before computing: the old and the new need not be in memory at once
            values.popitem(last=False)
        values[key] = value = compute()
        return value


def _last_of_each_chunk(samples: NDArray[np.int32] | IntArray, chunk_ends: IntArray) -> NDArray[np.bool_]:
    """Return for every one of the samples whether it is the last one of its chunk in their order."""
    chunk_of = np.searchsorted(chunk_ends, samples, side="right")
    last = np.full(len(chunk_ends), -1)
    last[chunk_of] = np.arange(len(samples))  # of equal indices the last assignment stays
    is_last = np.zeros(len(samples), dtype=np.bool_)
    is_last[last[last >= 0]] = True
    return is_last
