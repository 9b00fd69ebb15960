"""Cheaper vectors: what fewer dimensions and fewer bits for each cost in quality, from vectors that are there already.

Every choice of dimensions and precision is a search of its own over the whole corpus, exact as all are here: vectors
are cut, scaled to length 1 again where the similarity is the cosine, stored as `kinvec.quantising` does, and searched
as they are stored. Shapes: q = queries, k = results, c = candidates, m = dimensions kept, b = rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, Float32, Int64

from kinvec import metrics
from kinvec.console import progress
from kinvec.contracts import Encoder, Problem, Qrels, RecipeError, Result, RetrievalData
from kinvec.quantising import PRECISIONS, Precision, Ranges, ranges_of
from kinvec.tasks.evaluation import ENCODE_ROWS, retrieval, scaling
from kinvec.tasks.rankings import MEASURES
from kinvec.tasks.statistics import statistic
from kinvec.tasks.triplets import chosen
from kinvec.topk import pair_scores, rank_ids, top_k

OVERSAMPLING = 4  # candidates for each result where they are scored again (Yamada et al. 2021 and later practice)
HALVINGS, FEWEST = 3, 8  # unless dimensions are named: all, a half, a quarter, an eighth; not below so many
DOCUMENTS, PAIRS = 100_000, 100_000_000  # of a search that is small enough to do it unasked: vectors held, scores

Side = tuple[Sequence[str], Sequence[np.ndarray]]
"""Ids, and the shards [_, d] of their vectors, in the same order."""


class Recording:
    """An encoder that keeps what it encoded of a search, for a second look: float32 vectors in memory."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name = encoder, encoder.name
        self.queries: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        self.queries.append(self.encoder.encode_queries(texts))
        return self.queries[-1]

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        self.documents.append(self.encoder.encode_documents(texts))
        return self.documents[-1]


def with_cheaper(
    data: RetrievalData, encoder: Encoder, measures: Sequence[str] = (), dimensions: Sequence[int] = ()
) -> Result:
    """As `retrieval`, with `cheaper` of the same vectors, which are held in memory meanwhile."""
    heard = Recording(encoder)
    result = retrieval(data, heard, measures)
    ids = list(data.corpus.ids)  # every search looks up its results' ids, which are slow to find in Arrow
    vectors = (list(data.qrels), heard.queries), (ids, heard.documents)
    similarity = getattr(encoder, "similarity", "cosine")
    dimensions = dimensions or trained_dimensions(encoder)
    result.cheaper = cheaper(data.qrels, *vectors, measures, similarity=similarity, dimensions=dimensions)
    return result


def small_enough(data: Problem, measures: Sequence[str] = ()) -> TypeGuard[RetrievalData]:
    """Whether `with_cheaper` can be done, at little cost: by rankings, of `DOCUMENTS` and `PAIRS` at most."""
    return (
        isinstance(data, RetrievalData)
        and data.kind == "retrieval"
        and bool(chosen(data.qrels, measures, MEASURES)[0])
        and len(data.corpus) <= DOCUMENTS
        and len(data.corpus) * len(data.qrels) <= PAIRS
    )


def trained_dimensions(encoder: Encoder) -> list[int]:
    """The Matryoshka dimensions that the encoder says it was trained with; none where it says nothing."""
    stages = getattr(encoder, "lineage", [])
    return list(stages[-1].get("recipe", {}).get("objective", {}).get("dimensions") or []) if stages else []


@dataclass(frozen=True)
class _Space:
    """The vectors of a search; `queries` are in the order of the judgements."""

    queries: Float32[np.ndarray, "q d"]
    documents: Sequence[np.ndarray]
    ids: Sequence[str]
    ranks: Int64[np.ndarray, " n"]
    similarity: str

    def asked(self, m: int) -> Float32[np.ndarray, "q m"]:
        return scaling(self.similarity)(self.queries[:, :m])

    def blocks(self, m: int) -> Iterator[Float32[np.ndarray, "b m"]]:
        for shard in self.documents:
            for start in range(0, len(shard), ENCODE_ROWS):
                yield scaling(self.similarity)(shard[start : start + ENCODE_ROWS, :m])


def cheaper(
    qrels: Qrels, queries: Side, documents: Side, measures: Sequence[str] = (), *, similarity: str = "dot",
    dimensions: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Every choice of dimensions and precision, measured on a search whose vectors are there.

    Gives `measure` (the first), `oversampling`, and `rows` from most to fewest dimensions, float32 to binary: each has
    `dimensions`, `precision`, `rescored`, `bytes` of a stored vector, `metrics`, and of the first measure `interval`
    (95 %), `difference` to full vectors (`value`, `low`, `high`, paired) and the share `kept`
    (None of nothing). Rescored means: the first `OVERSAMPLING` × k by stored queries are put in order by full queries
    against the stored documents; nothing more is stored for it. Memory is that of a block, whatever the shards.
    Raises `RecipeError` for dimensions that the vectors have not, and without a measure of rankings.
    """
    names = [str(measure) for measure in metrics.parse_measures(chosen(qrels, measures, MEASURES)[0])]
    if not names:
        raise RecipeError("cheaper vectors are measured by rankings; name a measure such as nDCG@10")
    place = {identity: row for row, identity in enumerate(queries[0])}
    whole = np.concatenate([np.asarray(part, dtype=np.float32) for part in queries[1]])
    asked = whole[[place[query] for query in qrels]]
    space = _Space(asked, documents[1], documents[0], rank_ids(documents[0]), similarity)
    tried = _dimensions(whole.shape[1], dimensions)
    depth, rows, full = metrics.search_depth(names), list[dict[str, Any]](), None
    with progress("cheaper vectors", len(tried) * len(PRECISIONS)) as bar:
        for m in tried:
            ranges = ranges_of(space.blocks(m))
            for precision, how in PRECISIONS.items():
                said = {"dimensions": m, "precision": precision, "bytes": how.bytes(m)}
                for rescored, best in enumerate(_rankings(space, ranges, how, depth)):
                    named = ([space.ids[row] for row in of_query] for of_query in best.tolist())
                    values = metrics.retrieval(names, qrels, dict(zip(qrels, named, strict=True)))
                    full = values[names[0]] if full is None else full
                    rows.append(said | {"rescored": bool(rescored)} | _figures(values, full))
                bar.advance()
    return {"measure": names[0], "oversampling": OVERSAMPLING, "rows": rows}


def _dimensions(d: int, named: Sequence[int]) -> list[int]:
    """All dimensions, then those named or the halvings, from most to fewest."""
    if wrong := next((m for m in named if not 0 < m <= d), None):
        raise RecipeError(f"the vectors have {d} dimensions; their first {wrong} cannot be taken")
    halved = [d >> times for times in range(1, HALVINGS + 1) if d >> times >= FEWEST]
    return sorted({d, *(named or halved)}, reverse=True)


def _rankings(space: _Space, ranges: Ranges, how: Precision, k: int) -> Iterator[Int64[np.ndarray, "q k"]]:
    """Rows of the k best documents by stored vectors; of a coarse precision once more, rescored."""
    m, k = ranges.shape[1], min(k, len(space.ids))

    def stored(vectors: Float32[np.ndarray, "n m"]) -> Float32[np.ndarray, "n m"]:
        return how.restore(how.store(vectors, ranges), ranges)

    def documents() -> Iterator[Float32[np.ndarray, "b m"]]:
        return map(stored, space.blocks(m))

    asked = space.asked(m)
    _, rows = top_k(stored(asked), documents(), space.ranks, k * OVERSAMPLING if how.coarse else k)
    yield rows[:, :k]
    if how.coarse:
        yield _rescored(asked, documents(), rows, space.ranks)[:, :k]


def _rescored(
    queries: Float32[np.ndarray, "q m"], documents: Iterator[np.ndarray], rows: Int64[np.ndarray, "q c"],
    ranks: Int64[np.ndarray, " n"],
) -> Int64[np.ndarray, "q c"]:  # fmt: skip
    """The candidates `rows` of every query in the order of their products with it, ties as `top_k` has them."""
    scores, start = np.empty(rows.shape, dtype=np.float32), 0
    for block in documents:
        query, place = np.nonzero((rows >= start) & (rows < start + len(block)))
        scores[query, place] = pair_scores(queries, block, query, rows[query, place] - start)
        start += len(block)
    return np.take_along_axis(rows, np.lexsort((ranks[rows], -scores)), axis=1)


def _figures(values: dict[str, np.ndarray], full: np.ndarray) -> dict[str, Any]:
    """Means of all measures; of the first its interval, its difference to full vectors, and the share that is kept."""
    first = next(iter(values))
    low, high = metrics.mean_interval(values[first] - full)
    value, whole = metrics.mean(values[first]), metrics.mean(full)
    return {
        "metrics": {name: metrics.mean(column) for name, column in values.items()},
        "interval": list(statistic(first).interval(values)),
        "difference": {"value": value - whole, "low": low, "high": high},
        "kept": value / whole if whole else None,
    }
