"""Pair classification: two texts and whether they belong together; how well their similarity tells.

Shapes: n = pairs, d = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from kinvec import metrics
from kinvec.contracts import Encoder, KinvecError, PairData, RecipeError, Result
from kinvec.tasks.evaluation import describe, finite, unit
from kinvec.tasks.rankings import timed
from kinvec.tasks.statistics import TOLD_APART, labels_of, statistic

DEFAULT = ("ap_cosine", "accuracy_cosine", "f1_cosine")

Vectors = Float32[np.ndarray, "n d"]


def pair_classification(data: PairData, encoder: Encoder, measures: Sequence[str] = ()) -> Result:
    """Average precision, and accuracy and F1 at the best threshold, of the pairs' cosines against their labels.

    The higher of the two scores is the positive label, kept as 1. `measures` are keys of `TOLD_APART`, `DEFAULT` unless
    named; the thresholds are in `thresholds`, and every pair keeps its similarities. Both sides are encoded as queries,
    as for similarity. Raises `KinvecError` for data without two labels, `RecipeError` for an unknown measure.
    """
    names = tuple(measures) or DEFAULT
    if unknown := next((name for name in names if name not in TOLD_APART), None):
        raise RecipeError(f"unknown measure '{unknown}' of pair classification; there are {', '.join(TOLD_APART)}")
    if (found := len(set(data.scores))) != 2:
        raise KinvecError(f"{data.name}: pair classification needs two labels, such as 0 and 1, and there are {found}")
    seconds: dict[str, float] = {}
    n = len(data.scores)
    with timed(seconds, "encode"):
        vectors = finite(encoder, np.asarray(encoder.encode_queries([*data.first, *data.second]), dtype=np.float32))
    needed = dict.fromkeys(["cosine", *(column for name in names for column in TOLD_APART[name][1])])
    columns: dict[str, list[Any]] = {
        "id": [str(i) for i in range(n)],
        "query": list(data.first),
        "second": list(data.second),
        "score": (np.array(list(data.scores)) == max(data.scores)).astype(float).tolist(),
        **{name: SIMILARITIES[name](vectors[:n], vectors[n:]).tolist() for name in needed},
    }
    values = {name: statistic(name).value(columns) for name in names}
    result = Result(data.name or "pairs", data.kind, data.split, "", values, columns, data.fingerprint)
    result.thresholds = {name: _threshold(name, columns) for name in names if TOLD_APART[name][0] != "ap"}
    describe(result, encoder)
    result.timing = seconds
    return result


def _threshold(name: str, columns: dict[str, list[Any]]) -> float:
    what, (column,) = TOLD_APART[name]
    return metrics.best_threshold(what, labels_of(columns), np.array(columns[column]))


def _cosine(a: Vectors, b: Vectors) -> Float64[np.ndarray, " n"]:
    return _dot(unit(a), unit(b))


def _dot(a: Vectors, b: Vectors) -> Float64[np.ndarray, " n"]:
    products: np.ndarray = np.einsum("nd,nd->n", a, b, dtype=np.float64)
    return products


def _minus_norm(order: int) -> Callable[[Vectors, Vectors], Float64[np.ndarray, " n"]]:
    return lambda a, b: -np.linalg.norm(a.astype(np.float64) - b, ord=order, axis=1)


SIMILARITIES: dict[str, Callable[[Vectors, Vectors], Float64[np.ndarray, " n"]]] = {
    "cosine": _cosine, "dot": _dot, "euclidean": _minus_norm(2), "manhattan": _minus_norm(1),
}  # fmt: skip
"""Of each pair; the distances are negative, so that more is more alike."""
