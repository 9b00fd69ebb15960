"""Reranking: a query's own candidates, relevant and not, in the order of their similarity to it.

Shapes: q = queries, c = candidates of a query at most, p = pairs of a query and a candidate, d = dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from kinvec.console import say
from kinvec.contracts import Corpus, Encoder, KinvecError, Result, RetrievalData
from kinvec.tasks.evaluation import ENCODE_ROWS, describe, finite, scaling
from kinvec.tasks.lexical import each_query
from kinvec.tasks.rankings import check_problem, from_rankings, timed, versions
from kinvec.topk import pair_scores, rank_ids

CANDIDATE_MEASURES = ("AP", "RR@10", "nDCG@10")


class Pairs(NamedTuple):
    """Every query with every candidate of its own, in the order of the documents: rows of both."""

    queries: Int64[np.ndarray, " p"]
    documents: Int64[np.ndarray, " p"]


def reranking(data: RetrievalData, encoder: Encoder, measures: Sequence[str] = (), *, baseline: bool = True) -> Result:
    """Order the documents judged for each query, and score that by the judgements (`CANDIDATE_MEASURES`).

    Queries without a relevant candidate, or without another one, leave nothing to order and do not count. With
    `baseline` the figures of BM25 over the same candidates come along. Raises `KinvecError` where no query has both.
    """
    data, names, seconds = candidates_only(data), tuple(measures) or CANDIDATE_MEASURES, dict[str, float]()
    pairs = _pairs(data)
    scale = scaling(getattr(encoder, "similarity", "cosine"))
    with timed(seconds, "encode_queries"):
        queries = finite(encoder, scale(encoder.encode_queries([data.queries[query] for query in data.qrels])))
    scores = np.empty(len(pairs.queries), dtype=np.float32)
    for start in range(0, len(data.corpus), ENCODE_ROWS):
        here = slice(*np.searchsorted(pairs.documents, [start, start + ENCODE_ROWS]).tolist())
        with timed(seconds, "encode_documents"):
            vectors = finite(encoder, scale(encoder.encode_documents(data.corpus.texts[start : start + ENCODE_ROWS])))
        scores[here] = pair_scores(queries, vectors, pairs.queries[here], pairs.documents[here] - start)
    result = from_rankings(data, *_ranked(data, pairs, scores), names)
    describe(result, encoder)
    result.kind, result.timing = data.kind, seconds
    if baseline:
        result.baselines = {"BM25": lexical_reranking(data, names).metrics}
    return result


def lexical_reranking(data: RetrievalData, measures: Sequence[str] = ()) -> Result:
    """The candidates in the order of BM25 (`tasks.bm25`), which knows the words of all candidates of all queries."""
    data, seconds = candidates_only(data), dict[str, float]()
    pairs = _pairs(data)
    scores = np.zeros(len(pairs.queries), dtype=np.float32)
    of_query = np.split(np.argsort(pairs.queries, kind="stable"), np.cumsum(np.bincount(pairs.queries))[:-1])
    with timed(seconds, "search"):
        for query, found in enumerate(each_query([data.queries[query] for query in data.qrels], data.corpus)):
            if found is not None:
                scores[of_query[query]] = found[pairs.documents[of_query[query]]]
    result = from_rankings(data, *_ranked(data, pairs, scores), tuple(measures) or CANDIDATE_MEASURES)
    result.model, result.kind, result.timing, result.versions = "BM25", data.kind, seconds, versions()
    return result


def candidates_only(data: RetrievalData) -> RetrievalData:
    """The queries that have something to order, and the documents that are candidates of one."""
    check_problem(data)
    kept = {q: grades for q, grades in data.qrels.items() if min(grades.values()) <= 0 < max(grades.values())}
    if not kept:
        where = f"{data.name}: no query has both a relevant document and one that is judged as not relevant"
        raise KinvecError(f"{where}; reranking needs candidates of both kinds (pos_doc and neg_doc)")
    if left := len(data.qrels) - len(kept):
        say(f"{data.name}: {left:,} queries do not have both relevant and other candidates, and do not count")
    wanted = {document for grades in kept.values() for document in grades}
    rows = [row for row, identity in enumerate(data.corpus.ids) if identity in wanted]
    if len(rows) < len(wanted):
        absent = min(wanted - {data.corpus.ids[row] for row in rows})
        raise KinvecError(f"{data.name}: the candidate '{absent}' is judged but is not in the corpus; add its text")
    corpus = Corpus([data.corpus.ids[row] for row in rows], [data.corpus.texts[row] for row in rows])
    return replace(data, corpus=corpus, qrels=kept)


def _pairs(data: RetrievalData) -> Pairs:
    row = {identity: row for row, identity in enumerate(data.corpus.ids)}
    found = [(row[document], query) for query, grades in enumerate(data.qrels.values()) for document in grades]
    documents, queries = np.array(sorted(found), dtype=np.int64).T
    return Pairs(queries, documents)


def _ranked(
    data: RetrievalData, pairs: Pairs, scores: Float32[np.ndarray, " p"]
) -> tuple[Float32[np.ndarray, "q c"], Int64[np.ndarray, "q c"]]:
    """Scores and rows of each query's candidates, best first, of equals as `kinvec.topk` orders them."""
    order = np.lexsort((rank_ids(data.corpus.ids)[pairs.documents], -scores, pairs.queries))
    counts = np.bincount(pairs.queries)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = len(data.qrels), int(counts.max())
    best, rows = np.full(shape, -np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
    at = pairs.queries[order], place
    best[at], rows[at] = scores[order], pairs.documents[order]
    return best, rows
