"""A metric's name → its interval, the paired test of two results, and what each query or text adds to it.

Most metrics are means over queries; those in `WHOLE_SET` (correlations, pair classification, v-measure) are recomputed
on every resample.
Shapes: n = queries, pairs or texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.stats import rankdata

from kinvec import metrics
from kinvec.contracts import KinvecError

Rows = Mapping[str, list[Any] | np.ndarray]


class Statistic(NamedTuple):
    """`value`: of all rows. `each`: a value a row, higher is better, NaN for none. `interval`: 95 %.
    `difference`: of B − A, with p-value.
    """

    value: Callable[[Rows], float]
    each: Callable[[Rows], Float64[np.ndarray, " n"]]
    interval: Callable[[Rows], tuple[float, float]]
    difference: Callable[[Rows, Rows, int], tuple[tuple[float, float], float]]


def statistic(name: str) -> Statistic:
    """That of a metric; a metric that is not in `WHOLE_SET` is the mean of its column."""
    return WHOLE_SET[name] if name in WHOLE_SET else _mean(name)


def _mean(name: str) -> Statistic:
    def each(rows: Rows) -> Float64[np.ndarray, " n"]:
        return np.array(rows[name], dtype=np.float64)

    def difference(a: Rows, b: Rows, seed: int) -> tuple[tuple[float, float], float]:
        change = _known(each(b) - each(a))
        return metrics.mean_interval(change), metrics.randomisation_p(change, seed)

    def interval(rows: Rows) -> tuple[float, float]:
        values = _known(each(rows))
        low, high = metrics.mean_interval(values)
        shares = bool(((values >= 0) & (values <= 1)).all())  # whose mean is never beyond
        return (max(low, 0.0), min(high, 1.0)) if shares else (low, high)

    return Statistic(lambda rows: metrics.mean(_known(each(rows))), each, interval, difference)


def _known(values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " m"]:
    """Without the queries that have no value, as one without negatives has no margin."""
    return values[~np.isnan(values)]


def _correlation(name: str) -> Statistic:
    correlation = {"spearman_cosine": metrics.spearman, "pearson_cosine": metrics.pearson}[name]

    def value(rows: Rows) -> float:
        return correlation(np.asarray(rows["score"], np.float64), np.asarray(rows["cosine"], np.float64))

    def each(rows: Rows) -> Float64[np.ndarray, " n"]:
        """A pair's agreement: 1 − |rank of the cosine − rank of the score| as a share of all pairs."""
        return 1 - np.abs(rankdata(rows["cosine"]) - rankdata(rows["score"])) / len(rows["score"])

    def interval(rows: Rows) -> tuple[float, float]:
        gold, cosine = (np.array(rows[column], np.float64) for column in ("score", "cosine"))
        return metrics.bootstrap_correlation(name, gold, np.zeros(len(gold)), cosine)

    def difference(a: Rows, b: Rows, seed: int) -> tuple[tuple[float, float], float]:
        gold, x, y = (np.array(column, np.float64) for column in (a["score"], a["cosine"], b["cosine"]))
        found = metrics.bootstrap_correlation(name, gold, x, y, seed)
        return found, metrics.randomisation_correlation(name, gold, x, y, seed)

    return Statistic(value, each, interval, difference)


def labels_of(rows: Rows) -> Bool[np.ndarray, " n"]:
    """Which pairs belong together."""
    return np.asarray(rows["score"], np.float64) > 0.5


def _told_apart(name: str, columns: Sequence[str]) -> Statistic:
    def scores(rows: Rows) -> Float64[np.ndarray, "s n"]:
        return np.array([rows[column] for column in columns], np.float64)

    def value(rows: Rows) -> float:
        return metrics.told_apart(name, labels_of(rows), scores(rows))

    def each(rows: Rows) -> Float64[np.ndarray, " n"]:
        """Whether the pair is on the right side of the threshold; of average precision the share of pairs it is."""
        labels, first = labels_of(rows), scores(rows)[0]
        if name == "ap":
            return metrics.right_side(labels, first)
        return ((first >= metrics.best_threshold(name, labels, first)) == labels).astype(np.float64)

    def interval(rows: Rows) -> tuple[float, float]:
        return metrics.bootstrap_told_apart(name, labels_of(rows), None, scores(rows))

    def difference(a: Rows, b: Rows, seed: int) -> tuple[tuple[float, float], float]:
        labels, x, y = labels_of(a), scores(a), scores(b)
        found = metrics.bootstrap_told_apart(name, labels, x, y, seed)
        return found, metrics.randomisation_told_apart(name, labels, x, y, seed)

    return Statistic(value, each, interval, difference)


def _clusters() -> Statistic:
    def columns(rows: Rows) -> tuple[np.ndarray, Int64[np.ndarray, "e n"], Int64[np.ndarray, "e n"]]:
        if "clusters" not in rows:
            raise KinvecError("this v_measure is an older version's, of a single clustering; evaluate again")
        clusters, draws = (np.array([*rows[name]], np.int64).T for name in ("clusters", "draws"))
        return np.array(rows["label"]), clusters, draws

    def value(rows: Rows) -> float:
        return metrics.v_measure(*columns(rows))

    def each(rows: Rows) -> Float64[np.ndarray, " n"]:
        return metrics.cluster_purity(*columns(rows))

    def interval(rows: Rows) -> tuple[float, float]:
        labels, clusters, draws = columns(rows)
        return metrics.bootstrap_v_measure(labels, None, clusters, draws)

    def difference(a: Rows, b: Rows, seed: int) -> tuple[tuple[float, float], float]:
        (labels, x, draws), (_, y, _) = columns(a), columns(b)
        found = metrics.bootstrap_v_measure(labels, x, y, draws, seed)
        return found, metrics.randomisation_v_measure(labels, x, y, draws, seed)

    return Statistic(value, each, interval, difference)


TOLD_APART: dict[str, tuple[str, tuple[str, ...]]] = {
    "ap_cosine": ("ap", ("cosine",)), "accuracy_cosine": ("accuracy", ("cosine",)), "f1_cosine": ("f1", ("cosine",)),
    "ap_dot": ("ap", ("dot",)), "ap_euclidean": ("ap", ("euclidean",)), "ap_manhattan": ("ap", ("manhattan",)),
    "ap_max": ("ap", ("cosine", "dot", "euclidean", "manhattan")),
}  # fmt: skip
"""Measure of pair classification → what of `metrics.told_apart` it is, and by which columns of similarities."""

WHOLE_SET: dict[str, Statistic] = (
    {name: _correlation(name) for name in metrics.CORRELATIONS}
    | {name: _told_apart(*what) for name, what in TOLD_APART.items()}
    | {"v_measure": _clusters()}
)
