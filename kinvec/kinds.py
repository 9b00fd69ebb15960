"""What a run does with each kind of data: which rows it uses, how it holds some out, draws batches, and measures.

`KINDS` has an entry a kind; nothing else asks which kind it is. Shapes: E = examples, rows of the table that are used.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from kinvec import tasks
from kinvec.contracts import Encoder, LabelledData, PairData, Problem, RecipeError, RetrievalData
from kinvec.files import (
    Table,
    content_fingerprint,
    has_split,
    kind_of_pairs,
    open_data,
    open_pairs,
    open_problem,
    open_retrieval,
)
from kinvec.sampling import DataSettings, Source, as_retrieval, label_source, pair_source, scored_source, text_source

Rows = Int[np.ndarray, " E"]
CLASSIFIER_TEXTS = 20_000  # training texts that classifiers over the embeddings learn from, at most
DEV_CLASSIFIER_TEXTS = 4_000  # the same where the checkpoint is chosen: an evaluation every epoch


@dataclass(frozen=True)
class Kind:
    """One kind of training data.

    `column` keeps rows together when some are held out: no text of it is on both sides.
    `named` opens evaluation data that has a place of its own, or is a split (`dev`, `test`) beside the training data.
    `held` makes evaluation data of held-out rows, where such rows can judge a model; `complete` adds what it needs of
    the rows trained on.
    """

    column: str
    source: Callable[[Table, Rows, DataSettings, int], Source]
    rows: Callable[[Table, DataSettings], Rows]
    named: Callable[[str, str, DataSettings], Problem]
    beside: Callable[[str, str], bool]
    held: Callable[[Table, Rows, DataSettings, str], Problem] | None
    complete: Callable[[Any, Table, Rows, int], Problem]
    develop: Callable[[Any, Encoder], dict[str, float]]
    asked: Callable[[Any], list[str]]
    sizes: Callable[[Any], dict[str, int]]
    texts: Callable[[Table, int], Iterator[tuple[str, str]]]


def _all_rows(table: Table, settings: DataSettings) -> Rows:
    if settings.labels is not None:
        raise RecipeError(f"data.labels: {settings.train} holds {table.kind}, which has no labels; leave it out")
    return np.arange(len(table))


def _as_it_is(problem: Any, table: Table, rows: Rows, limit: int) -> Any:
    return problem


# --- Queries with documents -----------------------------------------------------------------------------------------


def _develop_retrieval(problem: Any, encoder: Encoder) -> dict[str, float]:
    found = tasks.retrieval(problem, encoder, baseline=False).metrics
    return {"nDCG@10": found["nDCG@10"]} | found


def _example_texts(table: Table, row: int) -> Iterator[tuple[str, str]]:
    example = table.example(row)
    yield "query", example.query
    yield from (("document", text) for text in example.positives)


RETRIEVAL = Kind(
    column="query",
    source=pair_source,
    rows=_all_rows,
    named=lambda source, split, settings: open_retrieval(source, split=split, columns=settings.columns),
    beside=has_split,
    held=lambda table, rows, settings, name: as_retrieval(table, rows, settings.distractors, name),
    complete=_as_it_is,
    develop=_develop_retrieval,
    asked=lambda problem: list(problem.queries.values()),
    sizes=lambda problem: {"queries": len(problem.qrels), "documents": len(problem.corpus)},
    texts=_example_texts,
)


# --- Labelled texts -------------------------------------------------------------------------------------------------


def _column(table: Table, name: str) -> list[Any]:
    return [value for batch in table.batches([name]) for value in batch.column(0).to_pylist()]


def _rows_of_labels(table: Table, settings: DataSettings) -> Rows:
    if settings.labels is None:
        return np.arange(len(table))
    labels = np.array(_column(table, "label"))
    there = sorted(set(labels.tolist()))
    for label in settings.labels:
        if label not in there:
            near = difflib.get_close_matches(label, there, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(there[:12])}"
            raise RecipeError(f"data.labels: {table.source} has no label '{label}'; {hint}")
    return np.flatnonzero(np.isin(labels, settings.labels))


def _texts_and_labels(table: Table, rows: Rows) -> tuple[list[str], list[str]]:
    found = [table.arrow.row(int(row)) for row in rows]
    return [row["text"] for row in found], [row["label"] for row in found]


def _labelled(table: Table, rows: Rows, name: str, split: str) -> LabelledData:
    """The rows, with nothing to learn from yet."""
    texts, labels = _texts_and_labels(table, rows)
    return LabelledData(texts, labels, [], [], _key(table, rows), name, split)


def _key(table: Table, rows: Rows) -> str:
    return f"{table.fingerprint}-{content_fingerprint(rows.astype(np.int64).tobytes())}"


def _open_labelled(source: str, split: str, settings: DataSettings) -> LabelledData:
    table = open_data(source, split=split, kind="labelled", columns=settings.columns, skip_bad=settings.skip_bad)
    return _labelled(table, _rows_of_labels(table, settings), Path(source).stem, split)


def _with_training_texts(problem: Any, table: Table, rows: Rows, limit: int) -> LabelledData:
    """With the rows trained on for classifiers to learn from, a random draw of `limit` where they are more."""
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))
    texts, labels = _texts_and_labels(table, rows)
    key = content_fingerprint(f"{problem.fingerprint}-{_key(table, rows)}".encode())
    return replace(problem, training_texts=texts, training_labels=labels, fingerprint=key)


def _develop_labelled(problem: Any, encoder: Encoder) -> dict[str, float]:
    first = "v_measure" if problem.kind == "clustering" else "accuracy_knn"
    return tasks.classification(problem, encoder, (first, "silhouette")).metrics


LABELLED = Kind(
    column="text",
    source=label_source,
    rows=_rows_of_labels,
    named=_open_labelled,
    beside=has_split,
    held=lambda table, rows, settings, name: _labelled(table, rows, Path(table.source).stem, name),
    complete=_with_training_texts,
    develop=_develop_labelled,
    asked=lambda problem: list(problem.texts),
    sizes=lambda problem: {"texts": len(problem.texts), "labels": len(set(problem.labels))},
    texts=lambda table, row: iter([("text", table.arrow.value("text", row))]),
)


# --- Scored pairs ---------------------------------------------------------------------------------------------------


def _held_pairs(table: Table, rows: Rows, settings: DataSettings, name: str) -> PairData:
    found = [table.arrow.row(int(row)) for row in rows]
    first, second, scores = ([row[column] for row in found] for column in ("first", "second", "score"))
    kind = kind_of_pairs(scores)
    return PairData(first, second, scores, _key(table, rows), Path(table.source).stem, name, kind)


PAIRS = Kind(
    column="first",
    source=scored_source,
    rows=_all_rows,
    named=lambda source, split, settings: open_pairs(source, split=split, columns=settings.columns),
    beside=has_split,
    held=_held_pairs,
    complete=_as_it_is,
    develop=lambda problem, encoder: tasks.measure(problem, encoder).metrics,
    asked=lambda problem: [],  # one text of a pair may stand elsewhere; kinvec check looks for whole pairs
    sizes=lambda problem: {"pairs": len(problem.scores)},
    texts=lambda table, row: iter([("text", table.arrow.value(side, row)) for side in ("first", "second")]),
)

# --- Plain texts ----------------------------------------------------------------------------------------------------


def _open_judged(source: str, split: str, settings: DataSettings) -> Problem:
    """Texts by themselves judge nothing: what measures the model is named, and of any other kind."""
    return open_problem(source, split=split, columns=settings.columns)


def _judging(problem: Problem) -> Kind:
    return {RetrievalData: RETRIEVAL, LabelledData: LABELLED, PairData: PAIRS}[type(problem)]


TEXTS = Kind(
    column="text",
    source=text_source,
    rows=_all_rows,
    named=_open_judged,
    beside=lambda source, split: False,
    held=None,
    complete=_as_it_is,
    develop=lambda problem, encoder: _judging(problem).develop(problem, encoder),
    asked=lambda problem: [],
    sizes=lambda problem: _judging(problem).sizes(problem),
    texts=lambda table, row: iter([("text", table.arrow.value("text", row))]),
)

KINDS: dict[str, Kind] = {"retrieval": RETRIEVAL, "labelled": LABELLED, "pairs": PAIRS, "texts": TEXTS}

NEEDS = {
    "retrieval": "queries with positive documents", "labelled": "texts with labels",
    "pairs": "pairs of texts with scores", "texts": "plain texts",
}  # fmt: skip
FITTING = {"retrieval": "contrastive", "labelled": "triplet", "pairs": "cosent", "texts": "simcse"}
