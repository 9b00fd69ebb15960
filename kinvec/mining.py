"""Hard negatives: documents that a model ranks high for a query, and that nobody has judged relevant.

Candidates are the exact nearest documents (see `kinvec.topk`), with BM25's beside them if asked for. What is known to
be relevant never becomes a negative, by id or by text; what scores too near a positive is taken for a positive that
nobody judged, and is left out (the limits of NV-Retriever, Moreira et al. 2024) but kept for the audit.

Shapes: q = queries, n = documents, d = dimensions, k = candidates of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import psutil
import torch
from jaxtyping import Float, Float32, Int64
from pydantic import Field

from kinvec.config import Settings
from kinvec.console import progress, say
from kinvec.contracts import KinvecError, RetrievalData
from kinvec.distributed import CPU
from kinvec.files import text_keys
from kinvec.machine import forget, release_pages
from kinvec.tasks.lexical import rankings
from kinvec.topk import BEST_BYTES, CANDIDATE_BYTES, CROWD, FEW, QUERY_ROWS, Best, pair_scores, rank_ids, top_k

Judge = Callable[[str, Sequence[str]], np.ndarray]
TEXTS_AT_ONCE = 65_536
QUERIES_AT_ONCE = 32_768
BLOCK_BYTES = 256 * 2**20  # what a search holds however many queries there are: a block of documents, its scores


class MiningSettings(Settings):
    """Which documents become hard negatives."""

    negatives: int = Field(4, ge=1)
    """Hard negatives of a query, at most."""
    skip: int = Field(0, ge=0)
    """Ranks left out at the top, where unjudged positives are likeliest."""
    depth: int = Field(100, ge=1)
    """Ranks looked at below those, known positives not counted; where limits leave too few, deeper ones as well."""
    relative: float | None = Field(0.95, gt=0, le=1)
    """A negative scores at most this share of the query's lowest positive; unset, no such limit."""
    margin: float | None = Field(None, ge=0)
    """A negative scores at least this much below the query's lowest positive."""
    highest: float | None = None
    """A negative scores at most this."""
    lowest: float | None = None
    """A negative scores at least this."""
    draw: Literal["top", "random"] = "top"
    """Which of the candidates left: the first, or a random draw."""
    lexical: bool = False
    """Candidates of BM25 as well: those of both lists by the better of their two ranks."""
    seed: int = 42
    """Seed of the random draw."""


@dataclass(frozen=True)
class Mined:
    """A query's negatives, best first, as rows of the corpus; and what the audit counts.

    `sources` says for each negative whether the model, BM25 or both brought it. `suspected` candidates scored above the
    limits, and are perhaps positives; `suspect` is the row and score of the first of them.
    """

    query: int
    positives: list[int]
    positive_scores: list[float]
    negatives: list[int]
    scores: list[float]
    sources: list[str]
    suspected: int
    suspect: tuple[int, float] | None


@dataclass(frozen=True)
class Judged:
    """Of every query, as rows of the corpus: its positives, and all that can be no negatives of it."""

    positives: list[list[int]]
    barred: list[Int64[np.ndarray, " _"]]


def known(data: RetrievalData) -> Judged:
    """Positives of each query of `data.qrels`, and the documents that equal one of them, or the query, by text.

    Queries of the same text share their positives. Raises `KinvecError` where a positive is not in the corpus.
    """
    keys = np.concatenate(
        [text_keys(data.corpus.texts[at : at + TEXTS_AT_ONCE]) for at in range(0, len(data.corpus), TEXTS_AT_ONCE)]
    )
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    wanted = {doc for judged in data.qrels.values() for doc, grade in judged.items() if grade > 0}
    rows = {identity: row for row, identity in enumerate(data.corpus.ids) if identity in wanted}
    if missing := sorted(wanted - rows.keys()):
        raise KinvecError(f"document '{missing[0]}' is judged relevant but is not in the corpus; add it")
    asked = text_keys([data.queries[query] for query in data.qrels])
    positives = [[rows[doc] for doc, grade in judged.items() if grade > 0] for judged in data.qrels.values()]
    of_text: dict[int, set[int]] = {}
    for key, own in zip(asked.tolist(), positives, strict=True):
        of_text.setdefault(key, set()).update(own)

    def barred(key: int) -> Int64[np.ndarray, " _"]:
        texts = np.unique([key, *keys[sorted(of_text[key])]])
        first, last = (np.searchsorted(ordered, texts, side=side) for side in ("left", "right"))
        return np.unique(np.concatenate([order[a:b] for a, b in zip(first, last, strict=True)]))

    return Judged(positives, [barred(key) for key in asked.tolist()])


def deepest_rank(judged: Judged, settings: MiningSettings) -> int:
    """Ranks that are searched for a query, at most: those looked at, and as many as there may be barred among them."""
    return settings.skip + settings.depth + max(map(len, judged.barred), default=0)


def queries_at_once(memory: int, dimension: int, depth: int) -> int:
    """How many queries are searched for at a time so that this process stays within `memory` bytes.

    Where that cannot be, because so much is held already, it is said, and as few are searched for as one block takes.
    """
    release_pages()
    query = 6 * dimension + max(depth, FEW) * (
        2 * CROWD * CANDIDATE_BYTES + 3 * BEST_BYTES
    )  # twice: joined when thinned
    process = psutil.Process().memory_info()
    held = process.rss - process.shared
    free = memory - held - BLOCK_BYTES
    if free < query * QUERY_ROWS:
        least = (held + BLOCK_BYTES + query * QUERY_ROWS) / 2**30
        say(f"warning: --memory is {memory / 2**30:.1f} GiB, and this search takes {least:.1f} GiB all the same")
    return max(QUERY_ROWS, min(QUERIES_AT_ONCE, free // query))


def mine(
    data: RetrievalData, judged: Judged, queries: Float[np.ndarray, "q d"], shards: Sequence[np.ndarray],
    settings: MiningSettings, judge: Judge | None = None, at_once: int = QUERIES_AT_ONCE, device: torch.device = CPU,
) -> Iterator[Mined]:  # fmt: skip
    """Negatives of the queries of `data.qrels`, in their order, with vectors of them and of the corpus [_, d].

    Every query has a positive. With `judge`, a cross-encoder, the limits are on its scores of candidates and positives;
    the order stays that of the search. The corpus is read once for every `at_once` queries; memory grows with neither.
    """
    texts, deepest = [data.queries[query] for query in data.qrels], deepest_rank(judged, settings)
    search = partial(_search, shards=shards, ranks=rank_ids(data.corpus.ids), device=device)
    for start in range(0, len(queries), at_once):
        group = range(start, min(start + at_once, len(queries)))
        vectors = np.ascontiguousarray(queries[group.start : group.stop], dtype=np.float32)

        def score(query: int, rows: Sequence[int], vectors: np.ndarray = vectors, first: int = start) -> np.ndarray:
            if judge is not None:
                return judge(texts[query], [data.corpus.texts[row] for row in rows])
            return _scores(vectors[query - first], rows, shards)

        dense = search(vectors, depth=deepest)
        lexical = np.full((len(group), 0), -1, dtype=np.int64)
        if settings.lexical:
            lexical = rankings(texts[group.start : group.stop], data.corpus, deepest)[1]
        found = [
            _chosen(query, judged, partial(score, query), dense[1][place], lexical[place], settings)
            for place, query in enumerate(group)
        ]
        yield from found if judge else _filled(found, judged, vectors, search, settings)


def _filled(
    found: list[Mined], judged: Judged, vectors: Float32[np.ndarray, "q d"], search: Callable[..., Best],
    settings: MiningSettings,
) -> list[Mined]:  # fmt: skip
    """Where limits have left too few, the nearest documents below them, however deep: a second search for those."""
    few = [place for place, mined in enumerate(found) if mined.suspected and len(mined.negatives) < settings.negatives]
    if not few:
        return found
    ceilings = np.array([ceiling(min(found[place].positive_scores), settings) for place in few], dtype=np.float32)
    deepest = settings.negatives + max(len(judged.barred[found[place].query]) for place in few)
    scores, rows = search(vectors[few], depth=deepest, ceilings=ceilings)
    for place, own, near in zip(few, scores, rows, strict=True):
        free = (near >= 0) & ~np.isin(near, [*judged.barred[found[place].query], *found[place].negatives])
        more = np.flatnonzero(free & (own >= _floor(settings)))[: settings.negatives - len(found[place].negatives)]
        found[place] = replace(
            found[place],
            negatives=found[place].negatives + near[more].tolist(),
            scores=found[place].scores + own[more].tolist(),
            sources=found[place].sources + ["model"] * len(more),
        )
    return found


def _search(
    vectors: Float32[np.ndarray, "q d"], shards: Sequence[np.ndarray], ranks: Int64[np.ndarray, " n"],
    device: torch.device, depth: int, ceilings: Float32[np.ndarray, " q"] | None = None,
) -> Best:  # fmt: skip
    what = "searching" if ceilings is None else "searching below the limits"
    with progress(f"{what} for {len(vectors):,} queries", len(ranks)) as bar:

        def told(rows: int) -> None:
            bar.advance(rows)
            release_pages()  # an embedder keeps what it frees (see `machine.keep_pages`), and blocks are large

        return top_k(vectors, shards, ranks, depth, ceilings, told, device)


def _chosen(
    query: int, judged: Judged, score: Callable[[Sequence[int]], np.ndarray], dense: Int64[np.ndarray, " k"],
    lexical: Int64[np.ndarray, " l"], settings: MiningSettings,
) -> Mined:  # fmt: skip
    """The query's negatives among the candidates of both lists."""
    window = slice(settings.skip, settings.skip + settings.depth)
    near, words = (_free(rows, judged.barred[query])[window] for rows in (dense, lexical))
    rows, sources = _merged(near, words)
    own, values = score(judged.positives[query]), score(rows.tolist())
    above = values > ceiling(float(own.min()), settings)
    left = np.flatnonzero(~above & (values >= _floor(settings)))
    if settings.draw == "random" and len(left) > settings.negatives:
        draw = np.random.default_rng([settings.seed, query])
        left = np.sort(draw.choice(left, settings.negatives, replace=False))
    left = left[: settings.negatives]
    worst = int(np.argmax(values)) if above.any() else None
    return Mined(
        query, judged.positives[query], own.tolist(), rows[left].tolist(), values[left].tolist(),
        [sources[place] for place in left.tolist()], int(above.sum()),
        None if worst is None else (int(rows[worst]), float(values[worst])),
    )  # fmt: skip


def _floor(settings: MiningSettings) -> float:
    return -np.inf if settings.lowest is None else settings.lowest


def ceiling(positive: float, settings: MiningSettings) -> float:
    """The highest score of a negative, given that of the query's lowest positive."""
    limits = [np.inf]
    if settings.relative is not None:
        limits.append(positive - (1 - settings.relative) * abs(positive))  # below it, where it is negative, too
    if settings.margin is not None:
        limits.append(positive - settings.margin)
    if settings.highest is not None:
        limits.append(settings.highest)
    return float(np.float32(min(limits)))  # scores are float32


def _free(rows: Int64[np.ndarray, " k"], barred: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " _"]:
    return rows[(rows >= 0) & ~np.isin(rows, barred)]


def _merged(near: Int64[np.ndarray, " a"], words: Int64[np.ndarray, " b"]) -> tuple[Int64[np.ndarray, " c"], list[str]]:
    """The rows of both lists by their better rank, the model's first where it is equal; and who brought each."""
    ranks: dict[int, tuple[int, int]] = {}
    for side, rows in enumerate((near.tolist(), words.tolist())):
        for rank, row in enumerate(rows):
            ranks[row] = min(ranks.get(row, (rank, side)), (rank, side))
    both = set(near.tolist()) & set(words.tolist())
    merged = sorted(ranks, key=ranks.__getitem__)
    of_model = set(near.tolist())
    sources = ["both" if row in both else "model" if row in of_model else "BM25" for row in merged]
    return np.array(merged, dtype=np.int64), sources


def _scores(
    vector: Float32[np.ndarray, " d"], rows: Sequence[int], shards: Sequence[np.ndarray]
) -> Float32[np.ndarray, " r"]:
    """The query's score with each row, as a search has it."""
    places = np.arange(len(rows))
    return pair_scores(vector[None], take(shards, np.asarray(rows, dtype=np.int64)), np.zeros_like(places), places)


def take(shards: Sequence[np.ndarray], rows: Int64[np.ndarray, " r"]) -> Float32[np.ndarray, "r d"]:
    """Rows of the matrix that lies in shards [_, d]."""
    ends = np.cumsum([len(shard) for shard in shards])
    found = np.empty((len(rows), shards[0].shape[1]), dtype=np.float32)
    of = np.searchsorted(ends, rows, side="right")
    for number in np.unique(of).tolist():
        here = of == number
        found[here] = shards[number][rows[here] - (ends[number] - len(shards[number]))]
        forget(shards[number])
    return found
