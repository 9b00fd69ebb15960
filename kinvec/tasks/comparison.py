"""Two systems side by side: the difference, its interval, its p-value, and the queries that changed most.

A difference is always B − A: with A the base and B the tuned model, positive is a gain. A system is a result, or
several of the same recipe under different seeds: then its values are the means over them, query by query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinvec.contracts import KinvecError, RecipeError, Result
from kinvec.tasks import averages
from kinvec.tasks.averages import Runs
from kinvec.tasks.statistics import Rows

CHANGES_SHOWN = 5
TIED = 1e-9  # values nearer than this are equal: the mean of three times 0.1 is not 0.1 to the last bit


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of both systems: B − A with its 95 % paired interval and paired randomisation p-value.

    `won`, `tied`, `lost` count the queries (or pairs) where B is better, equal, worse.
    """

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    won: int
    tied: int
    lost: int


@dataclass(frozen=True, slots=True)
class Change:
    """A query whose value changed, and what each model made of it.

    `a` and `b` hold `value` and, for retrieval, `top_id`, `top_text` and `first_relevant` (the place of the first
    relevant document, None if it is not among the results searched); for pairs `cosine` and `score`; for labelled
    texts `label`, `predicted`, `nearest` (the training text) and `nearest_label`.
    """

    id: str
    query: str
    difference: float
    a: dict[str, Any]
    b: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same data. `wins` and `losses` are the queries that changed most by the metric `by`.

    `holm` is the p-value of `by`, corrected for the comparisons made beside this one (Holm 1979); alone, it is p.
    """

    task: str
    kind: str
    split: str
    a: str
    b: str
    queries: int
    metrics: list[Difference]
    by: str
    wins: list[Change]
    losses: list[Change]
    holm: float


def compare(a: Result, b: Result, *, by: str | None = None, shown: int = CHANGES_SHOWN, seed: int = 0) -> Comparison:
    """Both results, metric by metric and query by query. `by` is the metric that wins and losses are ranked by.

    Raises `KinvecError` if the results are of different data, `RecipeError` if `by` is not a metric of both.
    """
    names = (a.model, b.model) if a.model != b.model else (f"{a.model} (A)", f"{b.model} (B)")
    return compare_runs([a], [b], names, by=by, shown=shown, seed=seed)


def compare_runs(
    a: Sequence[Result], b: Sequence[Result], names: tuple[str, str], *,
    by: str | None = None, shown: int = CHANGES_SHOWN, seed: int = 0,
) -> Comparison:  # fmt: skip
    """As `compare`, of systems that were run once or, under several seeds, several times.

    Of several runs the first one's answers are what wins and losses show.
    """
    common = common_metrics([*a, *b], by)
    a_rows, b_rows = aligned(a, a[0]), aligned(b, a[0])
    by = by or common[0]
    differences = [difference_of(name, a_rows, b_rows, (_mean_of(name, a), _mean_of(name, b)), seed) for name in common]
    changes = _changes(by, a[0].kind, a_rows, b_rows)
    wins = sorted((c for c in changes if c.difference > 0), key=lambda c: -c.difference)[:shown]
    losses = sorted((c for c in changes if c.difference < 0), key=lambda c: c.difference)[:shown]
    main = next(row for row in differences if row.metric == by)
    queries = len(a[0].per_query["id"])
    return Comparison(a[0].task, a[0].kind, a[0].split, *names, queries, differences, by, wins, losses, main.p)


def common_metrics(results: Sequence[Result], by: str | None = None) -> list[str]:
    """The metrics that all results have. Raises `RecipeError` where there is none, or `by` is none of them."""
    common = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    if not common or (by is not None and by not in common):
        who = "both" if len(results) == 2 else "all"
        has = f"{who} have {', '.join(common)}" if common else "they have none in common"
        raise RecipeError(f"the results cannot be compared by {by or 'any metric'}: {has}")
    return common


def aligned(results: Sequence[Result], to: Result) -> Runs:
    """The rows of each result in the order of those of `to`. Raises `KinvecError` if the data are others."""
    ids = to.per_query["id"]
    return [result.per_query if result is to else _in_order(result, ids, to) for result in results]


def _in_order(result: Result, ids: Sequence[str], to: Result) -> Rows:
    place = {query: row for row, query in enumerate(result.per_query["id"])}
    if result.fingerprint != to.fingerprint or place.keys() != set(ids):
        raise KinvecError(
            f"these are results of different data: A is {_data(to)}, B is {_data(result)}; "
            "evaluate both on the same data"
        )
    order = [place[query] for query in ids]
    return rows_at(result.per_query, order)


def rows_at(rows: Rows, places: Sequence[int]) -> Rows:
    """These rows of every column."""
    return {name: [column[place] for place in places] for name, column in rows.items()}


def _data(result: Result) -> str:
    split = f" ({result.split})" if result.split else ""
    return f"{result.task}{split}, {len(result.per_query['id']):,} queries, fingerprint {result.fingerprint[:8]}"


def _mean_of(name: str, results: Sequence[Result]) -> float:
    return float(np.mean([result.metrics[name] for result in results]))


def difference_of(name: str, a: Runs, b: Runs, values: tuple[float, float], seed: int = 0) -> Difference:
    """The difference by one metric, whose values are known already."""
    x, y = averages.each(name, a), averages.each(name, b)
    interval, chance = averages.difference(name, a, b, seed)
    counts = [int(np.count_nonzero(test)) for test in (y - x > TIED, np.abs(y - x) <= TIED, x - y > TIED)]
    return Difference(name, *values, values[1] - values[0], *interval, chance, *counts)


def _changes(by: str, kind: str, a: Runs, b: Runs) -> list[Change]:
    x, y = averages.each(by, a), averages.each(by, b)
    side, first, other = SIDES.get(kind, _search_side), a[0], b[0]
    found = []
    for i, (query_id, query) in enumerate(zip(first["id"], first["query"], strict=True)):
        if abs(y[i] - x[i]) > TIED:  # not where there is no value
            text = f"{query} | {first['second'][i]}" if "second" in first else query
            found.append(Change(query_id, text, float(y[i] - x[i]), side(first, i, x[i]), side(other, i, y[i])))
    return found


def _search_side(rows: Rows, i: int, value: float) -> dict[str, Any]:
    top: Sequence[str] = rows["top_ids"][i]
    return {
        "value": float(value),
        "top_id": top[0] if top else None,
        "top_text": rows["top_text"][i],
        "first_relevant": rows["first_relevant"][i],
    }


def _pair_side(rows: Rows, i: int, value: float) -> dict[str, Any]:
    return {"value": float(value), "cosine": rows["cosine"][i], "score": rows["score"][i]}


def _label_side(rows: Rows, i: int, value: float) -> dict[str, Any]:
    names = ("label", "predicted", "nearest", "nearest_label")
    told = {name: rows[name][i] if name in rows else None for name in names}
    if told["predicted"] is None and "cluster_label" in rows:
        told["predicted"] = rows["cluster_label"][i]
    return {"value": float(value)} | told


SIDES = {
    "similarity": _pair_side, "pair-classification": _pair_side,
    "classification": _label_side, "clustering": _label_side,
}  # fmt: skip
UNITS = {"similarity": "pairs", "pair-classification": "pairs", "classification": "texts", "clustering": "texts"}


def unit_of(kind: str) -> str:
    """What a result of this kind counts: queries, pairs or texts."""
    return UNITS.get(kind, "queries")
