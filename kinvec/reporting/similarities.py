"""How near queries are to what is relevant, and to the best of what is not: histograms before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from kinvec.contracts import Result
from kinvec.reporting.rendering import axis

BINS = 40
COLUMNS = ("top_ids", "top_scores", "judged_ids", "judged_scores", "judged_similarities")


def similarities(measured: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """Of each search with the scores of its judged documents: a histogram for each result, on one axis for all."""
    return [found for results in measured if (found := _histograms(results))]


def _histograms(results: Sequence[Result]) -> dict[str, Any] | None:
    if not all(name in result.per_query for result in results for name in COLUMNS):
        return None
    sides = [_scores(result) for result in results]
    together = np.concatenate([values for side in sides for values in side])
    if not len(together) or not all(len(values) for side in sides for values in side):
        return None
    edges = np.histogram_bin_edges(together, BINS)
    drawn = [_side(*side, edges) for side in sides]
    return {
        "name": results[0].task,
        "axis": axis(edges.tolist(), tight=True),
        "highest": max(max(*side["positives"], *side["negatives"]) for side in drawn),
        "sides": [{"title": title} | side for title, side in zip(("Before", "After"), drawn, strict=False)],
    }


def _scores(result: Result) -> tuple[Float64[np.ndarray, " p"], Float64[np.ndarray, " q"]]:
    """Scores of all relevant documents, and of each query's best document that is not known to be relevant."""
    rows = result.per_query
    positives, negatives = [], []
    for ids, scores, judged, grades, near in zip(*(rows[name] for name in COLUMNS), strict=True):
        relevant = {document for document, grade in zip(judged, grades, strict=True) if grade > 0}
        found = zip(grades, near, strict=True)
        positives += [score for grade, score in found if grade > 0 and score is not None]
        negatives += [s for document, s in zip(ids, scores, strict=True) if document not in relevant][:1]
    return np.array(positives, dtype=np.float64), np.array(negatives, dtype=np.float64)


def _side(
    positives: Float64[np.ndarray, " p"], negatives: Float64[np.ndarray, " q"], edges: Float64[np.ndarray, " e"]
) -> dict[str, Any]:
    """Shares of the bins; and how often a positive is above a negative, of all pairs: the area under the ROC curve."""
    shares = {
        name: (np.histogram(values, edges)[0] / len(values)).tolist()
        for name, values in (("positives", positives), ("negatives", negatives))
    }
    below = np.searchsorted(np.sort(negatives), positives, side="left")
    level = np.searchsorted(np.sort(negatives), positives, side="right") - below
    return {
        **shares,
        "edges": edges.tolist(),
        "means": {"positives": float(positives.mean()), "negatives": float(negatives.mean())},
        "apart": float((below + level / 2).mean() / len(negatives)),
    }
