"""The BEIR folder: `corpus.jsonl` (_id, title, text), `queries.jsonl` (_id, text), `qrels/<split>.tsv` (graded).

The corpus becomes a memory-mapped table; of queries and judgements only those of one split are held.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kinvec.contracts import Qrels
from kinvec.files.arrow import ArrowStrings, ArrowTable, cached_table, fingerprint_of
from kinvec.files.problems import BadValue, DataError, Notes
from kinvec.files.records import decoded_lines, jsonl_records, kind_of
from kinvec.files.rows import Row, checked_text, judged_row
from kinvec.files.writing import content_fingerprint, exact_key

DOCUMENTS = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string()), pa.field("line", pa.int64())])


@dataclass(frozen=True)
class Judgements:
    """Judgements of a split, and the line each query is first judged on."""

    grades: Qrels
    lines: dict[tuple[str, str], int]


def is_beir(folder: Path) -> bool:
    """Whether a folder has the two files that make it one; judgements are asked for by split."""
    return (folder / "corpus.jsonl").is_file() and (folder / "queries.jsonl").is_file()


def splits(folder: Path) -> list[str]:
    """The splits that have judgements, in alphabetical order."""
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))


def qrels_path(folder: Path, split: str) -> Path:
    """Where a split's judgements are. Raises `DataError`, naming the splits there are, if they are not there."""
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        have = ", ".join(splits(folder)) or "none"
        raise DataError(
            "split",
            str(path),
            0,
            f"there are no judgements for the split '{split}' (there are: {have})",
            "name one of these",
        )
    return path


def beir_fingerprint(folder: Path, split: str) -> str:
    """Of the corpus, the queries and this split's judgements; other splits are not looked at."""
    parts = (folder / "corpus.jsonl", folder / "queries.jsonl", qrels_path(folder, split))
    return fingerprint_of("beir", *map(content_fingerprint, parts))


def documents(path: Path, notes: Notes) -> ArrowTable:
    """A corpus as a memory-mapped table (id, text, line); the text is title and text joined by one space, stripped.

    An empty document is kept: published evaluations keep it too. What is noted: a row that is no document, and the
    second of an id.
    """
    name = str(path)

    def produce(notes: Notes) -> Iterator[Row]:
        keys, lines = array("q"), array("q")  # 16 bytes a document, to find ids given twice
        for line, record in jsonl_records(path, name, notes):
            try:
                row = identity(record), document_text(record), line
            except BadValue as bad:
                notes.bad(DataError(bad.rule, name, line, bad.message, bad.remedy))
                continue
            keys.append(exact_key(row[0]))
            lines.append(line)
            yield row
        for line in _repeated(keys, lines):
            notes.bad(
                DataError("id", name, line, "the '_id' of this document was given to one before", "give each its own")
            )

    return cached_table(fingerprint_of("documents", content_fingerprint(path)), DOCUMENTS, produce, notes, name)


def _repeated(keys: array[int], lines: array[int]) -> list[int]:
    """The lines of keys that were there before."""
    if not keys:
        return []
    _, first = np.unique(np.frombuffer(keys, dtype=np.int64), return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return [int(line) for line in np.frombuffer(lines, dtype=np.int64)[again]]


def identity(record: dict[str, Any]) -> str:
    """The `_id` of a query or document; a `BadValue` if it is missing or no text."""
    value = record.get("_id")
    if not isinstance(value, str) or not value:
        what = "missing" if "_id" not in record else "empty" if value == "" else kind_of(value)
        raise BadValue("id", f"'_id' is {what}; ids are texts", 'store ids as texts, as in "1"')
    return checked_text(value, "_id", may_be_empty=True)


def document_text(record: dict[str, Any]) -> str:
    """Title and text as published evaluations join them."""
    title = record.get("title") or ""
    text = checked_text(record.get("text"), "text", may_be_empty=True)
    return f"{checked_text(title, 'title', may_be_empty=True)} {text}".strip()


def read_qrels(path: Path, name: str, notes: Notes) -> Judgements:
    """Judgements from `query-id, corpus-id, score` (tabs, header optional) or TREC's four columns."""
    grades: Qrels = {}
    lines: dict[tuple[str, str], int] = {}
    for line, text in decoded_lines(path, name, notes):
        cells = text.split("\t") if "\t" in text else text.split()
        cells = [cell.strip() for cell in cells]
        if not any(cells) or (line == 1 and len(cells) >= 3 and not _is_grade(cells[-1])):
            continue
        if len(cells) not in (3, 4) or not _is_grade(cells[-1]):
            notes.bad(
                DataError(
                    "schema", name, line, "a judgement is: query id, document id, whole-number score, tabs between"
                )
            )
            continue
        query, document, grade = cells[0], cells[-2], int(float(cells[-1]))
        if grades.setdefault(query, {}).setdefault(document, grade) != grade:
            notes.bad(DataError("conflict", name, line, f"document '{document}' has two scores for query '{query}'"))
        lines.setdefault((query, document), line)
    if not grades and not notes.counts:
        raise DataError("empty", name, 0, "there is no judgement in the file", "give it at least one row")
    return Judgements(grades, lines)


def _is_grade(cell: str) -> bool:
    try:
        return float(cell).is_integer()
    except ValueError:
        return False


def judged_queries(path: Path, name: str, wanted: Qrels, notes: Notes) -> dict[str, str]:
    """The text of every judged query, in the order of the judgements."""
    found: dict[str, str] = {}
    for line, record in jsonl_records(path, name, notes):
        try:
            if identity(record) in wanted:
                found[record["_id"]] = checked_text(record.get("text"), "text")
        except BadValue as bad:
            notes.bad(DataError(bad.rule, name, line, bad.message, bad.remedy))
    return {query: found[query] for query in wanted if query in found}


def query_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line and id of every query of a file; what is no query is passed over."""
    for line, record in jsonl_records(path, str(path), Notes(strict=False)):
        if isinstance(record.get("_id"), str):
            yield line, record["_id"]


def training_rows(folder: Path, split: str, notes: Notes) -> Iterator[Row]:
    """A row for each query of the split with a positive: retrieval columns, file number 0 (the judgements), line."""
    path = qrels_path(folder, split)
    judgements = read_qrels(path, str(path), notes)
    queries = judged_queries(folder / "queries.jsonl", str(folder / "queries.jsonl"), judgements.grades, notes)
    corpus = documents(folder / "corpus.jsonl", notes)
    place = _places(corpus, {document for judged in judgements.grades.values() for document in judged})
    without = 0
    for query, judged in judgements.grades.items():
        line = judgements.lines[query, next(iter(judged))]
        if query not in queries:
            notes.bad(
                DataError(
                    "missing",
                    str(path),
                    line,
                    f"query '{query}' is not in queries.jsonl",
                    "add it, or drop the judgement",
                )
            )
            continue
        triples = []
        for document, grade in judged.items():
            text = corpus.value("text", place[document]) if document in place else None
            if not text:
                what = "is not in corpus.jsonl" if text is None else "is empty in corpus.jsonl"
                at = judgements.lines[query, document]
                notes.bad(
                    DataError(
                        "missing", str(path), at, f"document '{document}' {what}", "add it, or drop the judgement"
                    )
                )
                continue
            triples.append((document, text, float(grade)))
        positives = [triple for triple in triples if triple[2] > 0]
        if positives:
            yield *judged_row(query, queries[query], positives, [t for t in triples if t[2] <= 0]), 0, line
        else:
            without += 1
    if without:
        message = f"{without:,} judged queries have no relevant document and are left out of training"
        notes.remarks.append(DataError("no positive", str(path), 0, message, "judge a document relevant, or drop them"))


def text_rows(corpus: Path, notes: Notes) -> Iterator[Row]:
    """The texts of a corpus for training without queries: text, file number 0, line; empty documents are left out."""
    for batch in documents(corpus, notes).batches():
        for _, text, line in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if text:
                yield text, 0, line


def _places(corpus: ArrowTable, wanted: set[str]) -> dict[str, int]:
    """The row of each wanted document; one pass over the ids, memory for the wanted ones only."""
    return {identity: row for row, identity in enumerate(ArrowStrings(corpus, "id")) if identity in wanted}
