"""v-measure, a statistic over a whole set of texts, recomputed on every resample.

The same texts may be clustered several times, each time a sample of them that holds a text any number of times: then it
is the mean over the clusterings.
Shapes: n = texts, e = clusterings, r = resamples drawn at a time, l = labels, c = clusters.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int, Shaped
from scipy.optimize import linear_sum_assignment

from kinvec.metrics.resampling import RESAMPLES, draw_items, draw_swaps, interval, p_value

Labels = Shaped[np.ndarray, " n"]
Clusters = Int[np.ndarray, "e n"]
Draws = Int[np.ndarray, "e n"]
"""How often a text is in the sample that was clustered; where it is not, its cluster says nothing."""


def v_measure(labels: Labels, clusters: Clusters, draws: Draws) -> float:
    """Rosenberg and Hirschberg 2007: the harmonic mean of homogeneity and completeness; 1 where nothing is divided."""
    return float(_Clusterings(labels, clusters, draws).v_measures(np.arange(len(labels))[None])[0])


def bootstrap_v_measure(
    labels: Labels, a: Clusters | None, b: Clusters, draws: Draws, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of v_measure(b) − v_measure(a), resampling texts with their clusters; of v_measure(b) alone.

    The clusterings are given and not made anew: the interval says how far other texts might move the figure. There are
    `resamples` over all clusterings.
    """
    after, before = _Clusterings(labels, b, draws), None if a is None else _Clusterings(labels, a, draws)
    found = []
    for items in draw_items(len(labels), seed, max(1, resamples // len(b)), after.cells):
        values = after.v_measures(items)
        found.append(values if before is None else values - before.v_measures(items))
    return interval(np.concatenate(found))


def randomisation_v_measure(
    labels: Labels, a: Clusters, b: Clusters, draws: Draws, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided p-value of "neither clusters better": each text's clusters change sides by chance, all at once.

    Clusters are first named by the labels they match best, one each (Kuhn 1955), since two models' numbers mean nothing
    to each other; that leaves the observed values unchanged.
    """
    x, y = (_Clusterings(labels, clusters, draws, named=True) for clusters in (a, b))
    x.width = y.width = max(x.width, y.width)
    items, one, other = np.arange(len(labels))[None], x.clusters[:, None], y.clusters[:, None]
    observed = float((y.v_measures(items) - x.v_measures(items))[0])
    found = []
    for swaps in draw_swaps(len(labels), seed, max(1, resamples // len(a)), x.cells):
        every = np.broadcast_to(items, swaps.shape)
        mixed, rest = np.where(swaps > 0, one, other), np.where(swaps > 0, other, one)
        found.append(x.v_measures(every, mixed) - x.v_measures(every, rest))
    return p_value(np.concatenate(found), observed)


def cluster_purity(labels: Labels, clusters: Clusters, draws: Draws) -> Float64[np.ndarray, " n"]:
    """For each text the share of its cluster that has its label (the precision of B-cubed, Bagga and Baldwin 1998).

    The mean over the clusterings that it is in; NaN if it is in none.
    """
    names = np.unique(labels, return_inverse=True)[1]
    total, times = np.zeros(len(names)), np.zeros(len(names))
    for numbers, often in zip(clusters, draws, strict=True):
        table = _contingency(names, numbers, often)
        there = often > 0
        total[there] += (table[names, numbers] / np.maximum(table.sum(axis=0), 1)[numbers])[there]
        times += there
    return np.divide(total, times, out=np.full(len(names), np.nan), where=times > 0)


class _Clusterings:
    """Labels and clusters by number, and the contingency tables that resamples of the texts have."""

    def __init__(self, labels: Labels, clusters: Clusters, draws: Draws, named: bool = False) -> None:
        self.labels, self.draws = np.unique(labels, return_inverse=True)[1], draws
        self.clusters = np.where(draws > 0, clusters, 0)
        if named:
            pairs = zip(self.clusters, draws, strict=True)
            self.clusters = np.stack([_matched(_contingency(self.labels, *pair))[pair[0]] for pair in pairs])
        self.width = int(self.clusters.max()) + 1

    @property
    def cells(self) -> int:
        """Of a table."""
        return (int(self.labels.max()) + 1) * self.width

    def v_measures(
        self, items: Int[np.ndarray, "r n"], clusters: Int[np.ndarray, "e r n"] | None = None
    ) -> Float64[np.ndarray, " r"]:
        """Of each row of items, with their own clusters or those given; the mean over the clusterings."""
        chosen = self.clusters[:, items] if clusters is None else clusters
        return np.mean(
            [_v_measures(self._tables(items, *pair)) for pair in zip(chosen, self.draws, strict=True)], axis=0
        )

    def _tables(
        self, items: Int[np.ndarray, "r n"], clusters: Int[np.ndarray, "r n"], draws: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, "r l c"]:
        r, cells = len(items), self.cells
        cell = self.labels[items] * self.width + clusters + cells * np.arange(r)[:, None]
        counts = np.bincount(cell.ravel(), weights=draws[items].ravel(), minlength=r * cells)
        return counts.reshape(r, -1, self.width)


def _v_measures(tables: Float64[np.ndarray, "r l c"]) -> Float64[np.ndarray, " r"]:
    """2 · mutual information / (entropy of the labels + entropy of the clusters), which equals the harmonic mean."""
    total = tables.sum(axis=(1, 2))
    of_labels, of_clusters = (_entropy(tables.sum(axis=axis), total) for axis in (2, 1))
    joint = _entropy(tables.reshape(len(tables), -1), total)
    both = of_labels + of_clusters
    return np.divide(2 * (both - joint), both, out=np.ones(len(tables)), where=both > 1e-12)


def _entropy(counts: Float64[np.ndarray, "r k"], total: Float64[np.ndarray, " r"]) -> Float64[np.ndarray, " r"]:
    total = np.maximum(total, 1.0)  # a slice may have none of the texts that a sample drew
    return np.log(total) - (counts * np.log(np.maximum(counts, 1.0))).sum(axis=1) / total


def _contingency(
    labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"], draws: Int[np.ndarray, " n"]
) -> Float64[np.ndarray, "l c"]:
    table = np.zeros((labels.max() + 1, clusters.max() + 1))
    np.add.at(table, (labels, clusters), draws)
    return table


def _matched(table: Float64[np.ndarray, "l c"]) -> Int[np.ndarray, " c"]:
    """The label that each cluster matches best; those left over have numbers of their own."""
    rows, columns = linear_sum_assignment(-table)
    names = np.full(table.shape[1], -1)
    names[columns] = rows
    names[names < 0] = table.shape[0] + np.arange((names < 0).sum())
    return names
