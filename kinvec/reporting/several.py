"""Several runs or results on one page: every metric of all of them, their learning curves, and the query browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from kinvec import tasks
from kinvec.files.reading import read_log
from kinvec.reporting.browser import browse
from kinvec.reporting.curve import learning_curve
from kinvec.reporting.reading import main_metric, ordered
from kinvec.reporting.rendering import axis, number, p_value, signed
from kinvec.reporting.scores import word
from kinvec.tasks.several import System, TaskComparison
from kinvec.tasks.systems import runs_of

SECTIONS = (
    ("scores", "All metrics", "_several.html.j2"),
    ("curve", "Learning curves", "_curves.html.j2"),
    ("queries", "Query by query", "_queries.html.j2"),
)
COLOURS = 8  # lines that have a colour of their own


def collect_several(places: Sequence[str | Path]) -> dict[str, Any]:
    """Everything the page shows of runs, folders of seeds or results, in their order.

    The first is what the others are compared to; where it is a run, the base that it started from comes before it.
    Raises `KinvecError` and `RecipeError` as `tasks.systems_by_task` does.
    """
    groups = tasks.systems_by_task(places)
    compared = [tasks.compare_systems(group, by=main_metric(group[0].results[0])) for group in groups]
    tables = [_table(one) for one in compared]
    curves = _curves(places)
    page: dict[str, Any] = {
        "name": " · ".join(str(place) for place in places),
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "model": "",
        "status": f"{len(compared[0].systems)} systems, {len(compared)} task{'s' if len(compared) > 1 else ''}",
        "verdict": _verdict(compared[0]),
        "tasks": tables,
        "curves": curves,
        "queries": _browser(groups),
    }
    there = {"scores": tables, "curve": curves, "queries": page["queries"]}
    return page | {"sections": [section for section in SECTIONS if there[section[0]]]}


def _browser(groups: Sequence[Sequence[System]]) -> dict[str, Any] | None:
    """The queries of every task that all systems have results on; of several seeds those of the first."""
    names = [system.name for system in groups[0]]
    whole = [group for group in groups if len(group) == len(names)]
    return browse([[system.results[0] for system in group] for group in whole], names)


def _table(one: TaskComparison) -> dict[str, Any]:
    """A row a metric; in it a cell a system: value and interval, and but for the first the difference to it."""
    differences = [{d.metric: asdict(d) for d in comparison.metrics} for comparison in one.comparisons]
    rows = []
    for metric in ordered(one.systems[0].metrics):
        cells = [asdict(system.metrics[metric]) for system in one.systems]
        for cell, found in zip(cells[1:], differences, strict=True):
            cell["difference"] = found[metric]
        rows.append({"metric": metric, "cells": cells})
    return {
        "name": one.task, "kind": one.kind, "split": one.split, "unit": tasks.unit_of(one.kind), "queries": one.queries,
        "by": one.by, "systems": [{"name": system.name, "seeds": system.seeds} for system in one.systems], "rows": rows,
        "holm": [comparison.holm for comparison in one.comparisons],
    }  # fmt: skip


def _verdict(one: TaskComparison) -> dict[str, Any]:
    """The best of the first task by its main metric, and whether it is better than the first beyond chance."""
    values = [system.metrics[one.by].value for system in one.systems]
    best = max(range(len(values)), key=values.__getitem__)
    told: list[str] = []
    for place, comparison in enumerate(one.comparisons, 1):
        d = next(d for d in comparison.metrics if d.metric == one.by)
        said = {"better": "better than", "worse": "worse than", "unclear": "not clearly different from"}[
            word(asdict(d))
        ]
        told.append(
            f"{one.systems[place].name}: {said} {one.systems[0].name}, {signed(d.difference)} in {one.by} "
            f"({signed(d.low)} to {signed(d.high)}, p {p_value(comparison.holm)} after Holm)."
        )
    sure = best > 0 and next(d for d in one.comparisons[best - 1].metrics if d.metric == one.by).low > 0
    return {
        "word": "better" if sure else "unclear",
        "head": f"Best: {one.systems[best].name},",
        "rest": f"{one.by} {number(values[best])} on {one.queries:,} {tasks.unit_of(one.kind)} of {one.task}.",
        "also": told,
        "difference": None,
    }


def _curves(places: Sequence[str | Path]) -> dict[str, Any] | None:
    """Loss and dev measure of every run over each other; nothing where no place is a run."""
    runs = [run for place in places for run in runs_of(Path(place))]
    found = [(str(run), learning_curve(read_log(run / "log.jsonl"))) for run in runs]
    drawn = [(name, curve) for name, curve in found if curve["steps"]]
    if not drawn:
        return None
    measure = next((curve["dev_name"] for _, curve in drawn if curve["dev_name"]), None)
    lines = [
        {
            "name": name, "colour": place % COLOURS,
            "loss": list(zip(curve["step"], curve["smooth"], strict=True)),
            "dev": curve["dev"] if curve["dev_name"] == measure else [],
        }
        for place, (name, curve) in enumerate(drawn)
    ]  # fmt: skip
    return {
        "measure": measure,
        "lines": lines,
        "axis": axis([0.0, *(step for line in lines for step, _ in line["loss"])], tight=True),
        "losses": axis([0.0, *(value for line in lines for _, value in line["loss"])]),
        "devs": axis([value for line in lines for _, value in line["dev"]], ticks=3),
    }
