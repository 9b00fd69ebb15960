"""An `Encoder` and a problem → a `Result` that keeps every query's values.

Nothing here knows how a model works: a Hugging Face, an ONNX or an HTTP encoder runs the same evaluation.
Scores are float32 inner products whatever the precision of encoding (bf16 scores tie), and equal scores are ordered as
trec_eval orders them (see `kinvec.topk`). Evaluation draws no random numbers.

Shapes: q = queries, n = documents or texts, d = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from kinvec import metrics
from kinvec.contracts import Encoder, KinvecError, PairData, RecipeError, Result, RetrievalData
from kinvec.quantising import Restored
from kinvec.tasks.lexical import bm25
from kinvec.tasks.picture import SearchPicture
from kinvec.tasks.rankings import MEASURES, check_problem, from_rankings, search_depth, timed, versions
from kinvec.tasks.triplets import Pairs, chosen
from kinvec.topk import multiplies_on, top_k

ENCODE_ROWS = 65_536  # documents encoded, searched and forgotten at a time: memory does not grow with the corpus


def retrieval(data: RetrievalData, encoder: Encoder, measures: Sequence[str] = (), *, baseline: bool = True) -> Result:
    """Search the whole corpus for every judged query, and score the rankings against the graded judgements.

    Unless some are named, the measures are `MEASURES` and, where documents are judged as negatives, `TRIPLETS`. A
    document whose id equals the query's is a result like any other. With `baseline` the figures of BM25 on the same
    data come along as `baselines["BM25"]` (made once per data in a process), and some queries and documents have places
    in the plane. Raises `KinvecError` for data without queries or documents and for vectors that are not numbers,
    `RecipeError` for an unknown measure.
    """
    check_problem(data)
    ranked, triplets = chosen(data.qrels, measures, MEASURES)
    depth = search_depth(ranked)
    scale = scaling(getattr(encoder, "similarity", "cosine"))
    seconds: dict[str, float] = {}
    with timed(seconds, "encode_queries"):
        queries = scale(encoder.encode_queries([data.queries[query] for query in data.qrels]))

    def documents() -> Iterator[Float32[np.ndarray, "_ d"]]:
        for start in range(0, len(data.corpus), ENCODE_ROWS):
            with timed(seconds, "encode_documents"):
                vectors = scale(encoder.encode_documents(data.corpus.texts[start : start + ENCODE_ROWS]))
            yield vectors

    pairs = Pairs(data.qrels, data.corpus.ids)
    picture = SearchPicture(data) if baseline else None
    with timed(seconds, "search"):
        blocks = pairs.passing(queries, documents())
        looked_at = picture.passing(blocks) if picture else blocks
        best = top_k(queries, looked_at, data.corpus.ids, depth, device=multiplies_on(encoder))
    seconds["search"] -= seconds["encode_documents"]  # which happens inside it
    also = picture.documents if picture else ()
    result = from_rankings(data, *best, ranked, pairs.columns(triplets), also)
    result.per_query["judged_similarities"] = pairs.similarities(data.qrels, data.corpus.ids)
    if picture:
        with timed(seconds, "picture"):
            picture.draw(queries, data.corpus.ids, result)
    describe(result, encoder)
    result.timing = seconds | {"documents_per_second": len(data.corpus) / max(seconds["encode_documents"], 1e-9)}
    if baseline and ranked:
        result.baselines = {"BM25": bm25(data, ranked).metrics}
    return result


def from_vectors(
    data: RetrievalData,
    queries: tuple[Sequence[str], Sequence[np.ndarray]],
    documents: tuple[Sequence[str], Sequence[np.ndarray | Restored]],
    measures: Sequence[str] = (),
    *,
    similarity: str = "dot",
) -> Result:
    """As `retrieval`, for vectors that are there already: each side is its ids and its shards [_, d], joined by id.

    Raises `KinvecError` where a judged query or a document of the corpus has no vector, or a vector no document.
    """
    check_problem(data)
    ranked, triplets = chosen(data.qrels, measures, MEASURES)
    scale, seconds = scaling(similarity), dict[str, float]()
    asked = scale(np.concatenate([np.asarray(part) for part in queries[1]])[_rows_of(data.qrels, queries[0], "query")])
    corpus_rows = _rows_of(documents[0], data.corpus.ids, "embedded document")
    _rows_of(data.corpus.ids, documents[0], "document")  # every one must be there, or the search is another one

    def blocks() -> Iterator[Float32[np.ndarray, "_ d"]]:
        for shard in documents[1]:
            for start in range(0, len(shard), ENCODE_ROWS):
                yield scale(shard[start : start + ENCODE_ROWS])

    pairs = Pairs(data.qrels, documents[0])
    with timed(seconds, "search"):
        scores, rows = top_k(asked, pairs.passing(asked, blocks()), documents[0], search_depth(ranked))
    result = from_rankings(data, scores, corpus_rows[rows], ranked, pairs.columns(triplets))
    result.per_query["judged_similarities"] = pairs.similarities(data.qrels, documents[0])
    result.precision, result.timing, result.versions = "fp32", seconds, versions()
    return result


def _rows_of(wanted: Iterable[str], ids: Sequence[str], what: str) -> Int64[np.ndarray, " m"]:
    """The place of every wanted id among `ids`."""
    place = {identity: row for row, identity in enumerate(ids)}
    rows = []
    for identity in wanted:
        if identity not in place:
            raise KinvecError(f"the {what} '{identity}' is in one place and not in the other; embed this data again")
        rows.append(place[identity])
    return np.array(rows, dtype=np.int64)


def similarity(data: PairData, encoder: Encoder, measures: Sequence[str] = ()) -> Result:
    """Spearman's and Pearson's correlation of the pairs' cosines with their scores; every pair's cosine is kept.

    Both sides are encoded as queries: with prompts, that is what a symmetric task uses (E5, BGE). Raises `RecipeError`
    where measures are named: there are no others.
    """
    if measures:
        raise RecipeError("scored pairs are measured by Spearman and Pearson; leave out the measures")
    if not len(data.scores):
        raise KinvecError(f"{data.name}: there are no pairs to score; give rows of two texts and a score")
    seconds: dict[str, float] = {}
    n = len(data.scores)
    with timed(seconds, "encode"):
        vectors = unit_vectors(encoder, [*data.first, *data.second])
    cosines = np.einsum("nd,nd->n", vectors[:n], vectors[n:], dtype=np.float64)
    gold = np.asarray(data.scores, dtype=np.float64)
    columns: dict[str, list[Any]] = {
        "id": [str(i) for i in range(n)],
        "query": list(data.first),
        "second": list(data.second),
        "score": gold.tolist(),
        "cosine": cosines.tolist(),
    }
    values = {"spearman_cosine": metrics.spearman(gold, cosines), "pearson_cosine": metrics.pearson(gold, cosines)}
    result = Result(data.name or "similarity", "similarity", data.split, "", values, columns, data.fingerprint)
    describe(result, encoder)
    result.timing = seconds
    return result


def describe(result: Result, encoder: Encoder) -> None:
    """What a result says of the model; only `name` is sure to be there on every encoder."""
    result.model = encoder.name
    result.prompts = dict(getattr(encoder, "prompts", {}))
    result.precision = str(getattr(encoder, "precision", ""))
    result.versions = versions()


def scaling(similarity: str) -> Callable[[np.ndarray], Float32[np.ndarray, "n d"]]:
    """What makes inner products of vectors this similarity. Raises `RecipeError` for an unknown one."""
    if similarity not in SIMILARITIES:
        known = " and ".join(SIMILARITIES)
        raise KinvecError(f"the model asks for the similarity '{similarity}'; search knows {known}")
    return SIMILARITIES[similarity]


def unit_vectors(encoder: Encoder, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
    """The texts encoded as queries, at length 1. Raises `KinvecError` for vectors that are not numbers."""
    return finite(encoder, unit(encoder.encode_queries(texts)))


def finite(encoder: Encoder, vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """The vectors. Raises `KinvecError` where one is not of numbers."""
    if not np.isfinite(vectors).all():
        raise KinvecError(f"{encoder.name} gave NaN or infinity; is the model broken? Try --precision fp32")
    return vectors


def unit(vectors: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows at length 1, so that inner products are cosines; a zero vector stays one."""
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, np.float32(1))


SIMILARITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": unit,
    "dot": lambda vectors: np.asarray(vectors, dtype=np.float32),
}
