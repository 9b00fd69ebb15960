"""What is wrong with training data, before a model sees it: rules → problems, each with file, line and remedy.

A pass over the data keeps 64-bit keys of texts and ids in NumPy arrays, never the texts: about 100 bytes a row.
Shapes: n = rows, p = entries of a column of all rows (a list column has several a row).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, UInt64

from kinvec.files import DataError, Table, beir, detect_kind, exact_key, open_data, open_retrieval, text_key, text_keys
from kinvec.files.problems import Notes

PLACES = 5  # lines named for one problem; all are counted
SAMPLED_ROWS = 5000  # rows whose tokens are counted, at most, spread evenly over the data
MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd constant: multiplication by it is one-to-one on 64 bits

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """Something wrong: an `error` makes training or its evaluation wrong, a `warning` may, a `note` is good to know."""

    severity: Severity
    rule: str
    file: str
    line: int
    message: str
    remedy: str
    count: int = 1


@dataclass(frozen=True)
class Checked:
    """What was found in one source. `summary` holds its kind, rows, queries, documents, mean lengths, fingerprint."""

    source: str
    summary: dict[str, Any]
    problems: list[Problem]

    @property
    def wrong(self) -> bool:
        """Whether training on it would be wrong."""
        return any(problem.severity == "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        problems = [asdict(problem) for problem in self.problems]
        return {"source": self.source, "wrong": self.wrong, "summary": self.summary, "problems": problems}


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

    Texts have the key of the normalised text, ids and labels that of the exact one.
    """

    of: dict[str, Int64[np.ndarray, " p"]]
    counts: dict[str, Int64[np.ndarray, " n"]]
    characters: dict[str, int]
    files: Int64[np.ndarray, " n"]
    lines: Int64[np.ndarray, " n"]

    def rows(self, column: str) -> Int64[np.ndarray, " p"]:
        """The row that each entry of a column stands in."""
        return np.repeat(np.arange(len(self.lines)), self.counts[column])

    def row_sums(self, column: str) -> UInt64[np.ndarray, " n"]:
        """One key a row for all its entries of a column in any order: their sum, modulo 2**64."""
        ends = np.concatenate([[0], np.cumsum(self.counts[column])])
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.of[column].view(np.uint64))])
        return sums[ends[1:]] - sums[ends[:-1]]


EXACT = ("query_id", "pos_id", "neg_id", "label")
NUMBERS = ("pos_score", "neg_score", "score", "file", "line")


def keys_of(table: Table) -> Keys:
    """The keys of a table's texts, ids and labels, in one pass, in the memory of one record batch and of the keys."""
    names = [name for name in table.arrow.schema.names if name not in NUMBERS]
    keys: dict[str, list[np.ndarray]] = defaultdict(list)
    counts: dict[str, list[np.ndarray]] = defaultdict(list)
    characters: dict[str, int] = defaultdict(int)
    for batch in table.batches([*names, "file", "line"]):
        for name in names:
            entries, each = _entries(batch.column(name))
            key = exact_key if name in EXACT else text_key
            keys[name].append(np.fromiter(map(key, entries), np.int64, len(entries)))
            counts[name].append(each)
            characters[name] += sum(map(len, entries))
        for name in ("file", "line"):
            keys[name].append(batch.column(name).to_numpy().astype(np.int64))
    joined = {name: np.concatenate(parts) for name, parts in keys.items()}
    widths = {name: np.concatenate(parts) for name, parts in counts.items()}
    return Keys({name: joined[name] for name in names}, widths, dict(characters), joined["file"], joined["line"])


def _entries(column: pa.Array) -> tuple[list[str], Int64[np.ndarray, " n"]]:
    """The entries of a column end to end, and how many each row has."""
    if pa.types.is_list(column.type):
        return column.flatten().to_pylist(), pc.list_value_length(column).to_numpy().astype(np.int64)
    return column.to_pylist(), np.ones(len(column), np.int64)


def check_source(
    source: str | Path, *, split: str = "train", kind: str | None = None, columns: Mapping[str, Any] | None = None,
    evaluation: str | Path | None = None, limit: TokenLimit | None = None, skip_bad: bool = False,
) -> Checked:  # fmt: skip
    """Training data checked in all rules; the problems are sorted by severity.

    `evaluation` is data whose test split must share no query with it; a BEIR folder is held against its own test split.
    With `skip_bad` rows that cannot be read are warnings only. Raises `KinvecError` if there is no such source, or the
    evaluation data cannot be read.
    """
    try:
        table = open_data(source, split=split, kind=kind, columns=columns, skip_bad=True)
    except DataError as error:
        return Checked(str(source), {}, [_problem("error", error)])
    keys = keys_of(table)
    problems = [*unreadable(table, skip_bad), *table_problems(table, keys)]
    folder = Path(source)
    own_test = beir.is_beir(folder) and split != "test" and "test" in beir.splits(folder)
    if evaluation is not None or own_test:
        problems += leakage(
            table, keys, evaluation if evaluation is not None else source, same_corpus=evaluation is None
        )
    if beir.is_beir(folder):
        problems += folder_problems(folder)
    summary = summarise(table, keys)
    if limit is not None:
        found, lengths = truncation(table, limit)
        problems += found
        summary |= lengths
    order = ("error", "warning", "note")
    return Checked(str(source), summary, sorted(problems, key=lambda problem: order.index(problem.severity)))


def _problem(severity: Severity, error: DataError, count: int = 1) -> Problem:
    return Problem(severity, error.rule, error.file, error.line, error.message, error.remedy, count)


def unreadable(table: Table, skip_bad: bool = False) -> Iterator[Problem]:
    """The rows that could not be read: the first of each rule with its place, the others counted."""
    severity: Severity = "warning" if skip_bad else "error"
    for error in table.problems:
        yield _problem(severity, error)
    for rule, count in table.counts.items():
        more = count - sum(error.rule == rule for error in table.problems)
        if more > 0:
            yield Problem(
                severity, rule, table.source, 0, f"{more:,} more rows with a problem of this rule", "as above", more
            )
    for remark in table.remarks:
        yield _problem("warning", remark)


def table_problems(table: Table, keys: Keys) -> list[Problem]:
    """All rules that look at the table alone."""
    return [problem for rule in RULES[table.kind] for problem in rule(table, keys)]


def _at(
    severity: Severity, rule: str, table: Table, keys: Keys, rows: np.ndarray, what: str, remedy: str
) -> Iterator[Problem]:
    """One problem for all these rows, placed at the first of them; nothing if there are none."""
    rows = np.unique(rows)
    if len(rows):
        lines = ", ".join(str(keys.lines[row]) for row in rows[:PLACES]) + (", …" if len(rows) > PLACES else "")
        places = f" (lines {lines})" if len(rows) > 1 else ""
        file, line = table.files[keys.files[rows[0]]], int(keys.lines[rows[0]])
        yield Problem(severity, rule, file, line, f"{what}{places}", remedy, len(rows))


def duplicates(table: Table, keys: Keys) -> Iterator[Problem]:
    """Rows whose texts (and label) are those of an earlier row; upper case and white space do not count."""
    names = [name for name in keys.of if not name.endswith("_id")]
    whole = np.zeros(len(table), np.uint64)
    for name in names:
        whole = whole * MIX + keys.row_sums(name)
    again = np.ones(len(table), dtype=bool)
    again[np.unique(whole, return_index=True)[1]] = False
    what = "rows that repeat an earlier one"
    yield from _at("warning", "duplicate", table, keys, np.flatnonzero(again), what, "drop them: they count double")


def judged_both_ways(table: Table, keys: Keys) -> Iterator[Problem]:
    """The same document as positive and as negative of the same query, in one row or in two."""
    positive, negative = (_judged(keys, column) for column in ("pos_doc", "neg_doc"))
    rows = keys.rows("neg_doc")[np.isin(negative, positive)]
    what = "rows with a negative that is judged positive for the same query"
    remedy = "drop the negative, or correct the judgement"
    yield from _at("error", "contradiction", table, keys, rows, what, remedy)


def _judged(keys: Keys, column: str) -> UInt64[np.ndarray, " p"]:
    """A key of each (query, document) pair."""
    queries = keys.of["query"].view(np.uint64)[keys.rows(column)]
    return queries * MIX + keys.of[column].view(np.uint64)


def ambiguous_ids(table: Table, keys: Keys) -> Iterator[Problem]:
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


def own_text(table: Table, keys: Keys) -> Iterator[Problem]:
    """A positive that is the query itself."""
    rows = keys.rows("pos_doc")
    same = keys.of["query"][rows] == keys.of["pos_doc"]
    what = "rows that have the query itself as a positive"
    yield from _at("warning", "own text", table, keys, rows[same], what, "drop it: it teaches nothing")


def several_labels(table: Table, keys: Keys) -> Iterator[Problem]:
    """The same text under two labels."""
    order = np.lexsort((keys.of["label"], keys.of["text"]))
    text, label = keys.of["text"][order], keys.of["label"][order]
    rows = order[np.flatnonzero((np.diff(text) == 0) & (np.diff(label) != 0)) + 1]
    what = "rows with a text that stands under another label too"
    yield from _at("warning", "contradiction", table, keys, rows, what, "decide for one label")


RULES: dict[str, tuple[Callable[[Table, Keys], Iterator[Problem]], ...]] = {
    "retrieval": (duplicates, judged_both_ways, ambiguous_ids, own_text),
    "labelled": (duplicates, several_labels),
    "pairs": (duplicates,),
    "texts": (duplicates,),
}


def leakage(table: Table, keys: Keys, evaluation: str | Path, *, same_corpus: bool = False) -> list[Problem]:
    """Queries (or texts, or pairs) of training that stand in the evaluation too, and positives in its corpus.

    `same_corpus` says that both search the same documents, where a shared document is no news.
    """
    asked, documents = _evaluation_keys(evaluation, table.kind)
    mine = _questions(table.kind, keys)
    name = "its test split" if same_corpus else str(evaluation)
    asking = {"retrieval": "queries", "pairs": "pairs"}.get(table.kind, "texts")
    what = f"{asking} that stand in {name} too"
    remedy = "drop them from training: their results would be learned by heart"
    rows = np.flatnonzero(np.isin(mine, asked))
    found = list(_at("error", "leakage", table, keys, rows, what, remedy))
    if "pos_doc" in keys.of:
        shared = np.isin(keys.of["pos_doc"], documents)
        what = f"rows with a positive that stands in the corpus of {name}"
        remedy = "nothing, if both search one corpus; else the evaluation is easier than new documents would be"
        severity: Severity = "note" if same_corpus else "warning"
        found += _at(severity, "shared documents", table, keys, keys.rows("pos_doc")[shared], what, remedy)
    return found


def _questions(kind: str, keys: Keys) -> Int64[np.ndarray, " n"]:
    """What a model is asked, by row: the query, the text, or both texts of a pair."""
    if kind == "pairs":
        return (keys.of["first"].view(np.uint64) * MIX + keys.of["second"].view(np.uint64)).view(np.int64)
    return keys.of["query" if kind == "retrieval" else "text"]


def _evaluation_keys(
    evaluation: str | Path, trained_on: str
) -> tuple[Int64[np.ndarray, " q"], Int64[np.ndarray, " d"]]:
    """Keys of what is asked in the test split, and of the documents searched."""
    kind = detect_kind(evaluation, split="test")
    if kind == "retrieval":
        data = open_retrieval(evaluation, split="test")
        return text_keys(data.queries.values()), text_keys(data.corpus.texts)
    keys = keys_of(open_data(evaluation, split="test", skip_bad=True))
    if kind == "pairs" and trained_on != "pairs":
        return np.concatenate([keys.of["first"], keys.of["second"]]), np.empty(0, np.int64)
    return _questions(kind, keys), np.empty(0, np.int64)


def folder_problems(folder: Path) -> list[Problem]:
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
            Problem("note", "no positive", file, unjudged[0], message, "judge them, or drop them", len(unjudged))
        )
    empty = [
        line
        for batch in beir.documents(folder / "corpus.jsonl", notes).batches(["text", "line"])
        for line in batch.column("line").filter(pc.equal(pc.utf8_length(batch.column("text")), 0)).to_pylist()
    ]
    if empty:
        message = f"{len(empty):,} documents have neither a title nor a text"
        file = str(folder / "corpus.jsonl")
        found.append(Problem("warning", "empty", file, empty[0], message, "drop them from the corpus", len(empty)))
    return found


def summarise(table: Table, keys: Keys) -> dict[str, Any]:
    """Kind, rows, distinct queries, documents or labels, and mean lengths in characters."""
    distinct = {name: len(np.unique(values)) for name, values in keys.of.items()}
    mean = {name: round(keys.characters[name] / max(1, len(values)), 1) for name, values in keys.of.items()}
    summary = {"kind": table.kind, "rows": len(table), "dropped": table.dropped, "fingerprint": table.fingerprint}
    if table.kind != "retrieval":
        names = [name for name in keys.of if name != "label"]
        labels = {"labels": distinct["label"]} if "label" in distinct else {}
        return summary | labels | {f"mean_{name}_characters": mean[name] for name in names}
    documents = np.concatenate([keys.of["pos_doc"], keys.of["neg_doc"]])
    return summary | {
        "queries": distinct["query"],
        "documents": len(np.unique(documents)),
        "positives_per_row": round(len(keys.of["pos_doc"]) / len(table), 2),
        "negatives_per_row": round(len(keys.of["neg_doc"]) / len(table), 2),
        "mean_query_characters": mean["query"],
        "mean_document_characters": round(
            (keys.characters["pos_doc"] + keys.characters["neg_doc"]) / len(documents), 1
        ),
    }


def truncation(table: Table, limit: TokenLimit) -> tuple[list[Problem], dict[str, Any]]:
    """The share of texts that the model cuts, and mean token counts, from rows spread evenly over the data."""
    rows = np.unique(np.linspace(0, len(table) - 1, min(SAMPLED_ROWS, len(table))).round().astype(np.int64))
    texts: dict[str, dict[str, int]] = {"query": {}, "document": {}}  # side → text → row
    for row in rows.tolist():
        for side, text in _texts_of(table, row):
            texts[side].setdefault(text, row)
    problems: list[Problem] = []
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
            problems.append(
                Problem("warning", "truncated", file, int(line), f"{message} ({count:,}{sampled})", remedy, count)
            )
    return problems, summary


def _texts_of(table: Table, row: int) -> Iterator[tuple[str, str]]:
    """(side, text) of a row's texts; what is not searched with is a document."""
    values = table.arrow.row(row)
    for name, value in values.items():
        if name in ("query", "pos_doc", "neg_doc", "text", "first", "second"):
            for text in value if isinstance(value, list) else [value]:
                yield "query" if name == "query" else "document", text
