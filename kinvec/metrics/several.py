"""More than one comparison, and more than one training: Holm's correction, and intervals over queries and seeds.

Shapes: m = comparisons, s = seeds, n = queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from kinvec.metrics.resampling import CONFIDENCE


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those up to α keeps the chance of any false rejection at α (Holm 1979).

    The smallest is multiplied by m, the next by m − 1 and so on, none below one before it, none above 1; it holds
    however the comparisons depend on each other.
    """
    m = len(p_values)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * (m - np.arange(m)))
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def crossed_interval(values: Float[np.ndarray, "s n"], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of the mean over queries and over seeds, where each seed was measured on the same queries.

    A value is mean + query + seed + rest, each drawn at random (two-way random effects). From the mean squares of
    queries Q, seeds S and rest E the variance of the grand mean is (Q + S − E) / (s · n), with Satterthwaite's (1946)
    degrees of freedom. Two seeds or more; with few of them that differ much, the interval is as wide as it has to be.
    """
    s, n = values.shape
    assert s > 1 and n > 1, "a variance needs two of each"
    grand, of_query, of_seed = values.mean(), values.mean(axis=0), values.mean(axis=1)
    rest = values - of_query - of_seed[:, None] + grand
    q = s * ((of_query - grand) ** 2).sum() / (n - 1)
    d = n * ((of_seed - grand) ** 2).sum() / (s - 1)
    e = (rest**2).sum() / ((s - 1) * (n - 1))
    total = max(q + d - e, q, d)  # by chance E can exceed what the other two have in common
    spread = q**2 / (n - 1) + d**2 / (s - 1) + e**2 / ((s - 1) * (n - 1))
    if total <= 0:
        return float(grand), float(grand)
    half = float(student.ppf((1 + confidence) / 2, total**2 / spread) * np.sqrt(total / (s * n)))
    return float(grand) - half, float(grand) + half
