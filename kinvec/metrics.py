"""Measures of retrieval and similarity, value by value, and the statistics that tell a difference from luck.

Retrieval measures are those of ir-measures, by its names: `nDCG@10`, `RR@10`, `AP@10`, `R@100`, `P@10`.
Intervals are percentile bootstraps (Efron 1979; for search: Sakai 2006), p-values two-sided paired randomisation tests
(Smucker, Allan and Carterette 2007). Every draw comes from a generator of its own, so nothing here moves the random
state of a training run, and the same seed gives the same figures.

Shapes: n = queries or items, r = resamples drawn at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures.measures import Measure
from jaxtyping import Float, Float64, Shaped
from scipy.stats import rankdata

from kinvec.contracts import Qrels, RecipeError

RESAMPLES = 10_000
CONFIDENCE = 0.95
DEPTH_WITHOUT_CUTOFF = 1000  # `AP` or `RR` without @k read this many results, as TREC runs do
DRAWS_AT_A_TIME = 2_000_000  # numbers in one chunk of resamples: 16 MB of float64


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """Names such as `nDCG@10` as ir-measures' values, each once. Raises `RecipeError` for a name it does not know."""
    return list(dict.fromkeys(_parse(name) for name in names))


def _parse(name: str) -> Measure:
    try:
        measure = ir_measures.parse_measure(name)
        ir_measures.evaluator([measure], {"q": {"d": 1}})  # knows the name, but can anything here compute it?
        assert measure.params.get("cutoff", 1) > 0, "a cutoff counts results"
    except (NameError, ValueError, SyntaxError, AssertionError, KeyError, TypeError):
        raise RecipeError(f"unknown measure '{name}'; write it as nDCG@10, RR@10, AP@10, R@100 or P@10") from None
    return measure


def search_depth(names: Sequence[str]) -> int:
    """How many results a query needs so that every one of these measures can be computed."""
    cutoffs = (measure.params.get("cutoff") for measure in parse_measures(names))
    return max(DEPTH_WITHOUT_CUTOFF if cutoff is None else int(cutoff) for cutoff in cutoffs)


def retrieval(
    names: Sequence[str], qrels: Qrels, ranked: Mapping[str, Sequence[str]]
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Each measure's value for every judged query, in the order of `qrels`, under ir-measures' name (MRR@10 is RR@10).

    `ranked` lists document ids best first. A judged query without results scores 0 and is not dropped. Places are
    handed on instead of scores, because the implementations behind ir-measures break ties differently (pytrec_eval by
    id descending, its RR@k by id ascending); `kinvec.topk` has already put ties in trec_eval's order.
    """
    run = {q: {d: float(len(docs) - place) for place, d in enumerate(docs)} for q, docs in ranked.items() if docs}
    row = {query: i for i, query in enumerate(qrels)}
    measures = parse_measures(names)
    values = {str(measure): np.zeros(len(qrels)) for measure in measures}
    # Some TREC judgements mark junk with −1 or −2: not relevant, and pytrec_eval crashes on a negative grade.
    judged = {q: {d: max(grade, 0) for d, grade in grades.items()} for q, grades in qrels.items()}
    for metric in ir_measures.iter_calc(measures, judged, run):
        values[str(metric.measure)][row[metric.query_id]] = metric.value
    return values


def mean(values: Sequence[float] | Float[np.ndarray, " n"]) -> float:
    """The mean, 0 for nothing."""
    return float(np.mean(values)) if len(values) else 0.0


# --- Statistics of a mean over queries ------------------------------------------------------------------------------


def bootstrap_mean(
    values: Float[np.ndarray, " n"], seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean. Given paired differences it is the paired interval."""
    values = np.asarray(values, dtype=np.float64)
    means = [values[drawn].mean(axis=1) for drawn in _draw_items(len(values), seed, resamples)]
    return _interval(np.concatenate(means), confidence)


def randomisation_p(differences: Float[np.ndarray, " n"], seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of "neither system is better": each paired difference keeps or changes its sign by chance.

    (hits + 1) / (resamples + 1), so that it is never 0 (Phipson and Smyth 2010).
    """
    differences = np.asarray(differences, dtype=np.float64)
    sums = [(1.0 - 2.0 * swaps) @ differences for swaps in _draw_swaps(len(differences), seed, resamples)]
    return _p_value(np.concatenate(sums), float(differences.sum()))


# --- Similarity: statistics over a whole set ------------------------------------------------------------------------


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
    for drawn in _draw_items(len(gold), seed, resamples):
        counts = _counts(drawn, len(gold))
        reference = gold_of(counts)
        differences.append(
            _weighted_pearson(reference, b_of(counts), counts) - _weighted_pearson(reference, a_of(counts), counts)
        )
    return _interval(np.concatenate(differences), CONFIDENCE)


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
    for swaps in _draw_swaps(len(g), seed, resamples):
        differences.append(_swapped_correlation(g, y, x, swaps) - _swapped_correlation(g, x, y, swaps))
    return _p_value(np.concatenate(differences), observed)


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

    def ranks(counts: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "r n"]:
        sizes = np.add.reduceat(counts[:, order], starts, axis=1)
        return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]

    return ranks


def _as_they_are(values: Float[np.ndarray, " n"]) -> Callable[[Float[np.ndarray, "r n"]], Float[np.ndarray, "1 n"]]:
    row = np.asarray(values, dtype=np.float64)[None]
    return lambda counts: row


CORRELATIONS: dict[str, Callable[..., Callable[..., np.ndarray]]] = {
    "spearman_cosine": _ranks_among_drawn,
    "pearson_cosine": _as_they_are,
}


# --- Draws ----------------------------------------------------------------------------------------------------------


def _chunks(n: int, resamples: int) -> Iterator[int]:
    at_a_time = max(1, DRAWS_AT_A_TIME // max(n, 1))
    for start in range(0, resamples, at_a_time):
        yield min(at_a_time, resamples - start)


def _draw_items(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Row indices [r, n] of resamples with replacement."""
    assert n > 0, "nothing to resample"
    generator = np.random.default_rng(seed)
    for r in _chunks(n, resamples):
        yield generator.integers(0, n, size=(r, n))


def _draw_swaps(n: int, seed: int, resamples: int) -> Iterator[Float64[np.ndarray, "r n"]]:
    """1 where a pair changes sides, 0 where it stays."""
    generator = np.random.default_rng(seed)
    for r in _chunks(n, resamples):
        yield generator.integers(0, 2, size=(r, n)).astype(np.float64)


def _counts(drawn: np.ndarray, n: int) -> Float64[np.ndarray, "r n"]:
    r = len(drawn)
    flat = (drawn + n * np.arange(r)[:, None]).ravel()
    return np.bincount(flat, minlength=r * n).reshape(r, n).astype(np.float64)


def _interval(statistics: Float[np.ndarray, " r"], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _p_value(statistics: Float[np.ndarray, " r"], observed: float) -> float:
    """Sums of the same numbers in another order differ in the last bits; that must not turn a tie into a miss."""
    slack = 1e-9 * max(1.0, abs(observed))
    hits = int(np.count_nonzero(np.abs(statistics) >= abs(observed) - slack))
    return (hits + 1) / (len(statistics) + 1)
