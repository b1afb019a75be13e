"""Bad samples: their records, and how many of them a run tolerates."""

import dataclasses
from collections import Counter, deque
from collections.abc import Iterable

from isthmus.data_pipeline.config import BudgetConfig
from isthmus.data_pipeline.errors import DataError


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """One line of quarantine.jsonl: a sample that was masked, and why."""

    step: int
    row: int
    source: int
    epoch: int
    position: int
    shard: str
    """URL of the shard."""
    key: str
    """Key of the sample in its shard; "" where even that could not be read."""
    offset: int
    """Byte offset of the sample in its shard; -1 where unknown."""
    cause: str
    """Short name of the cause, for counting."""
    detail: str


class BudgetExceeded(DataError):
    """More bad samples than `data.budget` tolerates."""


class Budget:
    """Watches the share of bad samples over a sliding window, and their runs in each source."""

    def __init__(self, config: BudgetConfig) -> None:
        self._config = config
        self._window: deque[tuple[int, tuple[BadRecord, ...]]] = deque()
        self._num_samples = 0
        self._num_bad = 0
        self._in_a_row: Counter[int] = Counter()

    def add(self, sources: Iterable[int], bad: dict[int, BadRecord]) -> None:
        """Count the samples of a step: each row's source, and the records of the bad ones by place among the rows.

        Raises:
            BudgetExceeded: too many bad samples in the window or in a row; names the worst shard.
        """
        num_samples = 0
        for place, source in enumerate(sources):
            num_samples += 1
            self._in_a_row[source] = self._in_a_row[source] + 1 if place in bad else 0
            if self._in_a_row[source] > self._config.max_consecutive:
                self._remember(num_samples, bad)
                raise BudgetExceeded(self._message(f"{self._in_a_row[source]} bad samples in a row in source {source}"))
        self._remember(num_samples, bad)
        if self._num_bad > self._config.max_bad_fraction * self._config.window_samples:
            raise BudgetExceeded(self._message(f"{self._num_bad} of the last {self._num_samples} samples are bad"))

    def _remember(self, num_samples: int, bad: dict[int, BadRecord]) -> None:
        self._window.append((num_samples, tuple(bad.values())))
        self._num_samples += num_samples
        self._num_bad += len(bad)
        while self._num_samples - self._window[0][0] >= self._config.window_samples:
            old_samples, old_bad = self._window.popleft()
            self._num_samples -= old_samples
            self._num_bad -= len(old_bad)

    def _message(self, what: str) -> str:
        records = [record for _, bad in self._window for record in bad]
        shard, count = Counter(record.shard for record in records).most_common(1)[0]
        worst = [record for record in records if record.shard == shard]
        causes = ", ".join(f"{cause} {n}" for cause, n in Counter(record.cause for record in worst).most_common(3))
        return (
            f"too many bad samples: {what}. Worst shard: {shard} with {count} ({causes}), for example key "
            f"{worst[-1].key!r}: {worst[-1].detail}. Repair or re-index that shard (`isthmus data verify`), or raise "
            f"data.budget (max_bad_fraction {self._config.max_bad_fraction} of {self._config.window_samples} samples, "
            f"max_consecutive {self._config.max_consecutive})"
        )
