"""What is wrong with training data, before a model sees it: exact rules → findings, each with file, line and remedy.

A pass over the data keeps 64-bit keys of texts and ids in NumPy arrays, never the texts: about 100 bytes a row. What is
a matter of degree (near duplicates, odd lengths and languages) is in `kinvec.doctor`.
Shapes: n = rows, p = entries of a column of all rows (a list column has several a row).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64, UInt64

from kinvec.contracts import PairData, Problem, RetrievalData
from kinvec.files import (
    ArrowStrings,
    DataError,
    Table,
    beir,
    detect_kind,
    evenly,
    exact_key,
    open_data,
    open_retrieval,
    text_key,
    text_keys,
)
from kinvec.files.problems import Notes

PLACES = 5  # lines named for one finding; all are counted
WRITE = "kinvec check … --write FILE"  # of a remedy: the data without such rows
QUOTED = 240  # characters of a text shown
SAMPLED_ROWS = 5000  # rows whose tokens are counted, at most, spread evenly over the data
MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd constant: multiplication by it is one-to-one on 64 bits

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something found: an `error` makes training or its evaluation wrong, a `warning` may, a `note` is good to know.

    `share` is that of `count` in what was looked at. An example has a `note` and its `texts`, each with file and line.
    `drop` are the rows of the table without which it would be gone, where leaving them out is a remedy.
    """

    severity: Severity
    rule: str
    file: str
    line: int
    message: str
    remedy: str
    count: int = 1
    share: float | None = None
    examples: Sequence[Mapping[str, Any]] = ()
    drop: Int64[np.ndarray, " r"] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As plain values, without the rows."""
        return {name: value for name, value in vars(self).items() if name != "drop"}


@dataclass(frozen=True)
class TokenLimit:
    """How a model counts a text's tokens, special ones included, and where it cuts.

    `prompts` (`query`, `document`) are put in front of texts, as the model does it.
    """

    count: Callable[[list[str]], Sequence[int]]
    max_length: int
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Keys:
    """The keys of a table's columns, entries of all rows end to end; `counts` says how many entries each row has.

    Texts have the key of the normalised text, ids and labels that of the exact one. `lengths` are those of the texts in
    characters. `numbers` are the rows' own in the table, of which these may be some.
    """

    of: dict[str, Int64[np.ndarray, " p"]]
    counts: dict[str, Int64[np.ndarray, " n"]]
    lengths: dict[str, Int32[np.ndarray, " p"]]
    numbers: Int64[np.ndarray, " n"]
    files: Int64[np.ndarray, " n"]
    lines: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, column: str) -> Int64[np.ndarray, " p"]:
        """The row that each entry of a column stands in."""
        return np.repeat(np.arange(len(self)), self.counts[column])

    def row_sums(self, column: str) -> UInt64[np.ndarray, " n"]:
        """One key a row for all its entries of a column in any order: their sum, modulo 2**64."""
        ends = np.concatenate([[0], np.cumsum(self.counts[column])])
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.of[column].view(np.uint64))])
        return sums[ends[1:]] - sums[ends[:-1]]


EXACT = ("query_id", "pos_id", "neg_id", "label")
NUMBERS = ("pos_score", "neg_score", "score", "file", "line")


def keys_of(table: Table, rows: Int64[np.ndarray, " n"] | None = None) -> Keys:
    """The keys of a table's texts, ids and labels, of all rows or of some in their order.

    One pass, in the memory of one record batch and of the keys.
    """
    names = [name for name in table.arrow.schema.names if name not in NUMBERS]
    keys: dict[str, list[np.ndarray]] = defaultdict(list)
    counts: dict[str, list[np.ndarray]] = defaultdict(list)
    lengths: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch in chosen_batches(table, [*names, "file", "line"], rows):
        for name in names:
            entries, each = entries_of(batch.column(name))
            key = exact_key if name in EXACT else text_key
            keys[name].append(np.fromiter(map(key, entries), np.int64, len(entries)))
            counts[name].append(each)
            if name not in EXACT:
                lengths[name].append(np.fromiter(map(len, entries), np.int32, len(entries)))
        for name in ("file", "line"):
            keys[name].append(batch.column(name).to_numpy().astype(np.int64))
    of, widths, characters = (
        {name: np.concatenate(parts) for name, parts in found.items()} for found in (keys, counts, lengths)
    )
    files, lines = of.pop("file"), of.pop("line")
    return Keys(of, widths, characters, np.arange(len(table)) if rows is None else rows, files, lines)


def chosen_batches(
    table: Table, columns: Sequence[str], rows: Int64[np.ndarray, " n"] | None
) -> Iterator[pa.RecordBatch]:
    """The record batches of a table, or what some rows, in their order, leave of them."""
    start = 0
    for batch in table.batches(columns):
        if rows is None:
            yield batch
        else:
            first, last = np.searchsorted(rows, [start, start + batch.num_rows])
            yield batch.take(pa.array(rows[first:last] - start))
        start += batch.num_rows


def entries_of(column: pa.Array) -> tuple[list[str], Int64[np.ndarray, " n"]]:
    """The entries of a column end to end, and how many each row has."""
    if pa.types.is_list(column.type):
        return column.flatten().to_pylist(), pc.list_value_length(column).to_numpy().astype(np.int64)
    return column.to_pylist(), np.ones(len(column), np.int64)


def unreadable(table: Table, skip_bad: bool = False) -> Iterator[Finding]:
    """The rows that could not be read: the first of each rule with its place, the others counted."""
    severity: Severity = "warning" if skip_bad else "error"
    for error in table.problems:
        yield as_finding(severity, error)
    for rule, count in table.counts.items():
        more = count - sum(error.rule == rule for error in table.problems)
        if more > 0:
            yield Finding(
                severity, rule, table.source, 0, f"{more:,} more rows with a problem of this rule", "as above", more
            )
    for remark in table.remarks:
        yield as_finding("warning", remark)


def as_finding(severity: Severity, error: DataError) -> Finding:
    """What a reader said, as a finding."""
    return Finding(severity, error.rule, error.file, error.line, error.message, error.remedy)


def row_findings(table: Table, keys: Keys) -> list[Finding]:
    """All rules that look at the rows alone."""
    return [finding for rule in RULES[table.kind] for finding in rule(table, keys)]


def _at(
    severity: Severity, rule: str, table: Table, keys: Keys, rows: np.ndarray, what: str, remedy: str
) -> Iterator[Finding]:
    """One finding for all these rows, placed at the first of them; nothing if there are none.

    They are to be dropped if the remedy says so.
    """
    rows = np.unique(rows)
    if len(rows):
        lines = ", ".join(str(keys.lines[row]) for row in rows[:PLACES]) + (", …" if len(rows) > PLACES else "")
        places = f" (lines {lines})" if len(rows) > 1 else ""
        shown = [{"note": "", "texts": [_shown(table, keys, row)]} for row in rows[:PLACES].tolist()]
        file, line = table.files[keys.files[rows[0]]], int(keys.lines[rows[0]])
        share, drop = round(len(rows) / len(keys), 4), keys.numbers[rows] if WRITE in remedy else None
        yield Finding(severity, rule, file, line, f"{what}{places}", remedy, len(rows), share, shown, drop)


def _shown(table: Table, keys: Keys, row: int) -> dict[str, Any]:
    column = next(name for name in ("query", "text", "first") if name in keys.of)
    return quoted(table, keys, row, str(table.arrow.value(column, int(keys.numbers[row]))))


def quoted(table: Table, keys: Keys, row: int, text: str) -> dict[str, Any]:
    """A text of an example, with its place."""
    return {"text": shortened(text), "file": table.files[keys.files[row]], "line": int(keys.lines[row])}


def shortened(text: str) -> str:
    """What of a text a person reads in an example."""
    return text if len(text) <= QUOTED else text[: QUOTED - 1] + "…"


def duplicates(table: Table, keys: Keys) -> Iterator[Finding]:
    """Rows whose texts (and label) are those of an earlier row; upper case and white space do not count."""
    what, remedy = "rows that repeat an earlier one", f"they count double; without them: {WRITE}"
    yield from _at("warning", "duplicate", table, keys, repeated(keys), what, remedy)


def repeated(keys: Keys) -> Int64[np.ndarray, " r"]:
    """The rows all of whose texts (and label) stand in an earlier one."""
    whole = np.zeros(len(keys), np.uint64)
    for name in (name for name in keys.of if not name.endswith("_id")):
        whole = whole * MIX + keys.row_sums(name)
    again = np.ones(len(keys), dtype=bool)
    again[np.unique(whole, return_index=True)[1]] = False
    return np.flatnonzero(again)


def judged_both_ways(table: Table, keys: Keys) -> Iterator[Finding]:
    """The same document as positive and as negative of the same query, in one row or in two."""
    positive, negative = (_judged(keys, column) for column in ("pos_doc", "neg_doc"))
    rows = keys.rows("neg_doc")[np.isin(negative, positive)]
    what = "rows with a negative that is judged positive for the same query"
    remedy = f"correct the judgement, or leave such rows out: {WRITE}"
    yield from _at("error", "contradiction", table, keys, rows, what, remedy)


def _judged(keys: Keys, column: str) -> UInt64[np.ndarray, " p"]:
    """A key of each (query, document) pair."""
    queries = keys.of["query"].view(np.uint64)[keys.rows(column)]
    return queries * MIX + keys.of[column].view(np.uint64)


def ambiguous_ids(table: Table, keys: Keys) -> Iterator[Finding]:
    """One id that stands for two texts: known positives could no longer be told from negatives."""
    sides = {"query id": (("query_id", "query"),), "document id": (("pos_id", "pos_doc"), ("neg_id", "neg_doc"))}
    for name, pairs in sides.items():
        ids = np.concatenate([keys.of[i] for i, _ in pairs])
        texts = np.concatenate([keys.of[text] for _, text in pairs])
        rows = np.concatenate([keys.rows(i) for i, _ in pairs])
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero((np.diff(ids[order]) == 0) & (np.diff(texts[order]) != 0)) + 1
        what = f"rows with a {name} that stands for another text elsewhere"
        yield from _at("error", "id", table, keys, rows[order[again]], what, "give each text its own id, or none")


def own_text(table: Table, keys: Keys) -> Iterator[Finding]:
    """A positive that is the query itself."""
    rows = keys.rows("pos_doc")
    same = keys.of["query"][rows] == keys.of["pos_doc"]
    what = "rows that have the query itself as a positive"
    yield from _at("warning", "own text", table, keys, rows[same], what, f"they teach nothing; without them: {WRITE}")


def several_labels(table: Table, keys: Keys) -> Iterator[Finding]:
    """The same text under two labels."""
    order = np.lexsort((keys.of["label"], keys.of["text"]))
    text, label = keys.of["text"][order], keys.of["label"][order]
    rows = order[np.flatnonzero((np.diff(text) == 0) & (np.diff(label) != 0)) + 1]
    what = "rows with a text that stands under another label too"
    yield from _at("warning", "contradiction", table, keys, rows, what, "decide for one label")


RULES: dict[str, tuple[Callable[[Table, Keys], Iterator[Finding]], ...]] = {
    "retrieval": (duplicates, judged_both_ways, ambiguous_ids, own_text),
    "labelled": (duplicates, several_labels),
    "pairs": (duplicates,),
    "texts": (duplicates,),
}


@dataclass(frozen=True)
class Evaluation:
    """What a model is judged by. `asked` are the queries or texts, of pairs the first and the second ones.

    `same_corpus` says that training searches the same `documents`, where a shared one is no news.
    """

    name: str
    asked: Sequence[Sequence[str]]
    documents: Sequence[str] = ()
    same_corpus: bool = False


def open_evaluation(source: str | Path, *, same_corpus: bool = False) -> Evaluation:
    """The test split of a source. Raises `KinvecError` if it cannot be read."""
    kind = detect_kind(source, split="test")
    if kind == "retrieval":
        return evaluation_of(open_retrieval(source, split="test"), str(source), same_corpus=same_corpus)
    table = open_data(source, split="test", skip_bad=True)
    columns = ("first", "second") if kind == "pairs" else ("text",)
    return Evaluation(str(source), [ArrowStrings(table.arrow, name) for name in columns])


def evaluation_of(problem: Problem, name: str, *, same_corpus: bool = False) -> Evaluation:
    """What is asked, and searched, in evaluation data."""
    if isinstance(problem, RetrievalData):
        asked = [problem.queries[query] for query in problem.qrels]
        return Evaluation(name, [asked], problem.corpus.texts, same_corpus)
    return Evaluation(name, [problem.first, problem.second] if isinstance(problem, PairData) else [problem.texts])


def leakage(table: Table, keys: Keys, evaluation: Evaluation) -> list[Finding]:
    """Queries (or texts, or pairs) of training that stand in the evaluation too, and positives in its corpus."""
    known = [text_keys(texts) for texts in evaluation.asked]
    if table.kind == "pairs" and len(known) == 2:
        mine, asked = _pair_keys(keys.of["first"], keys.of["second"]), _pair_keys(*known)
    elif table.kind == "pairs":
        return []
    else:
        mine, asked = keys.of["query" if table.kind == "retrieval" else "text"], np.concatenate(known)
    asking = {"retrieval": "queries", "pairs": "pairs"}.get(table.kind, "texts")
    name = "its test split" if evaluation.same_corpus else evaluation.name
    remedy = f"their results would be learned by heart; train without them: {WRITE}"
    rows = np.flatnonzero(np.isin(mine, asked))
    found = list(_at("error", "leakage", table, keys, rows, f"{asking} that stand in {name} too", remedy))
    if "pos_doc" in keys.of and not evaluation.same_corpus:
        shared = np.isin(keys.of["pos_doc"], text_keys(evaluation.documents))
        what = f"rows with a positive that stands in the corpus of {name} too"
        remedy = "nothing, if both search one corpus; else the evaluation is easier than new documents would be"
        found += _at("warning", "shared documents", table, keys, keys.rows("pos_doc")[shared], what, remedy)
    return found


def _pair_keys(first: Int64[np.ndarray, " n"], second: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    return first.view(np.uint64) * MIX + second.view(np.uint64)


def folder_findings(folder: Path) -> list[Finding]:
    """What a BEIR folder holds that nothing will use: queries that no split judges, documents without a text."""
    notes = Notes(strict=False)
    judged = set[str]()
    for split in beir.splits(folder):
        judged.update(beir.read_qrels(beir.qrels_path(folder, split), split, notes).grades)
    unjudged = [line for line, identity in beir.query_lines(folder / "queries.jsonl") if identity not in judged]
    found = []
    if unjudged:
        message = f"{len(unjudged):,} queries have no judgement in any split"
        file = str(folder / "queries.jsonl")
        found.append(
            Finding("note", "no positive", file, unjudged[0], message, "judge them, or drop them", len(unjudged))
        )
    empty = [
        line
        for batch in beir.documents(folder / "corpus.jsonl", notes).batches(["text", "line"])
        for line in batch.column("line").filter(pc.equal(pc.utf8_length(batch.column("text")), 0)).to_pylist()
    ]
    if empty:
        message = f"{len(empty):,} documents have neither a title nor a text"
        file = str(folder / "corpus.jsonl")
        found.append(Finding("warning", "empty", file, empty[0], message, "drop them from the corpus", len(empty)))
    return found


def summarise(table: Table, keys: Keys) -> dict[str, Any]:
    """Kind, rows, distinct queries, documents or labels, and mean lengths in characters."""
    distinct = {name: len(np.unique(values)) for name, values in keys.of.items()}
    mean = {name: round(float(lengths.sum()) / max(1, len(lengths)), 1) for name, lengths in keys.lengths.items()}
    summary = {"kind": table.kind, "rows": len(table), "dropped": table.dropped, "fingerprint": table.fingerprint}
    if table.kind != "retrieval":
        names = [name for name in keys.of if name != "label"]
        labels = {"labels": distinct["label"]} if "label" in distinct else {}
        return summary | labels | {f"mean_{name}_characters": mean[name] for name in names}
    documents = np.concatenate([keys.of["pos_doc"], keys.of["neg_doc"]])
    return summary | {
        "queries": distinct["query"],
        "documents": len(np.unique(documents)),
        "positives_per_row": round(len(keys.of["pos_doc"]) / len(keys), 2),
        "negatives_per_row": round(len(keys.of["neg_doc"]) / len(keys), 2),
        "mean_query_characters": mean["query"],
        "mean_document_characters": round(
            float((keys.lengths["pos_doc"].sum() + keys.lengths["neg_doc"].sum()) / len(documents)), 1
        ),
    }


def truncation(table: Table, limit: TokenLimit) -> tuple[list[Finding], dict[str, Any]]:
    """The share of texts that the model cuts, and mean token counts, from rows spread evenly over the data."""
    rows = evenly(len(table), SAMPLED_ROWS)
    texts: dict[str, dict[str, int]] = {"query": {}, "document": {}}  # side → text → row
    for row in rows.tolist():
        for side, text in _texts_of(table, row):
            texts[side].setdefault(text, row)
    findings: list[Finding] = []
    summary: dict[str, Any] = {"max_length": limit.max_length}
    for side, found in texts.items():
        if not found:
            continue
        prompt = limit.prompts.get(side, "")
        lengths = np.asarray(limit.count([prompt + text for text in found]))
        summary[f"mean_{side}_tokens"] = round(float(lengths.mean()), 1)
        cut = lengths > limit.max_length
        if cut.any():
            row = list(found.values())[int(np.argmax(cut))]
            file, line = table.where(row).rsplit(":", 1)
            sampled = f" of {len(found):,} sampled" if len(rows) < len(table) else f" of {len(found):,}"
            message = f"{cut.mean():.1%} of the {side} texts are longer than {limit.max_length} tokens and are cut"
            remedy = "raise max_length, or split long texts into passages"
            count = int(cut.sum())
            findings.append(
                Finding(
                    "warning", "truncated", file, int(line), f"{message} ({count:,}{sampled})", remedy, count,
                    round(float(cut.mean()), 4),
                )
            )  # fmt: skip
    return findings, summary


def _texts_of(table: Table, row: int) -> Iterator[tuple[str, str]]:
    """(side, text) of a row's texts; what is not searched with is a document."""
    values = table.arrow.row(row)
    for name, value in values.items():
        if name in ("query", "pos_doc", "neg_doc", "text", "first", "second"):
            for text in value if isinstance(value, list) else [value]:
                yield "query" if name == "query" else "document", text
