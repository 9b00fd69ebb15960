"""Queries in slices: by their length, by the source of their relevant documents, by a column of a user's file.

What differs between slices was not asked beforehand and is looked for in many places: it is a hint, not evidence, and
its p-values are corrected for the number of slices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinvec.contracts import KinvecError, RecipeError
from kinvec.files.forms import form_of, records_of
from kinvec.files.problems import Notes
from kinvec.tasks.comparison import Difference
from kinvec.tasks.statistics import Rows

IDS = ("query_id", "query-id", "id", "_id", "doc_id", "corpus-id")  # columns that say whose values a row holds
FEWEST = 10  # queries of a slice; those of smaller ones are together in OTHER
MOST_VALUES = 12  # a column of more numbers than these is cut into thirds
OTHER, NONE = "other", "(none)"

Columns = Mapping[str, Mapping[str, str]]
"""Column → id of a query or a document → value."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The difference B − A on some of the queries. `holm` is its p-value, corrected for all slices shown beside it."""

    by: str
    slice: str
    a: str
    b: str
    queries: int
    difference: Difference
    holm: float


def read_columns(path: str | Path) -> Columns:
    """A user's file (CSV, JSON lines, Parquet) by column; each row holds values of one query or one document.

    Raises `KinvecError` where there is no such file, where it does not read, or where no column is named as an id.
    """
    path = Path(path)
    if not path.is_file():
        raise KinvecError(f"{path}: there is no such file; give one with an id column and columns to slice by")
    notes = Notes()
    columns: dict[str, dict[str, str]] = {}
    for _, record in records_of(path, str(path), form_of(path, str(path), IDS), notes):
        own = next((name for name in IDS if name in record), None)
        if own is None:
            raise KinvecError(f"{path}: no column says whose row it is; name one {', '.join(IDS[:-1])} or {IDS[-1]}")
        for name, value in record.items():
            if name != own and value not in (None, ""):
                columns.setdefault(name, {})[str(record[own])] = str(value)
    return columns


def slices_of(by: str, rows: Rows, columns: Columns) -> dict[str, list[int]]:
    """The places of the rows of each slice, largest first, or in order where they are sizes.

    `by` is a column of the file, of queries or of documents (then it is that of a query's relevant documents); `length`
    in words; `source`, the letters that the ids of the relevant documents begin with; or a column of the result, such
    as `label`. Raises `RecipeError` where it is none of these, `KinvecError` where it says nothing of these queries.
    """
    if by in columns:
        values = _joined(by, rows, columns[by])
    elif by == "length":
        texts = ("query", "second") if "second" in rows else ("query",)
        sizes = [float(sum(len(str(rows[name][i]).split()) for name in texts)) for i in range(len(rows["id"]))]
        return _thirds(sizes, " words")
    elif by == "source" and "judged_ids" in rows:
        values = _prefixes(rows)
    elif by in rows and all(isinstance(value, str) for value in rows[by]):
        values = list(rows[by])
    else:
        own = [name for name in rows if name not in ("id", "query") and isinstance(next(iter(rows[name])), str)]
        known = [*columns, "length", *(["source"] if "judged_ids" in rows else []), *own]
        raise RecipeError(
            f"there are no slices by '{by}': there are {', '.join(known)}; --slices FILE adds its columns"
        )
    numbers = _numbers(values)
    return _thirds(numbers) if numbers else _by_value(values)


def _joined(by: str, rows: Rows, column: Mapping[str, str]) -> list[str]:
    """Each query's own value, or that of its relevant documents."""
    ids = [str(own) for own in rows["id"]]
    if any(own in column for own in ids):
        return [column.get(own, NONE) for own in ids]
    values = [_together(column[d] for d in found if d in column) for found in _relevant(rows)]
    if all(value == NONE for value in values):
        raise KinvecError(
            f"the file of slices has no row of these queries, nor of their relevant documents (column '{by}'); its ids "
            f"are such as '{next(iter(column))}', the queries' such as '{ids[0]}'"
        )
    return values


def _prefixes(rows: Rows) -> list[str]:
    found = [_together(m[0] for d in judged if (m := re.match(r"[^\W\d]+", d))) for judged in _relevant(rows)]
    if all(value == NONE for value in found):
        raise KinvecError(
            "slices by source: the ids of the relevant documents begin with no letters that tell a source; give "
            "--slices FILE with the columns id (of documents) and source, such as the corpus.jsonl"
        )
    return found


def _relevant(rows: Rows) -> list[list[str]]:
    if "judged_ids" not in rows:
        return [[] for _ in rows["id"]]
    pairs = zip(rows["judged_ids"], rows["judged_scores"], strict=True)
    return [[d for d, grade in zip(ids, grades, strict=True) if grade > 0] for ids, grades in pairs]


def _together(values: Any) -> str:
    return " + ".join(sorted(set(values))) or NONE


def _numbers(values: Sequence[str]) -> list[float]:
    """The values as numbers, or nothing: where one is none, or they are few enough to be named."""
    try:
        return [float(value) for value in values] if len(set(values)) > MOST_VALUES else []
    except ValueError:
        return []


def _thirds(sizes: Sequence[float], unit: str = "") -> dict[str, list[int]]:
    """Three slices of about as many rows each, in order; equal sizes stay together."""
    values = np.asarray(sizes, np.float64)
    third = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
    found = {}
    for number in np.unique(third):
        low, high = values[third == number].min(), values[third == number].max()
        name = f"{high:g}" if low == high else f"{low:g} to {high:g}"
        found[name + (unit if high > 1 else unit.removesuffix("s"))] = np.flatnonzero(third == number).tolist()
    return found


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    counts = Counter(values)
    small = {value for value, count in counts.items() if count < FEWEST}
    small = small if len(small) > 1 else set()
    found: dict[str, list[int]] = {value: [] for value, _ in counts.most_common() if value not in small}
    for place, value in enumerate(values):
        found.setdefault(OTHER if value in small else value, []).append(place)
    return found
