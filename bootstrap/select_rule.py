"""Which candidate captions of a sample are kept: a rule over their scores, without any model."""

import math
from fractions import Fraction
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from isthmus.data_pipeline.config import Config
from isthmus.data_pipeline.layers.candidates import SCORE_PREFIX, WEB
from isthmus.data_pipeline.layers.layered_manifest import Choice

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
_SHARE_STEPS = 20


class Bounds(Config):
    """Values that a score may have, both ends included."""

    min: float = -math.inf
    """Smallest value."""
    max: float = math.inf
    """Largest value."""


class SelectRule(Config):
    """How candidates are chosen. One without a finite value of a score that the rule reads is never kept."""

    method: Literal["match", "top", "web_or_best"]
    """match: all with at least min_score (BLIP, Li et al., 2022, section 3.3). top: the `keep` best (BLIP-2, Li et al.,
    2023, section 4.1). web_or_best: the data set's own with at least min_score, otherwise the best generated one
    (Nguyen et al., 2023)."""
    score: str = "itm"
    """Name of the score by which candidates are compared."""
    min_score: float | None = None
    """Least score; for web_or_best that of the data set's own captions. `top` needs none."""
    keep: int = Field(2, gt=0)
    """Captions per image that `top` keeps."""
    bounds: dict[str, Bounds] = Field({})
    """Further conditions on every candidate, by score, such as `length: {min: 3}` or `repetition: {max: 0.3}`."""
    web_share: float | None = Field(None, gt=0, lt=1)
    """Probability that a caption of the data set is drawn where it and generated ones are kept, in steps of 0.05; none:
    every kept caption is drawn alike."""

    def describe(self) -> dict[str, Any]:
        """Return what decides, defaults included, as JSON values."""
        bounds = {name: one.model_dump(exclude_defaults=True) for name, one in self.bounds.items()}
        unused = set() if self.method == "top" else {"keep"}
        return self.model_dump(exclude_none=True, exclude={"bounds", *unused}) | ({"bounds": bounds} if bounds else {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_score is None and self.method != "top":
            raise ValueError(f"select: method {self.method} needs min_score; set it, or use method: top")
        if (
            self.web_share is not None
            and abs(self.web_share * _SHARE_STEPS - round(self.web_share * _SHARE_STEPS)) > 1e-9
        ):
            raise ValueError(f"select: web_share {self.web_share} is not a multiple of 0.05; round it")
        return self

    @property
    def least(self) -> float:
        """Least score, -inf without one."""
        return -math.inf if self.min_score is None else self.min_score

    @property
    def scores(self) -> list[str]:
        """Names of the scores that the rule reads."""
        return list(dict.fromkeys([self.score, *self.bounds]))


class _Candidates(NamedTuple):
    """The candidates of a shard, sample after sample."""

    row_of: IntArray
    """Number of the sample."""
    is_web: BoolArray
    score: FloatArray
    is_eligible: BoolArray


def choose(rule: SelectRule, candidates: pa.Table, is_out: BoolArray) -> Choice:
    """Apply a rule to the candidates of a shard.

    Args:
        rule: The rule.
        candidates: Columns sources and those of the rule's scores.
        is_out: Samples to exclude, regardless of their scores.
    """
    sources = candidates["sources"].combine_chunks()
    counts = np.asarray(sources.value_lengths(), dtype=np.int64)
    row_of = np.repeat(np.arange(len(counts)), counts)
    is_web = np.asarray(pc.equal(sources.flatten(), WEB))
    score = _score(candidates, rule.score)
    is_eligible = np.isfinite(score) & ~is_out[row_of]
    for name, bounds in rule.bounds.items():
        values = _score(candidates, name)
        is_eligible &= (values >= bounds.min) & (values <= bounds.max)  # False for NaN
    kept = np.flatnonzero(_METHODS[rule.method](rule, _Candidates(row_of, is_web, score, is_eligible)))
    firsts = np.cumsum(counts) - counts
    return Choice(
        counts=np.bincount(row_of[kept], minlength=len(counts)),
        places=kept - firsts[row_of[kept]],
        draws=_draws(rule.web_share, is_web[kept], row_of[kept], len(counts)),
    )


def _match(rule: SelectRule, of: _Candidates) -> BoolArray:
    return of.is_eligible & (of.score >= rule.least)


def _top(rule: SelectRule, of: _Candidates) -> BoolArray:
    return _best(rule.keep, of, _match(rule, of))


def _web_or_best(rule: SelectRule, of: _Candidates) -> BoolArray:
    web = _match(rule, of) & of.is_web
    has_web = np.isin(of.row_of, of.row_of[web])
    return web | _best(1, of, of.is_eligible & ~of.is_web & ~has_web)


_METHODS = {"match": _match, "top": _top, "web_or_best": _web_or_best}


def _best(count: int, of: _Candidates, is_eligible: BoolArray) -> BoolArray:
    """Return which are the `count` best of their sample; of equal ones the first."""
    places = np.flatnonzero(is_eligible)
    places = places[np.lexsort((-of.score[places], of.row_of[places]))]  # stable
    rows = of.row_of[places]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    is_best = np.zeros(len(of.score), dtype=np.bool_)
    is_best[places[rank < count]] = True
    return is_best


def _draws(web_share: float | None, is_web: BoolArray, row_of: IntArray, num_rows: int) -> NDArray[np.uint16]:
    """Return whole weights by which the captions of the data set are drawn with probability `web_share`."""
    if web_share is None:
        return np.ones(len(row_of), dtype=np.uint16)
    num_web = np.bincount(row_of[is_web], minlength=num_rows)[row_of]
    num_other = np.bincount(row_of[~is_web], minlength=num_rows)[row_of]
    share = Fraction(web_share).limit_denominator(_SHARE_STEPS)
    web, other = share.numerator * num_other, (share.denominator - share.numerator) * num_web
    weights = np.where(is_web, web, other) // np.maximum(np.gcd(web, other), 1)
    return np.where((num_web > 0) & (num_other > 0), weights, 1).astype(np.uint16)


def _score(table: pa.Table, name: str) -> FloatArray:
    values = table[f"{SCORE_PREFIX}{name}"].combine_chunks().flatten().cast(pa.float64())
    return np.asarray(values.fill_null(np.nan))
