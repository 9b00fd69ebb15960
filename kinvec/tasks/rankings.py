"""Rankings of a corpus → a `Result`: every query's measures, and what a person needs to read them.

Shapes: q = queries, k = results kept for each query.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from kinvec import metrics
from kinvec.contracts import KinvecError, Result, RetrievalData

MEASURES = ("nDCG@10", "RR@10", "AP@10", "R@10", "R@100", "P@10")
SHOWN = 10  # results kept for a person to read
SNIPPET = 300  # characters of a document kept
DOCUMENTS = 50_000  # whose beginnings are kept, at most
QUERIES_AT_A_TIME = 4096  # queries whose rankings are Python objects at once
LIBRARIES = ("kinvec", "torch", "transformers", "numpy", "ir-measures", "bm25s", "scikit-learn")


def search_depth(measures: Sequence[str]) -> int:
    """Results to keep for each query: enough for the measures, and for a person."""
    return max(metrics.search_depth(measures), SHOWN)


def from_rankings(
    data: RetrievalData, scores: Float32[np.ndarray, "q k"], rows: Int64[np.ndarray, "q k"], measures: Sequence[str],
    more: Mapping[str, list[float | None]] | None = None, also: Sequence[int] | Int64[np.ndarray, " a"] = (),
) -> Result:  # fmt: skip
    """The result of rankings: for each query of `data.qrels` rows of the corpus, best first; −1 where there is none.

    `more` are measures that are there already, a value a query or None; `also` rows of documents to keep the beginnings
    of, besides those that a reader of the rankings meets.
    """
    names = [str(measure) for measure in metrics.parse_measures(measures)]
    query_ids = list(data.qrels)
    values: dict[str, list[Any]] = {name: [] for name in names}
    shown: list[dict[str, Any]] = []
    for start in range(0, len(query_ids), QUERIES_AT_A_TIME):
        chunk = range(start, min(start + QUERIES_AT_A_TIME, len(query_ids)))
        ranked = {query_ids[i]: [data.corpus.ids[row] for row in rows[i].tolist() if row >= 0] for i in chunk}
        for name, column in metrics.retrieval(names, {query: data.qrels[query] for query in ranked}, ranked).items():
            values[name].extend(column.tolist())
        for i in chunk:
            shown.append(_shown(data, query_ids[i], ranked[query_ids[i]], rows[i], scores[i]))
    columns = {name: [row[name] for row in shown] for name in shown[0]}
    texts = [data.queries[query] for query in query_ids]
    values |= more or {}
    means = {name: metrics.mean([value for value in column if value is not None]) for name, column in values.items()}
    per_query = {"id": query_ids, "query": texts, **values, **columns}
    name, kept = data.name or "retrieval", beginnings(data, documents_met(data, rows, also))
    return Result(name, "retrieval", data.split, "", means, per_query, data.fingerprint, documents=kept)


def documents_met(
    data: RetrievalData, rows: Int64[np.ndarray, "q k"], also: Sequence[int] | Int64[np.ndarray, " a"] = ()
) -> list[int]:
    """Rows of the documents that a reader of the rankings meets, at most `DOCUMENTS`: deeper results are left out."""
    relevant = {document for grades in data.qrels.values() for document, grade in grades.items() if grade > 0}
    judged = (row for row, identity in enumerate(data.corpus.ids) if identity in relevant)
    by_place = rows[:, :SHOWN].T.ravel().tolist()  # all first results, then all second ones
    found = dict.fromkeys([*(int(row) for row in also), *by_place[: len(rows)], *judged, *by_place])
    return [row for row in found if row >= 0][:DOCUMENTS]


def beginnings(data: RetrievalData, rows: Iterable[int]) -> dict[str, list[Any]]:
    """Ids and beginnings of documents; nothing where the data have no texts."""
    found = [(data.corpus.ids[row], data.corpus.texts[row][:SNIPPET]) for row in rows]
    if not any(text for _, text in found):
        return {}
    return {"id": [identity for identity, _ in found], "text": [text for _, text in found]}


def _shown(
    data: RetrievalData, query: str, ranked: list[str], rows: Int64[np.ndarray, " k"], scores: Float32[np.ndarray, " k"]
) -> dict[str, Any]:
    """What a person reads of one query: the first results, what the first one says, and where a relevant one came."""
    judged = data.qrels[query]
    relevant = (place for place, document in enumerate(ranked, 1) if judged.get(document, 0) > 0)
    return {
        "top_ids": ranked[:SHOWN],
        "top_scores": scores[: len(ranked)][:SHOWN].tolist(),
        "top_text": data.corpus.texts[int(rows[0])][:SNIPPET] if ranked else "",
        "first_relevant": next(relevant, None),
        "judged_ids": list(judged),
        "judged_scores": list(judged.values()),
    }


HIGHEST_GRADE = 10_000  # trec_eval's code counts grades in an array as long as the highest


def check_problem(data: RetrievalData) -> None:
    """Raise `KinvecError` where there is nothing to search with or in."""
    where = data.name or "the data"
    if not data.qrels:
        raise KinvecError(f"{where}: no query of the split '{data.split}' is judged; name a split that has judgements")
    unknown = next((query for query in data.qrels if query not in data.queries), None)
    if unknown is not None:
        raise KinvecError(f"{where}: the query '{unknown}' is judged but has no text; add it, or drop its judgements")
    if not len(data.corpus):
        raise KinvecError(f"{where}: the corpus has no documents; there is nothing to search")
    for query, grades in data.qrels.items():
        if any(abs(grade) > HIGHEST_GRADE for grade in grades.values()):
            wrong = next(document for document, grade in grades.items() if abs(grade) > HIGHEST_GRADE)
            raise KinvecError(
                f"{where}: query '{query}' judges document '{wrong}' as {grades[wrong]}; a grade is small: 0, 1, 2 and "
                f"so on, at most {HIGHEST_GRADE:,}"
            )


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    from kinvec import __version__

    return {name: __version__ if name == "kinvec" else version(name) for name in LIBRARIES}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes to `seconds[name]`."""
    begun = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
