"""Exact top-k search in bounded memory: blocked float32 matrix products, with ties in trec_eval's order.

A matrix product's last bits depend on the processor, the threads and the shape of the block, so equal documents could
score differently. Products only choose candidates, with room for their error; candidates are scored again in float64,
pair by pair, and rounded to float32. Rankings are therefore the same on every machine and for every division of the
corpus.

The order is total: higher score first; among equal scores the id that is *greater* as a string first. That is how
trec_eval, and pytrec_eval with it, reads a run (`comp_sim_docno` compares float32 scores, then document names in
descending order), so the lists made here and the metrics computed from their scores agree to the last tie.

Shapes: q = queries, n = documents, b = documents of a block, d = dimensions, k = results kept for each query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Float32, Int64

from kinvec.contracts import KinvecError

DOCUMENT_ROWS = 16_384  # b; a block of scores is at most QUERY_ROWS × DOCUMENT_ROWS float32, 16 MiB
QUERY_ROWS = 256
PAIR_ROWS = 16_384  # query-document pairs scored in float64 at a time


def top_k(
    queries: Float[np.ndarray, "q d"], documents: Iterable[np.ndarray], ids: Sequence[str], k: int,
    ceilings: Float32[np.ndarray, " q"] | None = None,
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:  # fmt: skip
    """The k documents with the largest inner product for each query, best first; with `ceilings`, of those up to them.

    `documents` are row blocks [_, d] of one matrix in the order of `ids`: `[matrix]`, memory-mapped shards, or a
    generator that encodes as it goes; only one block of `DOCUMENT_ROWS` rows and its scores are held at a time. Returns
    the scores and the rows' indices, both [q, min(k, n)]; minus infinity and −1 where fewer are below the ceiling.

    Raises `KinvecError` where a vector holds NaN or infinity, dimensions differ, or there are more rows or more ids.
    """
    tie_rank = rank_ids(ids)
    queries = _checked(queries, queries.shape[1], "query", 0)
    best = empty_best(len(queries), min(k, len(ids)))
    start = 0
    for block in _blocks(documents, queries.shape[1]):
        if start + len(block) > len(ids):
            raise KinvecError(f"there are more document vectors than the {len(ids):,} document ids; write them again")
        for q in range(0, len(queries), QUERY_ROWS):
            rows = slice(q, q + QUERY_ROWS)
            scores, error = queries[rows] @ block.T, _product_error(queries[rows], block)
            exact = partial(pair_scores, queries[rows], block)
            so_far = best[0][rows], best[1][rows]
            highest = None if ceilings is None else ceilings[rows, None]
            kept = keep_best(so_far, scores, start, tie_rank, error, exact, highest)
            best[0][rows], best[1][rows] = kept
        start += len(block)
    if start != len(ids):
        raise KinvecError(f"there are {start:,} document vectors but {len(ids):,} document ids; write them again")
    return best


def rank_ids(ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Each id's place when ids are sorted in descending order: the smaller rank wins a tie."""
    texts = list(ids)  # they may be lazy, and sorting asks for each
    descending = sorted(range(len(texts)), key=texts.__getitem__, reverse=True)
    rank = np.empty(len(ids), dtype=np.int64)
    rank[descending] = np.arange(len(ids))
    return rank


def empty_best(q: int, k: int) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """Scores of minus infinity and indices of −1: what `keep_best` starts from."""
    return np.full((q, k), -np.inf, dtype=np.float32), np.full((q, k), -1, dtype=np.int64)


Exact = Callable[[np.ndarray, np.ndarray], np.ndarray]


def keep_best(
    best: tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]],
    scores: Float32[np.ndarray, "q b"],
    start: int,
    tie_rank: Int64[np.ndarray, " n"],
    error: Float32[np.ndarray, "q 1"] | float = 0.0,
    exact: Exact | None = None,
    highest: Float32[np.ndarray, "q 1"] | None = None,
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """The best k of `best` and of the block `scores`, whose columns are the documents from row `start` on.

    Where `scores` may be off by `error`, `exact(rows, columns)` scores those that may be among the best. What scores
    above `highest` does not compete.
    """
    (q, k), b = best[0].shape, scores.shape[1]
    if k == 0 or b == 0:
        return best
    floor = best[0][:, -1:] - error  # below the k-th best so far none can enter; one that equals it may, by its id
    reaches = scores >= floor if highest is None else (scores >= floor) & (scores <= highest + error)
    if b > k and np.count_nonzero(reaches) > 4 * q * k:  # the first block; or documents sorted towards the queries
        surely = scores if highest is None else np.where(scores <= highest - error, scores, -np.inf)
        floor = np.maximum(floor, np.partition(surely, b - k, axis=1)[:, b - k, None] - 2 * error)
        reaches &= scores >= floor
    row, column = np.nonzero(reaches)
    found = scores[row, column] if exact is None else exact(row, column)
    if highest is not None:
        within = found <= highest[row, 0]
        row, column, found = row[within], column[within], found[within]
    rows = np.concatenate([np.repeat(np.arange(q), k), row])
    values = np.concatenate([best[0].ravel(), found])
    documents = np.concatenate([best[1].ravel(), start + column])
    order = np.lexsort((tie_rank[documents], -values, rows))
    per_row = np.bincount(rows, minlength=q)  # at least k, since the k so far always compete
    kept = order[(np.cumsum(per_row) - per_row)[:, None] + np.arange(k)]
    return values[kept], documents[kept]


def _product_error(queries: np.ndarray, block: np.ndarray) -> Float32[np.ndarray, "q 1"]:
    """Twice the bound on a float32 product's error, d · u · ‖query‖ · ‖document‖ (Higham 2002, eq. 3.5)."""
    longest = np.linalg.norm(block, axis=1).max(initial=0.0)
    bound = 2 * queries.shape[1] * np.finfo(np.float32).eps * longest * np.linalg.norm(queries, axis=1, keepdims=True)
    return bound.astype(np.float32)


def pair_scores(
    queries: np.ndarray, documents: np.ndarray, row: Int64[np.ndarray, " p"], column: Int64[np.ndarray, " p"]
) -> Float32[np.ndarray, " p"]:
    """Inner products of the pairs (query, document), in float64, rounded: as `top_k` scores them."""
    scores = np.empty(len(row), dtype=np.float32)
    for start in range(0, len(row), PAIR_ROWS):
        pairs = slice(start, start + PAIR_ROWS)
        scores[pairs] = np.einsum("pd,pd->p", queries[row[pairs]], documents[column[pairs]], dtype=np.float64)
    return scores


def _blocks(documents: Iterable[np.ndarray], dimension: int) -> Iterator[Float32[np.ndarray, "b d"]]:
    """Rows in blocks of at most `DOCUMENT_ROWS`, as contiguous float32 in memory."""
    seen = 0
    for shard in documents:
        for start in range(0, len(shard), DOCUMENT_ROWS):
            block = _checked(shard[start : start + DOCUMENT_ROWS], dimension, "document", seen)
            seen += len(block)
            yield block


def _checked(vectors: np.ndarray, dimension: int, what: str, first_row: int) -> Float32[np.ndarray, "b d"]:
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        shape = " × ".join(map(str, vectors.shape))
        raise KinvecError(f"{what} vectors are {shape}, not rows of {dimension} as the queries are; use one model")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise KinvecError(f"{what} vector {row:,} holds NaN or infinity; is the model broken? Try --precision fp32")
    return vectors
