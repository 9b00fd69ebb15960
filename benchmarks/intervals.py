"""`make intervals`: do the intervals cover, do the tests hold their level? 2,000 simulated evaluations of each kind.

The population is real: nDCG@10 of 300 queries before and after a training (SciFact, all-MiniLM-L6-v2, one seed),
rounded, from `results/intervals-population.json`. A simulated evaluation draws n queries of it with replacement, so
that the true mean is known. Under the null hypothesis each query's two values change sides by chance, or the
differences are weighted so that their mean is zero and their skewness stays. Everything runs through the functions that
`kinvec compare` calls; the other kinds of intervals are here to compare them with. Three minutes on one core.

    python benchmarks/intervals.py                                  simulate
    python benchmarks/intervals.py --population RESULT RESULT       make the population anew, from two result folders
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from kinvec import metrics

HERE = Path(__file__).parent
POPULATION = HERE / "results" / "intervals-population.json"
SIZES = (50, 300, 1000)  # queries of an evaluation
DRAWS = 2_000  # simulated evaluations
RESAMPLES = 1_000  # kinvec's own is 10,000
OWN_DRAWS = 10_000  # of kinvec's interval alone
TEST_DRAWS = 2_000  # of tests, which are quicker
SEED_DRAWS = 10_000
CORRELATION_DRAWS = 300
FAMILY = 5  # comparisons with one baseline
LEVELS = (0.05, 0.01)

Draw = Callable[[int], np.ndarray]


def percentile(values: Float[np.ndarray, " n"], drawn: Float[np.ndarray, "r n"]) -> tuple[float, float]:
    """Efron (1979): the middle 95 % of the means of resamples."""
    return _ends(drawn.mean(axis=1), 0.025, 0.975)


def bias_corrected(values: Float[np.ndarray, " n"], drawn: Float[np.ndarray, "r n"]) -> tuple[float, float]:
    """BCa (Efron 1987): percentiles moved by the bias and the skewness of the means."""
    means, centred = drawn.mean(axis=1), values - values.mean()
    if not centred.any():
        return float(values[0]), float(values[0])
    below = (np.mean(means < values.mean()) + np.mean(means <= values.mean())) / 2
    bias = norm.ppf(np.clip(below, 1 / len(means), 1 - 1 / len(means)))
    skew = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    moved = [bias + norm.ppf(share) for share in (0.025, 0.975)]
    return _ends(means, *(float(norm.cdf(bias + z / (1 - skew * z))) for z in moved))


def studentised(values: Float[np.ndarray, " n"], drawn: Float[np.ndarray, "r n"]) -> tuple[float, float]:
    """The bootstrap-t (Efron 1982): quantiles of (mean of a resample − mean) / its standard error."""
    root = np.sqrt(len(values))
    error = drawn.std(axis=1, ddof=1) / root
    off = drawn.mean(axis=1) - values.mean()
    low, high = _ends(np.divide(off, error, out=np.zeros(len(drawn)), where=error > 1e-12), 0.025, 0.975)
    scale = values.std(ddof=1) / root
    return float(values.mean() - high * scale), float(values.mean() - low * scale)


def _ends(values: Float[np.ndarray, " r"], low: float, high: float) -> tuple[float, float]:
    found = np.quantile(values, [low, high])
    return float(found[0]), float(found[1])


BOOTSTRAPS = {"percentile bootstrap": percentile, "BCa bootstrap": bias_corrected, "studentised bootstrap": studentised}


def coverage(sample_of: Draw, truth: float, n: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often each kind of interval holds the true mean, is all above or all below it, and how wide it is."""
    ends: dict[str, list[tuple[float, float]]] = {name: [] for name in ("kinvec", *BOOTSTRAPS)}
    for sample in (sample_of(n) for _ in range(DRAWS)):
        ends["kinvec"].append(metrics.mean_interval(sample))
        drawn = sample[generator.integers(0, n, size=(RESAMPLES, n))]
        for name, interval in BOOTSTRAPS.items():
            ends[name].append(interval(sample, drawn))
    return {name: _sides(np.array(pairs), truth) for name, pairs in ends.items()}


def own_coverage(sample_of: Draw, truth: float, n: int) -> dict[str, Any]:
    """The same of kinvec's interval alone, which is quick, with more draws."""
    return _sides(np.array([metrics.mean_interval(sample_of(n)) for _ in range(OWN_DRAWS)]), truth)


def _sides(ends: Float[np.ndarray, "d 2"], truth: float) -> dict[str, Any]:
    low, high = ends.T
    above, below = low > truth + 1e-12, high < truth - 1e-12
    beside = {"above": round(float(above.mean()), 4), "below": round(float(below.mean()), 4)}
    return _rate(~above & ~below) | beside | {"width": round(float(np.mean(high - low)), 4)}


def populations(pairs: Float[np.ndarray, "N 2"], generator: np.random.Generator) -> dict[str, tuple[Draw, float]]:
    """What means are taken of, with the true mean."""
    change = pairs[:, 1] - pairs[:, 0]
    few = np.where(np.arange(len(change)) % 4 == 0, change, 0.0)  # a gentler training: three queries in four as before
    return {
        "mean": (drawn(pairs[:, 1], generator), float(pairs[:, 1].mean())),
        "difference": (drawn(change, generator), float(change.mean())),
        "no difference": (swapped(change, generator), 0.0),
        "difference, few queries change": (drawn(few, generator), float(few.mean())),
    }


def correlation_coverage(n: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often the interval of a difference of Spearman's correlations holds it. Scores are in fifths from 0 to 5."""
    truth = float(np.diff([metrics.spearman(*pair) for pair in _scored(400_000, generator)])[0])
    inside = []
    for _ in range(CORRELATION_DRAWS):
        (gold, a), (_, b) = _scored(n, generator)
        low, high = metrics.bootstrap_correlation("spearman_cosine", gold, a, b, resamples=RESAMPLES)
        inside.append(low <= truth <= high)
    return _rate(np.array(inside)) | {"true_difference": round(truth, 4)}


def _scored(n: int, generator: np.random.Generator) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Scores with the cosines of two models that agree with them about as on the STS Benchmark (0.80 and 0.82)."""
    score, shared, one, two = generator.normal(size=(4, n))
    gold = np.round(5 * (rankdata(score) / n) * 5) / 5
    return (gold, score + 0.62 * shared + 0.4 * one), (gold, score + 0.62 * shared + 0.3 * two)


def level(sample: Draw, n: int) -> dict[str, Any]:
    """How often the randomisation test rejects what is true."""
    p = np.array([metrics.randomisation_p(sample(n), resamples=RESAMPLES) for _ in range(TEST_DRAWS)])
    return {f"{alpha:g}": _rate(p <= alpha) for alpha in LEVELS}


def drawn(values: Float[np.ndarray, " N"], generator: np.random.Generator) -> Draw:
    """Draws of the values as they are."""
    return lambda n: generator.choice(values, n)


def swapped(differences: Float[np.ndarray, " N"], generator: np.random.Generator) -> Draw:
    """Draws under the null hypothesis of the test: it is chance which system has which of a query's two values."""
    return lambda n: generator.choice(differences, n) * generator.choice([-1.0, 1.0], n)


def tilted(differences: Float[np.ndarray, " N"], generator: np.random.Generator) -> Draw:
    """Draws of mean zero that are not symmetric: the differences, weighted by exp(−c · difference)."""
    c = brentq(lambda c: float((differences * np.exp(-c * differences)).sum()), -50, 50)
    weights = np.exp(-c * differences)
    return lambda n: generator.choice(differences, n, p=weights / weights.sum())


def family_error(pairs: Float[np.ndarray, "N 2"], n: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often at least one of `FAMILY` comparisons of equal systems with one baseline is called a difference."""
    plain, corrected = [], []
    for _ in range(DRAWS):
        queries = pairs[generator.integers(0, len(pairs), n)]
        systems = np.take_along_axis(queries, generator.integers(0, 2, size=(n, FAMILY + 1)), axis=1)
        p = [metrics.randomisation_p(systems[:, i] - systems[:, 0], resamples=RESAMPLES) for i in range(1, FAMILY + 1)]
        plain.append(min(p) <= 0.05)
        corrected.append(min(metrics.holm(p)) <= 0.05)
    return {"uncorrected": _rate(np.array(plain)), "Holm": _rate(np.array(corrected))}


def seeds_coverage(seeds: int, of_seed: float, generator: np.random.Generator, n: int = 300) -> dict[str, Any]:
    """How often intervals hold the mean over queries and seeds: that of kinvec, and one over queries alone.

    Queries differ by 0.15 (standard deviation), seeds by `of_seed`, the rest by 0.15, about as in the population.
    """
    both: list[bool] = []
    queries: list[bool] = []
    for _ in range(SEED_DRAWS):
        values = generator.normal(0, 0.15, n) + generator.normal(0, of_seed, (seeds, 1))
        values = values + generator.normal(0, 0.15, (seeds, n))
        for found, (low, high) in (
            (both, metrics.crossed_interval(values)),
            (queries, metrics.mean_interval(values.mean(axis=0))),
        ):
            found.append(low <= 0 <= high)
    return {"queries and seeds": _rate(np.array(both)), "queries alone": _rate(np.array(queries))}


def _rate(hits: np.ndarray) -> dict[str, float]:
    """A share with its Monte Carlo standard error."""
    share = float(np.mean(hits))
    return {"rate": round(share, 4), "error": round(float(np.sqrt(share * (1 - share) / len(hits))), 4)}


def simulate(pairs: Float[np.ndarray, "N 2"], seed: int = 0) -> dict[str, Any]:
    """All of it."""
    generator = np.random.default_rng(seed)
    change = pairs[:, 1] - pairs[:, 0]
    found: dict[str, Any] = {
        "coverage": {
            name: {n: coverage(*what, n, generator) for n in SIZES}
            for name, what in populations(pairs, generator).items()
        },
        "changed_queries": float(np.mean(change != 0)),
        "coverage_of_a_spearman_difference": {n: correlation_coverage(n, generator) for n in SIZES},
        "level_of_the_test": {n: level(swapped(change, generator), n) for n in SIZES},
        "level_where_differences_are_skewed": {n: level(tilted(change, generator), n) for n in SIZES},
        "family_of_5": {n: family_error(pairs, n, generator) for n in (50, 300)},
        "coverage_over_seeds": {
            f"{seeds} seeds that differ by {spread}": seeds_coverage(seeds, spread, generator)
            for seeds in (3, 5) for spread in (0.0, 0.005, 0.02)
        },
        "coverage_of_kinvecs": {
            name: {n: own_coverage(*what, n) for n in SIZES}
            for name, what in populations(pairs, np.random.default_rng(seed + 1)).items()
        },
    }  # fmt: skip
    return found


def make_population(before: str, after: str) -> None:
    """Write nDCG@10 before and after of each query, without its text or name."""
    from kinvec.tasks import load_result

    a, b = (load_result(place).per_query for place in (before, after))
    later = dict(zip(b["id"], b["nDCG@10"], strict=True))
    pairs = sorted([round(x, 4), round(later[query], 4)] for query, x in zip(a["id"], a["nDCG@10"], strict=True))
    POPULATION.write_text(json.dumps({"metric": "nDCG@10", "before_after": pairs}) + "\n", "utf-8")


def main() -> None:
    """Simulate, write the result, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", nargs=2, metavar="RESULT", help="result folders: before, after")
    options = parser.parse_args()
    if options.population:
        make_population(*options.population)
        sys.exit()
    begun = time.perf_counter()
    pairs = np.array(json.loads(POPULATION.read_text("utf-8"))["before_after"])
    result = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("kinvec", "numpy", "scipy")},
        "draws": {"means": DRAWS, "kinvecs": OWN_DRAWS, "tests": TEST_DRAWS, "families": DRAWS,
                  "correlations": CORRELATION_DRAWS, "seeds": SEED_DRAWS},
        "resamples": RESAMPLES,
        **simulate(pairs),
        "seconds": round(time.perf_counter() - begun),
    }  # fmt: skip
    path = HERE / "results" / f"intervals-{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
