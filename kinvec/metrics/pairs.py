"""Pair classification: how well scores tell the pairs of one label from those of the other, over the whole set.

Everything is counted from tables of how many pairs of each label have each score, so that ties need no rule: pairs of
one score are on the same side of any threshold. Several rows of scores are several similarities of the same pairs, of
which the best counts (MTEB's `max_ap`, Muennighoff et al. 2023).
Shapes: n = pairs, s = similarities, r = resamples drawn at a time, w = different scores in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.stats import rankdata

from kinvec.metrics.resampling import RESAMPLES, draw_items, draw_swaps, interval, p_value

Labels = Bool[np.ndarray, " n"]
Scores = Float[np.ndarray, "s n"]
Tables = Int[np.ndarray, "r 2 w"]


def told_apart(name: str, labels: Labels, scores: Scores) -> float:
    """The statistic `name`, a key of `TOLD_APART`, by the best of the similarities; 0 without a positive pair."""
    return float(_best(name, labels[None], _levels(scores)[:, None])[0])


def best_threshold(name: str, labels: Labels, scores: Float[np.ndarray, " n"]) -> float:
    """The score from which on to call pairs positive where `name`, a key of `CURVES`, is highest.

    Of several the lowest. It lies midway between two pairs' scores, or is the lowest of all.
    """
    curve = CURVES[name](_tables(labels[None], _levels(scores[None])))[0]
    levels, best = np.unique(scores), int(curve.argmax())
    below = levels[max(best - 1, 0)]
    return float(max((below + levels[best]) / 2, np.nextafter(below, levels[best])))


def bootstrap_told_apart(
    name: str, labels: Labels, a: Scores | None, b: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of the statistic of `b` less that of `a`, resampling pairs with both scores; of `b` alone.

    Thresholds are chosen anew on each resample.
    """
    after, before = _levels(b), _levels(a) if a is not None else None
    found = []
    for drawn in draw_items(len(labels), seed, resamples, 2 * len(labels)):
        values = _best(name, labels[drawn], after[:, drawn])
        found.append(values if before is None else values - _best(name, labels[drawn], before[:, drawn]))
    return interval(np.concatenate(found))


def randomisation_told_apart(
    name: str, labels: Labels, a: Scores, b: Scores, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Two-sided p-value of "neither system tells them apart better": each pair's scores change sides by chance.

    Scores are first put on one scale, their ranks, since two models' cosines are not exchangeable as they are; that
    leaves the observed values unchanged.
    """
    x, y = np.split(_levels(np.concatenate([rankdata(scores, axis=1) for scores in (a, b)], axis=1)), 2, axis=1)
    x, y = x[:, None], y[:, None]
    observed = float((_best(name, labels[None], y) - _best(name, labels[None], x))[0])
    found = []
    for swaps in draw_swaps(len(labels), seed, resamples, 4 * len(labels)):
        same = np.broadcast_to(labels, swaps.shape)
        mixed, rest = np.where(swaps > 0, x, y), np.where(swaps > 0, y, x)
        found.append(_best(name, same, mixed) - _best(name, same, rest))
    return p_value(np.concatenate(found), observed)


def right_side(labels: Labels, scores: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """For each pair the share of pairs of the other label that its score is on the right side of, ties half.

    The mean over the pairs of a label is the area under the ROC curve. NaN where there is no other label.
    """
    found = np.full(len(labels), np.nan)
    if 0 < labels.sum() < len(labels):
        among_all = rankdata(scores)
        for own in (True, False):
            here = labels == own
            below = (among_all[here] - rankdata(scores[here])) / (~here).sum()
            found[here] = below if own else 1 - below
    return found


def _levels(scores: Scores) -> Int[np.ndarray, "s n"]:
    """The scores of each row as numbers of their order, from 0."""
    return np.stack([np.unique(row, return_inverse=True)[1] for row in scores])


def _best(name: str, labels: Bool[np.ndarray, "r n"], levels: Int[np.ndarray, "s r n"]) -> Float64[np.ndarray, " r"]:
    return np.stack([TOLD_APART[name](_tables(labels, one)) for one in levels]).max(axis=0)


def _tables(labels: Bool[np.ndarray, "r n"], levels: Int[np.ndarray, "r n"]) -> Tables:
    """How many pairs there are of each label, negative first, at each level."""
    r, width = len(levels), int(levels.max()) + 1
    cell = levels + width * (labels + 2 * np.arange(r)[:, None])
    return np.bincount(cell.ravel(), minlength=2 * r * width).reshape(r, 2, width)


def _from_here_up(counts: Tables) -> Tables:
    """How many there are of each label at each level or above: those called positive by a threshold there."""
    return counts[..., ::-1].cumsum(axis=-1)[..., ::-1]


def _average_precision(counts: Tables) -> Float64[np.ndarray, " r"]:
    """The mean over positive pairs of the precision at their score, as scikit-learn has it."""
    called, positive = _from_here_up(counts), counts[:, 1]
    precision = called[:, 1] / np.maximum(called.sum(axis=1), 1)
    return (precision * positive).sum(axis=1) / np.maximum(positive.sum(axis=1), 1)


def _accuracies(counts: Tables) -> Float64[np.ndarray, "r w"]:
    """The share of pairs that a threshold at each level puts on the right side."""
    called = _from_here_up(counts)
    negatives, pairs = counts[:, 0].sum(axis=1), counts.sum(axis=(1, 2))
    return (called[:, 1] + negatives[:, None] - called[:, 0]) / pairs[:, None]


def _f1s(counts: Tables) -> Float64[np.ndarray, "r w"]:
    """Twice the pairs rightly called positive, of those called so and those that are."""
    called = _from_here_up(counts)
    either = called.sum(axis=1) + counts[:, 1].sum(axis=-1, keepdims=True)
    return 2 * called[:, 1] / np.maximum(either, 1)


CURVES: dict[str, Callable[[Tables], Float64[np.ndarray, "r w"]]] = {"accuracy": _accuracies, "f1": _f1s}
"""Name → its value for a threshold at each level."""

TOLD_APART: dict[str, Callable[[Tables], Float64[np.ndarray, " r"]]] = {
    "ap": _average_precision,
    "accuracy": lambda counts: _accuracies(counts).max(axis=1),
    "f1": lambda counts: _f1s(counts).max(axis=1),
}
"""Name → average precision, or accuracy or F1 at the best threshold."""
