"""Any number of systems on one task: each one's values, the comparisons that are asked for, and what all of them miss.

The p-values of the main metric are corrected for the number of comparisons made on the task, those of slices for the
number of slices times comparisons (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from kinvec import metrics
from kinvec.contracts import Result
from kinvec.tasks import averages
from kinvec.tasks.averages import Runs
from kinvec.tasks.comparison import (
    CHANGES_SHOWN,
    Comparison,
    aligned,
    common_metrics,
    compare_runs,
    difference_of,
    rows_at,
)
from kinvec.tasks.slices import Columns, Slice, slices_of


@dataclass(frozen=True, slots=True)
class System:
    """What is compared: its results on one task, one, or one for each of the seeds that its recipe was run under."""

    name: str
    results: Sequence[Result]
    seeds: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """A metric of a system with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Spread:
    """A metric of one system under several seeds: the value of each, their mean, standard deviation and ends.

    `low` and `high` are the 95 % interval of the mean difference to the first system over queries *and* seeds: where
    the figure would lie with other queries and other training runs. There is none of a statistic of the whole set, nor
    where the first system has several seeds, too, but not as many.
    """

    metric: str
    values: list[float]
    mean: float
    deviation: float
    least: float
    most: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Standing:
    """A system and its metrics; under several seeds they are means, and `spread` tells of the seeds."""

    name: str
    model: str
    seeds: list[int]
    metrics: dict[str, Value]
    spread: list[Spread]


@dataclass(frozen=True, slots=True)
class Failure:
    """A query that every system fails in the same way: `given` is what they all put first, `expected` what is right."""

    id: str
    query: str
    given: str
    given_text: str
    expected: list[str]


@dataclass(frozen=True, slots=True)
class Failures:
    """`everywhere`: rows on which every system scores nothing; `alike`: those of them with the same wrong answer."""

    everywhere: int
    alike: int
    shown: list[Failure]


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """All systems on one task. `comparisons` are against the first system, or of all pairs; `by` is the main metric."""

    task: str
    kind: str
    split: str
    queries: int
    by: str
    systems: list[Standing]
    comparisons: list[Comparison]
    failures: Failures
    slices: list[Slice] = field(default_factory=list)


def compare_systems(
    systems: Sequence[System], *, by: str | None = None, shown: int = CHANGES_SHOWN, all_pairs: bool = False,
    sliced: Sequence[str] = (), columns: Columns | None = None, seed: int = 0,
) -> TaskComparison:  # fmt: skip
    """Every system against the first, or each against every other; `sliced` are names that `slices_of` knows.

    Raises `KinvecError` if the results are of different data, `RecipeError` for an unknown metric or slice.
    """
    results = [result for system in systems for result in system.results]
    names = common_metrics(results, by)
    main, first = by or names[0], results[0]
    rows = [aligned(system.results, first) for system in systems]
    pairs = list(combinations(range(len(systems)), 2)) if all_pairs else [(0, i) for i in range(1, len(systems))]
    found = [
        compare_runs(systems[a].results, systems[b].results, (systems[a].name, systems[b].name), by=main,
                     shown=shown, seed=seed)
        for a, b in pairs
    ]  # fmt: skip
    corrected = metrics.holm([comparison.holm for comparison in found])
    standings = [_standing(system, names, own, rows[0]) for system, own in zip(systems, rows, strict=True)]
    tables = [
        piece for by_what in sliced for piece in _sliced(by_what, systems, rows, pairs, main, columns or {}, seed)
    ]
    return TaskComparison(
        first.task, first.kind, first.split, len(first.per_query["id"]), main, standings,
        [replace(comparison, holm=p) for comparison, p in zip(found, corrected, strict=True)],
        failures(rows, main, results, shown), _corrected(tables),
    )  # fmt: skip


def _standing(system: System, names: Sequence[str], own: Runs, base: Runs) -> Standing:
    values = {}
    for name in names:
        value = float(np.mean([result.metrics[name] for result in system.results]))
        values[name] = Value(value, *averages.interval(name, own))
    spread = [_spread(name, system, own, base) for name in names] if len(system.results) > 1 else []
    return Standing(system.name, system.results[0].model, list(system.seeds), values, spread)


def _spread(name: str, system: System, own: Runs, base: Runs) -> Spread:
    values = [result.metrics[name] for result in system.results]
    low = high = None
    if name not in averages.WHOLE_SET and own is not base and len(base) in (1, len(own)):
        change = averages.per_run(name, own) - averages.per_run(name, base)
        low, high = metrics.crossed_interval(change[:, ~np.isnan(change).any(axis=0)])
    deviation = float(np.std(values, ddof=1))
    return Spread(name, values, float(np.mean(values)), deviation, min(values), max(values), low, high)


def _sliced(
    by: str, systems: Sequence[System], rows: Sequence[Runs], pairs: Sequence[tuple[int, int]], metric: str,
    columns: Columns, seed: int,
) -> list[Slice]:  # fmt: skip
    found = []
    for name, places in slices_of(by, rows[0][0], columns).items():
        parts = [[rows_at(run, places) for run in runs] for runs in rows]
        for a, b in pairs:
            values = averages.value(metric, parts[a]), averages.value(metric, parts[b])
            change = difference_of(metric, parts[a], parts[b], values, seed)
            found.append(Slice(by, name, systems[a].name, systems[b].name, len(places), change, change.p))
    return found


def _corrected(slices: Sequence[Slice]) -> list[Slice]:
    corrected = metrics.holm([piece.difference.p for piece in slices])
    return [replace(piece, holm=p) for piece, p in zip(slices, corrected, strict=True)]


def failures(rows: Sequence[Runs], by: str, results: Sequence[Result], shown: int = CHANGES_SHOWN) -> Failures:
    """What every run of every system fails at, and of it what all of them answer alike.

    A search fails where the metric is 0: nothing relevant is among the results that it looks at; alike are the same
    first result. A labelled text fails where another label is predicted; alike are the same wrong ones. Scored pairs
    have no such failure.
    """
    runs = [run for system in rows for run in system]
    first = runs[0]
    if all("predicted" in run and "label" in run for run in runs):
        failed = [[said != right for said, right in zip(run["predicted"], run["label"], strict=True)] for run in runs]
        given = [list(run["predicted"]) for run in runs]
    elif all("top_ids" in run for run in runs):
        failed = [(averages.each(by, [run]) <= 0).tolist() for run in runs]
        given = [[top[0] if len(top) else None for top in run["top_ids"]] for run in runs]
    else:
        return Failures(0, 0, [])
    places = [i for i in range(len(first["id"])) if all(run[i] for run in failed)]
    alike = [i for i in places if len({run[i] for run in given}) == 1 and given[0][i] is not None]
    texts = _texts(results)
    return Failures(len(places), len(alike), [_failure(first, i, given[0][i], texts) for i in alike[:shown]])


def _failure(rows: Mapping[str, Any], i: int, given: str, texts: Mapping[str, str]) -> Failure:
    if "label" in rows:
        return Failure(rows["id"][i], rows["query"][i], given, "", [rows["label"][i]])
    judged = zip(rows["judged_ids"][i], rows["judged_scores"][i], strict=True) if "judged_ids" in rows else ()
    right = [texts.get(document, document) for document, grade in judged if grade > 0]
    return Failure(rows["id"][i], rows["query"][i], given, rows["top_text"][i], right)


def _texts(results: Sequence[Result]) -> dict[str, str]:
    """The documents whose text some result keeps."""
    kept = [result.documents for result in results if result.documents]
    return {own: text for table in kept for own, text in zip(table["id"], table["text"], strict=True)}
