"""`open_data`: any training data, as it comes, as one memory-mapped table."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from kinvec.contracts import Example, KinvecError
from kinvec.files import beir
from kinvec.files.arrow import ArrowTable, cached_table, fingerprint_of
from kinvec.files.layouts import Layout, layout_of, records_of
from kinvec.files.problems import BadValue, DataError, Notes
from kinvec.files.rows import ROWS, SCHEMAS, Row, parsed_cell
from kinvec.files.writing import content_fingerprint


@dataclass(frozen=True)
class Table:
    """Training data of one kind, memory-mapped; `files` are what the column `file` counts, `line` is where a row begins.

    `dropped` rows were bad (with `skip_bad`); `problems` are the first of them, `counts` all of them by rule.
    """

    kind: str
    arrow: ArrowTable
    fingerprint: str
    source: str
    files: tuple[str, ...]
    dropped: int = 0
    warnings: tuple[str, ...] = ()
    problems: tuple[DataError, ...] = ()
    counts: Mapping[str, int] | None = None

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
        get = {name: self.arrow.value(name, i) for name in SCHEMAS["retrieval"].names[:-2]}
        lists = [tuple(get[f"{side}_{part}"]) for side in ("pos", "neg") for part in ("doc", "id", "score")]
        return Example(get["query_id"], get["query"], *lists)

    def where(self, i: int) -> str:
        """The place of row `i`, as `file.jsonl:27`."""
        return f"{self.files[self.arrow.value('file', i)]}:{self.arrow.value('line', i)}"


def open_data(
    source: str | Path, *, split: str = "train", kind: str | None = None,
    columns: Mapping[str, Any] | None = None, skip_bad: bool = False,
) -> Table:  # fmt: skip
    """Open training data of any known form (see the module of each) as a memory-mapped table.

    `kind` and `columns` override what is detected. Raises `DataError` (a `KinvecError`) for the first bad row, naming file,
    line and remedy; with `skip_bad` bad rows are dropped and counted. Raises `KinvecError` if the source is not there.
    """
    source = str(source)
    path = existing(source)
    if path.is_dir() and beir.is_beir(path):
        key = fingerprint_of(beir.beir_fingerprint(path, split), "retrieval")
        files = (str(path / "qrels" / f"{split}.tsv"),)
        found = "retrieval"

        def produce(notes: Notes) -> Iterator[Row]:
            return beir.training_rows(path, split, notes)
    else:
        layout = layout_of(path, source, kind, columns)
        key = fingerprint_of(content_fingerprint(path), vars(layout))
        files, found = (source,), layout.kind

        def produce(notes: Notes) -> Iterator[Row]:
            return file_rows(path, source, layout, notes)

    table, notes = cached_table(key, SCHEMAS[found], produce, strict=not skip_bad, root=source)
    if not len(table):
        raise notes.kept[0] if notes.kept else DataError("empty", source, 0, "there is no row in it", "give it at least one")
    dropped = sum(notes.counts.values())
    return Table(found, table, key, source, files, dropped, tuple(notes.warnings), tuple(notes.kept), dict(notes.counts))


def detect_kind(source: str | Path) -> str:
    """`retrieval`, `labelled`, `texts` or `pairs`, by content."""
    path = existing(str(source))
    return "retrieval" if path.is_dir() and beir.is_beir(path) else layout_of(path, str(source), None, None).kind


def existing(source: str) -> Path:
    """The path, if there is something; else a `KinvecError` that names what is near."""
    path = Path(source).expanduser()
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise KinvecError(f"{source}: there is no such file or folder; {hint}")
    return path


def file_rows(path: Path, name: str, layout: Layout, notes: Notes, number: int = 0) -> Iterator[Row]:
    """The rows of one file, each ending in the file's number and the line."""
    build = ROWS[layout.kind]
    for line, record in records_of(path, name, layout, notes):
        if layout.form == "delimited" and layout.kind == "retrieval":
            record = {key: parsed_cell(cell) for key, cell in record.items()}
        try:
            yield *build(record, layout.columns), number, line
        except BadValue as bad:
            notes.bad(DataError(bad.rule, name, line, bad.message, bad.remedy))
