"""A statistic of a system that was run several times, once a seed: of its runs the mean.

The mean of a measure that is a mean over queries is that of each query's mean, and so has an interval and a test like
any other. Of a statistic of the whole set (`WHOLE_SET`) the ends of the runs' intervals are averaged, which is never
narrower than the interval of the average would be, and the largest of their p-values is taken.

Shapes: n = queries, pairs or texts; s = seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from kinvec.tasks.statistics import WHOLE_SET, Rows, statistic

Runs = Sequence[Rows]
"""The rows of each run of one system, in the same order of queries."""


def value(name: str, runs: Runs) -> float:
    """The metric of all rows."""
    return float(np.mean([statistic(name).value(rows) for rows in runs]))


def each(name: str, runs: Runs) -> Float64[np.ndarray, " n"]:
    """A value a row, NaN for none."""
    return per_run(name, runs).mean(axis=0)


def per_run(name: str, runs: Runs) -> Float64[np.ndarray, "s n"]:
    """A value a run and row."""
    return np.stack([statistic(name).each(rows) for rows in runs])


def interval(name: str, runs: Runs) -> tuple[float, float]:
    """The 95 % interval of the metric."""
    if name in WHOLE_SET:
        low, high = np.mean([statistic(name).interval(rows) for rows in runs], axis=0)
        return float(low), float(high)
    return statistic(name).interval({name: each(name, runs)})


def difference(name: str, a: Runs, b: Runs, seed: int = 0) -> tuple[tuple[float, float], float]:
    """Of B − A the 95 % paired interval, and the paired test's p-value."""
    if name in WHOLE_SET:
        found = [statistic(name).difference(x, y, seed) for x in a for y in b]
        low, high = np.mean([ends for ends, _ in found], axis=0)
        return (float(low), float(high)), max(p for _, p in found)
    return statistic(name).difference({name: each(name, a)}, {name: each(name, b)}, seed)
