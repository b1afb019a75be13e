"""Batches of one rank, step by step: requests lane parts from readers ahead of time and combines them."""

import functools
import time
from collections.abc import Iterator

import torch

from isthmus.data_pipeline.config import DataConfig
from isthmus.data_pipeline.hashing import stable_hash
from isthmus.data_pipeline.order.plan import Plan, SampleRef
from isthmus.data_pipeline.order.virtual_ranks import LaneShare
from isthmus.data_pipeline.reading.backend import Backend, InProcessBackend
from isthmus.data_pipeline.reading.batch import Batch, LanePart, PartRequest, TextEncoder
from isthmus.data_pipeline.reading.loader_metrics import LoaderMetrics
from isthmus.data_pipeline.reading.part_queue import PartQueue
from isthmus.data_pipeline.reading.processes import ProcessBackend
from isthmus.data_pipeline.reading.quarantine import BadRecord, Budget
from isthmus.data_pipeline.reading.reader import Reader
from isthmus.data_pipeline.store.object_store import ObjectStore

_CHUNK_LOOKAHEAD_STEPS = 8  # steps beyond the prefetched batches whose chunks are fetched


class Loader:
    """The batches of one rank; the step is its whole state.

    Args:
        config: Reading, caching, prefetching, tolerance.
        store: Access to shards and indexes; readers get a copy.
        plan: The order, such as `load_plan` returns.
        encoder: Captions and seeds -> token tensors.
        image_size_pixels: Side of the square images.
        share: Which lanes this rank has.
        train: False: whole images without augmentation, and rows beyond the first epoch are masked.

    Raises:
        DataError: the number of ranks does not divide that of lanes or of virtual ranks.
    """

    def __init__(
        self,
        config: DataConfig,
        store: ObjectStore,
        plan: Plan,
        encoder: TextEncoder,
        *,
        image_size_pixels: int,
        share: LaneShare = LaneShare(),  # noqa: B008 - immutable
        train: bool = True,
    ) -> None:
        self.plan = plan
        self._encoder = encoder
        self._image_size = image_size_pixels
        self.lanes = share.lanes(plan.lanes)
        make_reader = functools.partial(Reader, config, store, image_size_pixels, plan.seed, train)
        self._backend = _open_backend(config, make_reader, self.lanes, share)
        self._parts = PartQueue(self._backend, config.reader_timeout_seconds, store)
        self._ahead_steps = config.prefetch_steps if self._backend.is_async else 0
        self._samples: dict[tuple[int, int], tuple[SampleRef, ...]] = {}
        self._bad_records: list[BadRecord] = []
        self._budget = Budget(config.budget)
        self._metrics = LoaderMetrics()
        self._step = 0
        self._asked: range | None = None
        """Steps that `ask` has requested and `batches` has not begun."""

    def ask(self, start_step: int, num_steps: int) -> None:
        """Request the first of these batches, so that they are on their way when `batches` begins with them.

        Readers of the calling process read nothing before.
        """
        if self._backend.is_async:
            next_step = self._begin(start_step, start_step)
            self._asked = range(next_step, min(start_step + num_steps, start_step + 1 + self._ahead_steps))
            for step in self._asked:
                self._request_step(step, is_first=step == start_step)

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step .. start_step + num_steps - 1.

        Raises:
            BudgetExceeded: too many bad samples.
            DataError: the store cannot be read, or readers are unavailable or die of the same samples (PartQueue.take).
        """
        end_step = start_step + num_steps
        next_step = self._begin(start_step, end_step)
        for step in range(start_step, end_step):
            begin = time.perf_counter()
            while next_step < min(end_step, step + 1 + self._ahead_steps):
                self._request_step(next_step, is_first=next_step == start_step)
                next_step += 1
            parts = self._parts.take()
            self._metrics.wait_seconds += time.perf_counter() - begin
            self._step = step + 1
            yield self._assemble(step, parts)

    def take_bad_records(self) -> list[BadRecord]:
        """Return the records of the bad samples in the batches since the last call; the caller keeps them."""
        records, self._bad_records = self._bad_records, []
        return records

    def metrics(self) -> dict[str, float]:
        """Return totals since the start: seconds, bytes, counts by cause, GET percentiles, epoch of each source."""
        epochs = {f"epoch/{source}": epoch for source, epoch in enumerate(self.plan.epochs(self._step))}
        asked_again = {"parts_asked_again": self._parts.num_asked_again}
        return self._metrics.numbers() | asked_again | epochs

    def close(self) -> None:
        """Stop the readers; a thread that waits for one of them gets a DataError. May be called again."""
        self._parts.close()
        self._backend.close()

    def _begin(self, start_step: int, end_step: int) -> int:
        """Forget what was requested, except by `ask` for just these steps; return the first step to request."""
        asked, self._asked = self._asked, None
        if asked and asked.start == start_step and asked.stop <= end_step:
            return asked.stop
        self._samples.clear()
        self._parts.clear()
        return start_step

    def _request_step(self, step: int, *, is_first: bool) -> None:
        self._parts.request([self._request(step, lane, is_first) for lane in self.lanes])

    def _request(self, step: int, lane: int, is_first: bool) -> PartRequest:
        """Describe a lane's step; the first request also expects the chunks of all steps up to the lookahead."""
        horizon = step + self._ahead_steps + _CHUNK_LOOKAHEAD_STEPS
        samples = self._lane_samples(step, lane)
        lookahead = range(step, horizon + 1) if is_first else range(horizon, horizon + 1)
        expected = dict.fromkeys(
            (sample.source, sample.shard, sample.chunk)
            for later in lookahead
            for sample in self._lane_samples(later, lane)
        )
        del self._samples[step, lane]
        needed = {(sample.source, sample.shard) for sample in samples} | {chunk[:2] for chunk in expected}
        shards = {(source, shard): self.plan.manifests[source].shards[shard] for source, shard in needed}
        return PartRequest(step, lane, samples, shards, tuple(expected))

    def _lane_samples(self, step: int, lane: int) -> tuple[SampleRef, ...]:
        key = (step, lane)
        if key not in self._samples:
            self._samples[key] = tuple(self.plan.lane_samples(step, lane))
        return self._samples[key]

    def _assemble(self, step: int, parts: list[LanePart]) -> Batch:
        """Put the lane parts, which are in row order, into one batch."""
        width = self.plan.lane_batch_size
        size = self._image_size
        samples = [sample for part in parts for sample in part.samples]
        tokens = self._encode(step, samples, parts)  # first, for it may mask samples
        images_BHWC = torch.empty((len(parts) * width, size, size, 3), dtype=torch.uint8)
        for place, part in enumerate(parts):
            images_BHWC[place * width : (place + 1) * width].numpy()[:] = part.images_BHWC
        self._account(samples, parts)
        return Batch(
            step=step,
            rows_B=torch.tensor([sample.row for sample in samples], dtype=torch.int64),
            valid_B=torch.tensor([valid for part in parts for valid in part.valid], dtype=torch.bool),
            images_BCHW=images_BHWC.permute(0, 3, 1, 2),
            flip_B=torch.tensor([flip for part in parts for flip in part.flips], dtype=torch.bool),
            tokens=tokens,
            captions=[caption for part in parts for caption in part.captions],
            keys=[key for part in parts for key in part.keys],
            image_ids_B=torch.tensor([image_id for part in parts for image_id in part.image_ids], dtype=torch.int64),
            positions=[(sample.source, sample.epoch, sample.position) for sample in samples],
        )

    def _encode(self, step: int, samples: list[SampleRef], parts: list[LanePart]) -> dict[str, torch.Tensor]:
        """Encode the captions; a sample whose caption the encoder refuses is masked, with the cause."""
        seeds = [stable_hash("text", self.plan.seed, s.source, s.epoch, s.position) for s in samples]
        try:
            return self._encoder([caption for part in parts for caption in part.captions], seeds)
        except Exception:
            self._encoder([""], [0])  # what no caption causes, such as a wrong configuration, is raised here
            if not self._mask_refused(step, seeds, parts):
                raise
        return self._encoder([caption for part in parts for caption in part.captions], seeds)

    def _mask_refused(self, step: int, seeds: list[int], parts: list[LanePart]) -> bool:
        rows = [(part, place) for part in parts for place in range(len(part.captions))]
        num_masked = 0
        for (part, place), seed in zip(rows, seeds, strict=True):
            try:
                self._encoder([part.captions[place]], [seed])
            except Exception as error:  # noqa: BLE001 - encoders raise anything
                num_masked += 1
                ref = part.samples[place]
                shard = self.plan.manifests[ref.source].shards[ref.shard].url
                detail = f"the encoder refuses {part.captions[place][:80]!a}: {type(error).__name__}: {error}"
                where = (ref.source, ref.epoch, ref.position, shard, part.keys[place].partition("#")[2], -1)
                part.mask(place, BadRecord(step, ref.row, *where, "caption_refused", detail))
        return num_masked > 0

    def _account(self, samples: list[SampleRef], parts: list[LanePart]) -> None:
        """Update metrics and budget with the parts of a step."""
        for part in parts:
            self._metrics.add(part)
        records = {record.row: record for part in parts for record in part.bad}
        self._bad_records.extend(records.values())
        bad = {place: records[sample.row] for place, sample in enumerate(samples) if sample.row in records}
        self._budget.add([sample.source for sample in samples], bad)


def _open_backend(
    config: DataConfig, make_reader: functools.partial[Reader], lanes: list[int], share: LaneShare
) -> Backend:
    if config.backend == "ray":
        from isthmus.data_pipeline.reading.actors import RayBackend  # noqa: PLC0415 - Ray is needed by this backend only

        return RayBackend(make_reader, config, lanes, share.rank, share.world_size)
    if config.readers == 0:
        return InProcessBackend(make_reader)
    return ProcessBackend(make_reader, config.readers, lanes)
