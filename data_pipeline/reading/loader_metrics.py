"""Counters of a loader and its readers."""

from collections import Counter, deque

import numpy as np

from isthmus.data_pipeline.reading.batch import LanePart


class LoaderMetrics:
    """Totals of a loader and of all its readers, as plain numbers."""

    def __init__(self) -> None:
        self.wait_seconds = 0.0
        self._samples = 0
        self._bad: Counter[str] = Counter()
        self._by_reader: dict[str, dict[str, float]] = {}
        self._get_seconds: deque[float] = deque(maxlen=1000)

    def add(self, part: LanePart) -> None:
        """Add what a part says about itself and its reader."""
        self._samples += len(part.valid)
        self._bad.update(record.cause for record in part.bad)
        self._by_reader[part.reader] = part.counters
        self._get_seconds.extend(part.get_seconds)

    def numbers(self) -> dict[str, float]:
        """Return all of it under flat names."""
        totals: Counter[str] = Counter()
        for counters in self._by_reader.values():
            totals.update(counters)
        numbers: dict[str, float] = {
            "wait_seconds": self.wait_seconds,
            "samples": self._samples,
            "bad_samples": sum(self._bad.values()),
        }
        numbers |= {f"bad_samples/{cause}": count for cause, count in self._bad.items()} | dict(totals)
        if self._get_seconds:
            p50, p99 = np.percentile(self._get_seconds, [50, 99])
            numbers |= {"get_seconds/p50": float(p50), "get_seconds/p99": float(p99)}
        return numbers
