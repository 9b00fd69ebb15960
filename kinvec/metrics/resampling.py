"""Intervals, p-values and draws of resamples: what every statistic here is told apart from luck by.

Every draw comes from a generator of its own, so nothing here moves the random state of a training run, and the same
seed gives the same figures. Shapes: n = queries or items, r = resamples drawn at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float64
from scipy.stats import t as student

RESAMPLES = 10_000
CONFIDENCE = 0.95
DRAWS_AT_A_TIME = 500_000  # numbers in one chunk of resamples: 4 MB, what a processor keeps at hand


def mean(values: Sequence[float] | Float[np.ndarray, " n"]) -> float:
    """The mean, 0 for nothing."""
    return float(np.mean(values)) if len(values) else 0.0


def mean_interval(values: Float[np.ndarray, " n"], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval of the mean, mean ± t · standard error. Given paired differences it is the paired interval.

    Of simulated differences of nDCG it holds a true zero as often as it says at 50 queries and more, where bootstraps
    (percentile, BCa, studentised) find differences too often; skewed gains it rather understates
    (benchmarks/intervals.py). A single value is its own interval.
    """
    values = np.asarray(values, dtype=np.float64)
    n, middle = len(values), mean(values)
    half = float(student.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return middle - half, middle + half


def randomisation_p(differences: Float[np.ndarray, " n"], seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of "neither system is better": each paired difference keeps or changes its sign by chance.

    (hits + 1) / (resamples + 1), so that it is never 0 (Phipson and Smyth 2010).
    """
    differences = np.asarray(differences, dtype=np.float64)
    sums = [(1.0 - 2.0 * swaps) @ differences for swaps in draw_swaps(len(differences), seed, resamples)]
    return p_value(np.concatenate(sums), float(differences.sum()))


# --- Draws ----------------------------------------------------------------------------------------------------------


def _chunks(n: int, resamples: int) -> Iterator[int]:
    at_a_time = max(1, DRAWS_AT_A_TIME // max(n, 1))
    for start in range(0, resamples, at_a_time):
        yield min(at_a_time, resamples - start)


def draw_items(n: int, seed: int, resamples: int, width: int = 0) -> Iterator[np.ndarray]:
    """Row indices [r, n] of resamples with replacement; fewer at a time where each needs `width` numbers more."""
    assert n > 0, "nothing to resample"
    generator = np.random.default_rng(seed)
    for r in _chunks(max(n, width), resamples):
        yield generator.integers(0, n, size=(r, n))


def draw_swaps(n: int, seed: int, resamples: int, width: int = 0) -> Iterator[Float64[np.ndarray, "r n"]]:
    """1 where a pair changes sides, 0 where it stays; fewer at a time where each needs `width` numbers more."""
    generator = np.random.default_rng(seed)
    for r in _chunks(max(n, width), resamples):
        yield generator.integers(0, 2, size=(r, n)).astype(np.float64)


def counts(drawn: np.ndarray, n: int) -> Float64[np.ndarray, "r n"]:
    """How often each item was drawn, of the rows of `draw_items`."""
    r = len(drawn)
    flat = (drawn + n * np.arange(r)[:, None]).ravel()
    return np.bincount(flat, minlength=r * n).reshape(r, n).astype(np.float64)


def interval(statistics: Float[np.ndarray, " r"], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle share `confidence` of the resampled statistics."""
    low, high = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def p_value(statistics: Float[np.ndarray, " r"], observed: float) -> float:
    """Two-sided: the share of statistics under the null hypothesis that are at least as far from 0 as the observed one.

    Sums of the same numbers in another order differ in the last bits; that must not turn a tie into a miss.
    """
    slack = 1e-9 * max(1.0, abs(observed))
    hits = int(np.count_nonzero(np.abs(statistics) >= abs(observed) - slack))
    return (hits + 1) / (len(statistics) + 1)
