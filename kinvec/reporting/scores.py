"""The tables of scores before and after, and the verdict: the whole run in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kinvec import tasks
from kinvec.contracts import Result
from kinvec.reporting.reading import main_metric, ordered
from kinvec.reporting.rendering import axis, number, p_value, signed

EXAMPLES = 6  # wins, and losses, of each task


def task_table(base: Result, tuned: Result | None) -> dict[str, Any]:
    """One task's table: a row for each metric, main metric first, with both values, intervals, difference and BM25."""
    comparison = tasks.compare(base, tuned, by=main_metric(base), shown=EXAMPLES) if tuned else None
    differences = {d.metric: asdict(d) for d in comparison.metrics} if comparison else {}
    bm25 = base.baselines.get("BM25", {})
    rows: list[dict[str, Any]] = [
        {
            "metric": name,
            "base": _with_interval(name, base),
            "tuned": _with_interval(name, tuned) if tuned else None,
            "difference": differences.get(name),
            "bm25": bm25.get(name),
            "drawn": not name.startswith("P@"),  # bounded by relevant documents / k, far below the others' scale
        }
        for name in ordered(base.metrics)
    ]
    drawn = [row for row in rows if row["drawn"]] or rows
    shown = [row[side] for row in drawn for side in ("base", "tuned") if row[side]]
    ends = [end for value in shown for end in (value["low"], value["high"])] + [r["bm25"] for r in drawn if r["bm25"]]
    return {
        "name": base.task,
        "kind": base.kind,
        "unit": tasks.unit_of(base.kind),
        "split": base.split,
        "queries": len(base.per_query["id"]),
        "models": {"base": base.model, "tuned": tuned.model if tuned else None},
        "precision": tuned.precision if tuned else base.precision,
        "rows": rows,
        "axis": axis(ends, low=0.0 if min(ends) >= 0 else -1.0, high=1.0),
        "by": comparison.by if comparison else None,
        "wins": [asdict(change) for change in comparison.wins] if comparison else [],
        "losses": [asdict(change) for change in comparison.losses] if comparison else [],
    }


def _with_interval(name: str, result: Result) -> dict[str, float]:
    """The metric and its 95 % interval."""
    low, high = tasks.statistic(name).interval(result.per_query)
    return {"value": result.metrics[name], "low": low, "high": high}


def verdict(measured: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], finished: bool) -> dict[str, Any]:
    """The whole run in one sentence, by the first task's main metric."""
    compared = [task for task in measured if task["by"]]
    if not compared:
        if not recipe.get("evaluate", True):
            rest = "This run's evaluation was switched off (evaluate: false)."
        elif finished:
            rest = "There is a trained model, but no result of it yet."
        else:
            rest = "The model is not trained yet."
        return {"word": "unknown", "head": "Not measured.", "rest": rest, "also": [], "difference": None}
    first, *others = compared
    row = next(row for row in first["rows"] if row["metric"] == first["by"])
    d = row["difference"]
    said = word(d)
    head = {"better": "Better by {}:", "worse": "Worse by {}:", "unclear": "No clear change:"}[said]
    counted = f"{first['queries']:,} {first['unit']}"
    moved = f"{d['metric']} from {number(d['a'])} to {number(d['b'])}"
    interval = f"95 % interval of the difference {signed(d['low'])} to {signed(d['high'])}"
    return {
        "word": said,
        "head": head.format(number(abs(d["difference"]))),
        "rest": f"{moved} ({interval}, {counted}, p {p_value(d['p'])}).",
        "also": _also(row, first["unit"], others),
        "difference": d,
    }


def word(difference: Mapping[str, Any]) -> str:
    """Better, worse or unclear, by the interval of a difference."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "unclear"


def _also(row: Mapping[str, Any], unit: str, others: Sequence[Mapping[str, Any]]) -> list[str]:
    d, told = row["difference"], []
    if row["bm25"] is not None:
        side = "ahead of" if d["b"] > row["bm25"] else "behind" if d["b"] < row["bm25"] else "level with"
        told.append(f"The tuned model is {side} BM25, which has {number(row['bm25'])} on the same queries.")
    told.append(f"{d['won']:,} {unit} won, {d['tied']:,} unchanged, {d['lost']:,} lost.")
    for task in others:
        other = next(r for r in task["rows"] if r["metric"] == task["by"])["difference"]
        told.append(
            f"{task['name']}: {word(other)}, {task['by']} {number(other['a'])} → {number(other['b'])} "
            f"({signed(other['low'])} to {signed(other['high'])})."
        )
    return told
