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
from scipy.optimize import linear_sum_assignment
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
    return max((DEPTH_WITHOUT_CUTOFF if cutoff is None else int(cutoff) for cutoff in cutoffs), default=0)


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
    for metric in ir_measures.iter_calc(measures, judged, run) if measures else ():
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


# --- Clusters: a statistic over a whole set -------------------------------------------------------------------------


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
    for drawn in _draw_items(len(labels), seed, resamples, after.cells):
        values = _v_measures(after.of(drawn))
        found.append(values if before is None else values - _v_measures(before.of(drawn)))
    return _interval(np.concatenate(found), CONFIDENCE)


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
    for swaps in _draw_swaps(len(names), seed, resamples, table.cells):
        mixed, rest = np.where(swaps > 0, x, y), np.where(swaps > 0, y, x)
        every = np.broadcast_to(items, mixed.shape)
        found.append(_v_measures(table.of(every, mixed)) - _v_measures(table.of(every, rest)))
    return _p_value(np.concatenate(found), observed)


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


# --- Draws ----------------------------------------------------------------------------------------------------------


def _chunks(n: int, resamples: int) -> Iterator[int]:
    at_a_time = max(1, DRAWS_AT_A_TIME // max(n, 1))
    for start in range(0, resamples, at_a_time):
        yield min(at_a_time, resamples - start)


def _draw_items(n: int, seed: int, resamples: int, width: int = 0) -> Iterator[np.ndarray]:
    """Row indices [r, n] of resamples with replacement; fewer at a time where each needs `width` numbers more."""
    assert n > 0, "nothing to resample"
    generator = np.random.default_rng(seed)
    for r in _chunks(max(n, width), resamples):
        yield generator.integers(0, n, size=(r, n))


def _draw_swaps(n: int, seed: int, resamples: int, width: int = 0) -> Iterator[Float64[np.ndarray, "r n"]]:
    """1 where a pair changes sides, 0 where it stays; fewer at a time where each needs `width` numbers more."""
    generator = np.random.default_rng(seed)
    for r in _chunks(max(n, width), resamples):
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
