"""Correlations over a whole set of pairs, recomputed on every resample.

Shapes: n = pairs, r = resamples drawn at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import rankdata

from kinvec.metrics.resampling import RESAMPLES, counts, draw_items, draw_swaps, interval, p_value


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant and so orders nothing."""
    return pearson(rankdata(x), rankdata(y))


def pearson(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    rows = np.asarray(x, np.float64)[None], np.asarray(y, np.float64)[None]
    return float(_weighted_pearson(*rows, np.ones((1, len(x))))[0])


def bootstrap_correlation(
    name: str,
    gold: Float[np.ndarray, " n"],
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The 95 % interval of correlation(gold, b) − correlation(gold, a), resampling items with both predictions.

    `name` is a key of `CORRELATIONS`. The statistic itself is recomputed on each resample: ranks, too, are ranks among
    the items drawn.
    """
    prepare = CORRELATIONS[name]
    gold_of, a_of, b_of = prepare(gold), prepare(a), prepare(b)
    differences = []
    for drawn in draw_items(len(gold), seed, resamples):
        often = counts(drawn, len(gold))
        reference = gold_of(often)
        differences.append(
            _weighted_pearson(reference, b_of(often), often) - _weighted_pearson(reference, a_of(often), often)
        )
    return interval(np.concatenate(differences))


def randomisation_correlation(
    name: str,
    gold: Float[np.ndarray, " n"],
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> float:
    """Two-sided p-value of "neither system correlates better": each item's two predictions change sides by chance.

    Predictions are first put on one scale, ranks for Spearman and standard scores for Pearson, since two models'
    cosines are not exchangeable as they are; that leaves the observed correlations unchanged.
    """
    ranks = name == "spearman_cosine"
    g, x, y = (_standardised(rankdata(values) if ranks else np.asarray(values, np.float64)) for values in (gold, a, b))
    observed = float(g @ y - g @ x) / len(g)
    differences = []
    for swaps in draw_swaps(len(g), seed, resamples):
        differences.append(_swapped_correlation(g, y, x, swaps) - _swapped_correlation(g, x, y, swaps))
    return p_value(np.concatenate(differences), observed)


def _swapped_correlation(
    g: Float[np.ndarray, " n"],
    own: Float[np.ndarray, " n"],
    other: Float[np.ndarray, " n"],
    swaps: Float[np.ndarray, "r n"],
) -> Float[np.ndarray, " r"]:
    """Pearson of standardised `g` with `own`, of which the items where `swaps` is 1 come from `other`."""
    n = len(g)
    total = own.sum() + swaps @ (other - own)
    squares = (own**2).sum() + swaps @ (other**2 - own**2)
    product = g @ own + swaps @ (g * (other - own))
    spread = np.sqrt(np.maximum(n * squares - total**2, 0.0))  # g has mean 0 and variance 1, so the rest cancels
    return np.divide(product, spread, out=np.zeros(len(swaps)), where=spread > 1e-9)


def _standardised(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def _weighted_pearson(
    x: Float[np.ndarray, "#r n"], y: Float[np.ndarray, "#r n"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    return np.divide((weights * x * y).sum(axis=1), spread, out=np.zeros(len(weights)), where=spread > 1e-12)


def _ranks_among_drawn(
    values: Float[np.ndarray, " n"],
) -> Callable[[Float[np.ndarray, "r n"]], Float[np.ndarray, "r n"]]:
    """Counts of a resample → each item's mean rank in it, without sorting again: only the ties' group sizes change."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))

    def ranks(often: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "r n"]:
        sizes = np.add.reduceat(often[:, order], starts, axis=1)
        return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]

    return ranks


def _as_they_are(values: Float[np.ndarray, " n"]) -> Callable[[Float[np.ndarray, "r n"]], Float[np.ndarray, "1 n"]]:
    row = np.asarray(values, dtype=np.float64)[None]
    return lambda often: row


CORRELATIONS: dict[str, Callable[..., Callable[..., np.ndarray]]] = {
    "spearman_cosine": _ranks_among_drawn,
    "pearson_cosine": _as_they_are,
}
