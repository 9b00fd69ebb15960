"""v-measure, a statistic over a whole set of texts, recomputed on every resample.

Shapes: n = texts, r = resamples drawn at a time, l = labels, c = clusters.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Shaped
from scipy.optimize import linear_sum_assignment

from kinvec.metrics.resampling import RESAMPLES, draw_items, draw_swaps, interval, p_value


def v_measure(labels: Shaped[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"]) -> float:
    """Rosenberg and Hirschberg 2007: the harmonic mean of homogeneity and completeness; 1 where nothing is divided."""
    return float(_v_measures(_Tables(labels, clusters).of(np.arange(len(labels))[None]))[0])


def bootstrap_v_measure(
    labels: Shaped[np.ndarray, " n"], a: Shaped[np.ndarray, " n"] | None, b: Shaped[np.ndarray, " n"],
    seed: int = 0, resamples: int = RESAMPLES,
) -> tuple[float, float]:  # fmt: skip
    """The 95 % interval of v_measure(b) − v_measure(a), resampling texts with both clusters; of v_measure(b) alone.

    The clusterings are given and not made anew: the interval says how far other texts might move the figure.
    """
    after, before = _Tables(labels, b), None if a is None else _Tables(labels, a)
    found = []
    for drawn in draw_items(len(labels), seed, resamples, after.cells):
        values = _v_measures(after.of(drawn))
        found.append(values if before is None else values - _v_measures(before.of(drawn)))
    return interval(np.concatenate(found))


def randomisation_v_measure(
    labels: Shaped[np.ndarray, " n"], a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"],
    seed: int = 0, resamples: int = RESAMPLES,
) -> float:  # fmt: skip
    """Two-sided p-value of "neither clusters better": each text's two clusters change sides by chance.

    Clusters are first named by the labels they match best, one each (Kuhn 1955), since two models' numbers mean nothing
    to each other; that leaves the observed values unchanged.
    """
    names = np.unique(labels, return_inverse=True)[1]
    x, y = (_matched(names, np.unique(clusters, return_inverse=True)[1]) for clusters in (a, b))
    width = int(max(x.max(), y.max())) + 1
    table = _Tables(names, np.array([width - 1]), width)
    items = np.arange(len(names))
    observed = float((_v_measures(table.of(items[None], y[None])) - _v_measures(table.of(items[None], x[None])))[0])
    found = []
    for swaps in draw_swaps(len(names), seed, resamples, table.cells):
        mixed, rest = np.where(swaps > 0, x, y), np.where(swaps > 0, y, x)
        every = np.broadcast_to(items, mixed.shape)
        found.append(_v_measures(table.of(every, mixed)) - _v_measures(table.of(every, rest)))
    return p_value(np.concatenate(found), observed)


def cluster_purity(labels: Shaped[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """For each text the share of its cluster that has its label (the precision of B-cubed, Bagga and Baldwin 1998)."""
    names, numbers = (np.unique(values, return_inverse=True)[1] for values in (labels, clusters))
    table = np.zeros((names.max() + 1, numbers.max() + 1))
    np.add.at(table, (names, numbers), 1.0)
    return table[names, numbers] / table.sum(axis=0)[numbers]


class _Tables:
    """Contingency tables of labels against clusters, one a resample."""

    def __init__(
        self, labels: Shaped[np.ndarray, " n"], clusters: Shaped[np.ndarray, " m"], width: int | None = None
    ) -> None:
        self.labels, self.clusters = (np.unique(values, return_inverse=True)[1] for values in (labels, clusters))
        self.width = width or int(self.clusters.max()) + 1
        self.cells = (int(self.labels.max()) + 1) * self.width

    def of(
        self, items: Shaped[np.ndarray, "r n"], clusters: Shaped[np.ndarray, "r n"] | None = None
    ) -> Float64[np.ndarray, "r l c"]:
        """The table of each row of items, in their own clusters or in those given."""
        r = len(items)
        cell = self.labels[items] * self.width + (self.clusters[items] if clusters is None else clusters)
        flat = (cell + self.cells * np.arange(r)[:, None]).ravel()
        return np.bincount(flat, minlength=r * self.cells).reshape(r, -1, self.width).astype(np.float64)


def _v_measures(tables: Float64[np.ndarray, "r l c"]) -> Float64[np.ndarray, " r"]:
    """2 · mutual information / (entropy of the labels + entropy of the clusters), which equals the harmonic mean."""
    total = tables.sum(axis=(1, 2))
    of_labels, of_clusters = (_entropy(tables.sum(axis=axis), total) for axis in (2, 1))
    joint = _entropy(tables.reshape(len(tables), -1), total)
    both = of_labels + of_clusters
    return np.divide(2 * (both - joint), both, out=np.ones(len(tables)), where=both > 1e-12)


def _entropy(counts: Float64[np.ndarray, "r k"], total: Float64[np.ndarray, " r"]) -> Float64[np.ndarray, " r"]:
    return np.log(total) - (counts * np.log(np.maximum(counts, 1.0))).sum(axis=1) / total


def _matched(labels: Shaped[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """The clusters under the numbers of the labels they match best; those left over have numbers of their own."""
    table = np.zeros((labels.max() + 1, clusters.max() + 1))
    np.add.at(table, (labels, clusters), 1.0)
    rows, columns = linear_sum_assignment(-table)
    names = np.full(table.shape[1], -1)
    names[columns] = rows
    names[names < 0] = table.shape[0] + np.arange((names < 0).sum())
    return names[clusters]
