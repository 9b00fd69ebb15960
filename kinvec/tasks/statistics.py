"""A metric's name → its interval, the paired test of two results, and what each query or text adds to it.

Most metrics are means over queries; those in `WHOLE_SET` (correlations, v-measure) are recomputed on every resample.
Shapes: n = queries, pairs or texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

from kinvec import metrics

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
        return metrics.bootstrap_mean(change, seed), metrics.randomisation_p(change, seed)

    return Statistic(
        lambda rows: metrics.mean(_known(each(rows))), each,
        lambda rows: metrics.bootstrap_mean(_known(each(rows))), difference,
    )  # fmt: skip


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


def _clusters() -> Statistic:
    def value(rows: Rows) -> float:
        return metrics.v_measure(np.array(rows["label"]), np.array(rows["cluster"]))

    def each(rows: Rows) -> Float64[np.ndarray, " n"]:
        return metrics.cluster_purity(np.array(rows["label"]), np.array(rows["cluster"]))

    def interval(rows: Rows) -> tuple[float, float]:
        return metrics.bootstrap_v_measure(np.array(rows["label"]), None, np.array(rows["cluster"]))

    def difference(a: Rows, b: Rows, seed: int) -> tuple[tuple[float, float], float]:
        labels, x, y = (np.array(column) for column in (a["label"], a["cluster"], b["cluster"]))
        found = metrics.bootstrap_v_measure(labels, x, y, seed)
        return found, metrics.randomisation_v_measure(labels, x, y, seed)

    return Statistic(value, each, interval, difference)


WHOLE_SET: dict[str, Statistic] = {name: _correlation(name) for name in metrics.CORRELATIONS} | {
    "v_measure": _clusters()
}
