"""`open_data`: any training data, as it comes, as one memory-mapped table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from kinvec.contracts import Example
from kinvec.files import beir
from kinvec.files.arrow import ArrowTable, cached_table
from kinvec.files.problems import DataError, Notes
from kinvec.files.rows import SCHEMAS
from kinvec.files.sources import plan_of


def evenly(count: int, most: int) -> Int64[np.ndarray, " c"]:
    """Of `count` rows at most so many, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


@dataclass(frozen=True)
class Table:
    """Training data of one kind, memory-mapped. The column `file` counts `files`; `line` is where a row begins in it.

    `dropped` rows were bad (with `skip_bad`); `problems` are the first of them, `counts` all of them by rule. `remarks`
    say what was left out by rule.
    """

    kind: str
    arrow: ArrowTable
    fingerprint: str
    source: str
    files: tuple[str, ...]
    dropped: int = 0
    remarks: tuple[DataError, ...] = ()
    problems: tuple[DataError, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The remarks as sentences."""
        return tuple(map(str, self.remarks))

    @cached_property
    def rows(self) -> pa.Table:
        """All rows as a memory-mapped `pa.Table`."""
        return self.arrow.rows

    def __len__(self) -> int:
        return len(self.arrow)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Every record batch in order, in one batch's memory; the way to pass over all rows."""
        return self.arrow.batches(columns)

    def example(self, i: int) -> Example:
        """Row `i` of retrieval data."""
        assert self.kind == "retrieval", f"{self.source} holds {self.kind}, not retrieval examples"
        get = self.arrow.row(i)
        lists = [tuple(get[f"{side}_{part}"]) for side in ("pos", "neg") for part in ("doc", "id", "score")]
        return Example(get["query_id"], get["query"], *lists)

    def where(self, i: int) -> str:
        """The place of row `i`, as `file.jsonl:27`."""
        return f"{self.files[self.arrow.value('file', i)]}:{self.arrow.value('line', i)}"


def open_data(
    source: str | Path, *, split: str = "train", kind: str | None = None,
    columns: Mapping[str, Any] | None = None, skip_bad: bool = False,
) -> Table:  # fmt: skip
    """Open training data of any form as a memory-mapped table: a file, a folder, or the name of a hub data set.

    `split` picks a folder's or data set's part; `kind` (retrieval, pairs, labelled, texts) and `columns` (role →
    column, several joined by '+') override what is detected. Raises `DataError`, a `KinvecError`, for the first bad
    row, naming file, line and remedy; with `skip_bad` such rows are dropped and counted. Raises `KinvecError` if there
    is no source of that name.
    """
    source = str(source)
    notes = Notes(strict=not skip_bad)
    plan = plan_of(source, split, kind, columns)
    table = cached_table(plan.key, SCHEMAS[plan.kind], plan.produce, notes, str(Path(source).expanduser()))
    if not len(table):
        raise (
            notes.kept[0]
            if notes.kept
            else DataError("empty", source, 0, "there is no row in it", "give it at least one")
        )
    counts = dict(notes.counts)
    return Table(
        plan.kind,
        table,
        plan.key,
        source,
        plan.files,
        sum(counts.values()),
        tuple(notes.remarks),
        tuple(notes.kept),
        counts,
    )


def detect_kind(source: str | Path, *, split: str = "train", columns: Mapping[str, Any] | None = None) -> str:
    """`retrieval`, `pairs`, `labelled` or `texts`, by content."""
    folder = Path(source).expanduser()
    return "retrieval" if beir.is_beir(folder) else plan_of(str(source), split, None, columns).kind
