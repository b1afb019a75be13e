"""The tables of a caption layer: candidate captions of each sample of a shard, where they come from, and their scores.

A table has one row per sample, in the order of the shard's index. docs/data-format.md is the contract.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from isthmus.data_pipeline.errors import DataError

WEB = "web"
"""Source of the captions that the data set itself holds."""
SCORE_PREFIX = "score_"

_LISTS = {"texts": pa.string(), "sources": pa.string(), "seeds": pa.int64()}


def candidate_table(
    keys: Sequence[str],
    texts: Sequence[Sequence[str]],
    sources: Sequence[Sequence[str]],
    seeds: Sequence[Sequence[int | None]],
) -> pa.Table:
    """Return the table of a shard.

    Args:
        keys: Keys of the samples, in the shard's order.
        texts: Candidates of each sample.
        sources: Source of each candidate: `web`, or the name of the captioner.
        seeds: Seed of each candidate; None where nothing was drawn.

    Raises:
        DataError: a sample has another number of sources or seeds than of texts.
    """
    values = zip(_LISTS.items(), (texts, sources, seeds), strict=True)
    columns = {"key": pa.array(keys, pa.string())}
    columns |= {name: pa.array(lists, pa.list_(kind)) for (name, kind), lists in values}
    table = pa.table(columns)
    check_candidates(table)
    return table


def add_scores(table: pa.Table, scores: Mapping[str, Sequence[Sequence[float | None]]]) -> pa.Table:
    """Return the table with one more column per score.

    Args:
        table: Candidates of a shard.
        scores: By name without `score_`: for each sample a value per candidate; None or NaN if there is none.

    Raises:
        DataError: a sample has another number of values than of candidates, or the score is there already.
    """
    for name, values in scores.items():
        column = f"{SCORE_PREFIX}{name}"
        if column in table.column_names:
            raise DataError(f"the table has a column {column} already; give the new score another name")
        table = table.append_column(column, pa.array(values, pa.list_(pa.float32())))
    check_candidates(table)
    return table


def score_names(table_columns: Sequence[str]) -> list[str]:
    """Return the names of the scores among a table's columns, without `score_`."""
    return [name.removeprefix(SCORE_PREFIX) for name in table_columns if name.startswith(SCORE_PREFIX)]


def check_candidates(table: pa.Table) -> None:
    """Check that every list column has as many values as the sample has candidates.

    Raises:
        DataError: a column is missing, or of other lengths.
    """
    missing = [name for name in ("key", *_LISTS) if name not in table.column_names]
    if missing:
        raise DataError(f"not a table of caption candidates: it has no column {missing[0]}")
    lengths = _lengths(table["texts"])
    if (lengths < 0).any():
        raise DataError(f"sample {table['key'][int(lengths.argmin())].as_py()}: texts is null; write an empty list")
    for name in table.column_names:
        if pa.types.is_list(table.schema.field(name).type) and not np.array_equal(_lengths(table[name]), lengths):
            row = int(np.flatnonzero(_lengths(table[name]) != lengths)[0])
            raise DataError(
                f"sample {table['key'][row].as_py()}: column {name} does not have one value per candidate text"
            )


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int32]:
    return np.asarray(pc.list_value_length(column).fill_null(-1))
