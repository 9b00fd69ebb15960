"""Two results side by side: the difference, its interval, its p-value, and the queries that changed most.

A difference is always B − A: with A the base and B the tuned model, positive is a gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinvec.contracts import KinvecError, RecipeError, Result
from kinvec.tasks.statistics import statistic

CHANGES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of both models: B − A with its 95 % paired bootstrap interval and paired randomisation p-value.

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
    """Two results on the same data. `wins` and `losses` are the queries that changed most by the metric `by`."""

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


def compare(a: Result, b: Result, *, by: str | None = None, shown: int = CHANGES_SHOWN, seed: int = 0) -> Comparison:
    """Both results, metric by metric and query by query. `by` is the metric that wins and losses are ranked by.

    Raises `KinvecError` if the results are of different data, `RecipeError` if `by` is not a metric of both.
    """
    if a.fingerprint != b.fingerprint or set(a.per_query["id"]) != set(b.per_query["id"]):
        raise KinvecError(
            f"these are results of different data: A is {_data(a)}, B is {_data(b)}; evaluate both on the same data"
        )
    common = [name for name in a.metrics if name in b.metrics]
    if not common or (by is not None and by not in common):
        has = f"both have {', '.join(common)}" if common else "they have none in common"
        raise RecipeError(f"the results cannot be compared by {by or 'any metric'}: {has}")
    place = {query: row for row, query in enumerate(b.per_query["id"])}
    rows = [place[query] for query in a.per_query["id"]]
    b_rows = {name: [column[row] for row in rows] for name, column in b.per_query.items()}
    by = by or common[0]
    differences = [_difference(name, a, b, b_rows, seed) for name in common]
    changes = _changes(by, a.kind, a.per_query, b_rows)
    wins = sorted((c for c in changes if c.difference > 0), key=lambda c: -c.difference)[:shown]
    losses = sorted((c for c in changes if c.difference < 0), key=lambda c: c.difference)[:shown]
    names = _names(a, b)
    return Comparison(a.task, a.kind, a.split, *names, len(rows), differences, by, wins, losses)


def _data(result: Result) -> str:
    split = f" ({result.split})" if result.split else ""
    return f"{result.task}{split}, {len(result.per_query['id']):,} queries, fingerprint {result.fingerprint[:8]}"


def _names(a: Result, b: Result) -> tuple[str, str]:
    return (a.model, b.model) if a.model != b.model else (f"{a.model} (A)", f"{b.model} (B)")


def _difference(name: str, a: Result, b: Result, b_rows: dict[str, list[Any]], seed: int) -> Difference:
    found = statistic(name)
    x, y = found.each(a.per_query), found.each(b_rows)
    interval, chance = found.difference(a.per_query, b_rows, seed)
    counts = [int(np.count_nonzero(test)) for test in (y > x, y == x, y < x)]
    return Difference(
        name, a.metrics[name], b.metrics[name], b.metrics[name] - a.metrics[name], *interval, chance, *counts
    )


def _changes(by: str, kind: str, a: dict[str, list[Any]], b: dict[str, list[Any]]) -> list[Change]:
    each = statistic(by).each
    x, y = each(a), each(b)
    side = SIDES.get(kind, _search_side)
    found = []
    for i, (query_id, query) in enumerate(zip(a["id"], a["query"], strict=True)):
        if abs(y[i] - x[i]) > 0:  # not where there is no value
            text = f"{query} | {a['second'][i]}" if "second" in a else query
            found.append(Change(query_id, text, float(y[i] - x[i]), side(a, i, x[i]), side(b, i, y[i])))
    return found


def _search_side(rows: dict[str, list[Any]], i: int, value: float) -> dict[str, Any]:
    top: Sequence[str] = rows["top_ids"][i]
    return {
        "value": float(value),
        "top_id": top[0] if top else None,
        "top_text": rows["top_text"][i],
        "first_relevant": rows["first_relevant"][i],
    }


def _pair_side(rows: dict[str, list[Any]], i: int, value: float) -> dict[str, Any]:
    return {"value": float(value), "cosine": rows["cosine"][i], "score": rows["score"][i]}


def _label_side(rows: dict[str, list[Any]], i: int, value: float) -> dict[str, Any]:
    told = ("label", "predicted", "nearest", "nearest_label")
    return {"value": float(value)} | {name: rows[name][i] if name in rows else None for name in told}


SIDES = {"similarity": _pair_side, "classification": _label_side}
UNITS = {"similarity": "pairs", "classification": "texts"}


def unit_of(kind: str) -> str:
    """What a result of this kind counts: queries, pairs or texts."""
    return UNITS.get(kind, "queries")
