"""BM25, the lexical baseline beside every retrieval result.

Shapes: q = queries, n = documents, k = results kept for each query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int64

from kinvec.console import progress
from kinvec.contracts import Corpus, Result, RetrievalData
from kinvec.tasks.rankings import MEASURES, check_problem, from_rankings, search_depth, timed, versions
from kinvec.topk import empty_best, keep_best, rank_ids

SHOW_PROGRESS = 50_000  # documents from which on indexing takes long enough to be shown

_RESULTS: dict[tuple[str, tuple[str, ...]], Result] = {}  # data fingerprint, measures → result, for this process


def bm25(data: RetrievalData, measures: Sequence[str] = MEASURES) -> Result:
    """The lexical baseline: BM25 as Lucene has it (k1 1.5, b 0.75), English stemmer and stop words (bm25s, PyStemmer).

    Documents that share no word with the query are no results. Made once per data and measures in a process.
    """
    key = (data.fingerprint, tuple(measures))
    if key not in _RESULTS:
        check_problem(data)
        seconds: dict[str, float] = {}
        with timed(seconds, "search"):
            best = rankings([data.queries[query] for query in data.qrels], data.corpus, search_depth(measures))
        result = from_rankings(data, *best, measures)
        result.model, result.timing, result.versions = "BM25", seconds, versions()
        _RESULTS[key] = result
    return _RESULTS[key]


def rankings(
    queries: Sequence[str], corpus: Corpus, k: int
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """BM25 scores and rows of the corpus for each query, best first; minus infinity and −1 where there are fewer."""
    k = min(k, len(corpus))
    best_scores, best_rows = empty_best(len(queries), k)
    tie_rank = rank_ids(corpus.ids)
    for i, found in enumerate(each_query(queries, corpus)):
        if found is not None:
            scores = np.where(found > 0, found, -np.inf)[None]
            best_scores[i], best_rows[i] = (kept[0] for kept in keep_best(empty_best(1, k), scores, 0, tie_rank))
    best_rows[np.isneginf(best_scores)] = -1
    return best_scores, best_rows


def each_query(queries: Sequence[str], corpus: Corpus) -> Iterator[Float32[np.ndarray, " n"] | None]:
    """BM25 scores of all documents for each query; 0 for one without a common word, None where none can have one."""
    import bm25s
    import Stemmer  # type: ignore[import-not-found]  # a C extension without stubs

    tokenizer = bm25s.tokenization.Tokenizer(stopwords="en", stemmer=Stemmer.Stemmer("english"))
    slow = len(corpus) > SHOW_PROGRESS
    words = tokenizer.tokenize(corpus.texts, update_vocab=True, show_progress=slow, allow_empty=False)
    if not any(words):  # not one word in all documents: nothing can be found, and bm25s cannot index it
        yield from (None for _ in queries)
        return
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index((words, tokenizer.get_vocab_dict()), show_progress=slow)
    asked = tokenizer.tokenize(list(queries), update_vocab=False, show_progress=False, allow_empty=False)
    with progress("BM25", len(asked)) as bar:
        for query in asked:
            bar.advance()
            yield index.get_scores(query).astype(np.float32) if query else None
