"""`kinvec compare`: results in, their differences with interval and p-value, and the queries that changed most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinvec.console import plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from kinvec.tasks import Change, Comparison, Difference, Failures, Slice, Standing, TaskComparison

FEWEST_CHANGES = 10  # below, intervals cover less than they say (docs/comparing.md)


def compare(
    *results: str | Path, metric: str | None = None, shown: int = 5, all_pairs: bool = False,
    by: Sequence[str] = (), slices: str | Path | None = None,
) -> list[TaskComparison]:  # fmt: skip
    """Compare all `results` with the first, or with `all_pairs` each with each, task by task.

    Each is a result folder, a folder of results by task, a run (its tuned model; as the first one also its base) or the
    folder of a recipe's seeds. `metric` is the main one (the first unless named): wins, losses, slices and Holm's
    correction go by it; at most `shown` wins, losses and failures are kept. `by` names slices: `length`, `source`,
    columns of the file `slices` or of the result. Raises `KinvecError` if there is no result, no task in common, or the
    data differ, `RecipeError` for an unknown metric or slice.
    """
    from kinvec import tasks
    from kinvec.contracts import RecipeError, one_sentence

    columns = tasks.read_columns(slices) if slices is not None else {}
    if columns and not by:
        raise RecipeError(f"--slices needs --by: which of its columns ({', '.join(columns)})?")
    with one_sentence("the results cannot be compared", "one of them is not as kinvec writes it: evaluate it again"):
        return [
            tasks.compare_systems(systems, by=metric, shown=shown, all_pairs=all_pairs, sliced=by, columns=columns)
            for systems in tasks.systems_by_task(results)
        ]


def command(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result folders, folders with one for each task, or runs. The first is compared with."),
    ],
    metric: Annotated[str | None, typer.Option(help="Go by this metric: wins, losses, slices, correction.")] = None,
    shown: Annotated[int, typer.Option(min=0, help="How many wins, losses and failures to show.")] = 5,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Compare each with each, not all with the first.")
    ] = False,
    by: Annotated[
        list[str] | None, typer.Option(help="Slices: length, source, or a column of --slices; may be repeated.")
    ] = None,
    slices: Annotated[
        Path | None, typer.Option(help="CSV, JSON lines or Parquet: ids of queries or documents, columns to slice by.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare results and runs: differences, intervals, p-values, wins and losses, what all fail.

    A run stands for its tuned model, and if it is the first, for the base before it as well. Runs that differ only in
    their seed are one system. Intervals are 95 %, paired; p is a two-sided paired randomisation test, corrected for
    several comparisons by Holm's method.
    """
    found = compare(*results, metric=metric, shown=shown, all_pairs=all_pairs, by=by or (), slices=slices)
    if as_json:
        told = {"results": [str(place) for place in results], "tasks": [asdict(task) for task in found]}
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for task in found:
            show(task)


def show(task: TaskComparison) -> None:
    """Print a task's comparisons for a person."""
    from rich.console import Console

    from kinvec.tasks import letter, unit_of

    what, console = unit_of(task.kind), Console()
    split = f", {task.split}" if task.split else ""
    print(f"{task.task}{split}: {task.queries:,} {what}")
    letters = {system.name: letter(place) for place, system in enumerate(task.systems)}
    for system in task.systems:
        seeds = f" ({len(system.seeds)} seeds: {', '.join(map(str, system.seeds))})" if system.seeds else ""
        print(f"{letters[system.name]} {system.name}{seeds}")
    if len(task.systems) == 2:
        console.print(_metrics(task.comparisons[0]))
    else:
        console.print(_values(task, letters))
        console.print(_pairs(task, letters))
    for comparison in task.comparisons:
        row = next(row for row in comparison.metrics if row.metric == task.by)
        if 0 < row.won + row.lost < FEWEST_CHANGES:
            pair = f"{letters[comparison.b]} − {letters[comparison.a]}"
            print(
                f"{pair}: by {task.by} only {row.won + row.lost} {what} differ, too few for an interval to be trusted"
            )
    for place, system in enumerate(task.systems):
        if system.spread:
            beyond = f"; the interval: of {letters[system.name]} − A, for other queries and seeds" if place else ""
            print(f"{letters[system.name]} over its seeds{beyond}")
            console.print(_seeds(system))
    for comparison in task.comparisons:
        _show_changes(comparison, letters[comparison.a], letters[comparison.b], what)
    if task.slices:
        print(f"slices, by {task.by} (looked for afterwards, in {len(task.slices)} comparisons: hints, not evidence):")
        for by in dict.fromkeys(piece.by for piece in task.slices):
            console.print(_slices([piece for piece in task.slices if piece.by == by], letters))
    _show_failures(task.failures, what, len(task.systems))


def _ends(low: float | None, high: float | None, sign: str = "+") -> str:
    return "" if low is None else f"{low:{sign}.4f}, {high:{sign}.4f}"


def _said(row: Difference) -> tuple[str, ...]:
    return f"{row.difference:+.4f}", _ends(row.low, row.high), f"{row.p:.4f}"


def _counted(row: Difference) -> tuple[str, ...]:
    return f"{row.won:,}", f"{row.tied:,}", f"{row.lost:,}"


def _metrics(comparison: Comparison) -> Table:
    """Of two systems: every metric a row."""
    table = plain_table("metric", "A", "B", "B − A", "95 % interval", "p", "won", "tied", "lost")
    for row in comparison.metrics:
        table.add_row(row.metric, f"{row.a:.4f}", f"{row.b:.4f}", *_said(row), *_counted(row))
    return table


def _values(task: TaskComparison, letters: dict[str, str]) -> Table:
    """Of more systems: each a row, the main metric with its interval first."""
    others = [name for name in task.systems[0].metrics if name != task.by]
    table = plain_table("", task.by, "95 % interval", *others)
    for system in task.systems:
        main = system.metrics[task.by]
        rest = (f"{system.metrics[name].value:.4f}" for name in others)
        table.add_row(letters[system.name], f"{main.value:.4f}", _ends(main.low, main.high, ""), *rest)
    return table


def _pairs(task: TaskComparison, letters: dict[str, str]) -> Table:
    table = plain_table("", task.by, "95 % interval", "p", f"p, Holm of {len(task.comparisons)}", "won", "tied", "lost")
    for pair in task.comparisons:
        row = next(row for row in pair.metrics if row.metric == task.by)
        table.add_row(f"{letters[pair.b]} − {letters[pair.a]}", *_said(row), f"{pair.holm:.4f}", *_counted(row))
    return table


def _seeds(system: Standing) -> Table:
    table = plain_table("metric", "mean", "least", "most", "deviation", "95 % interval")
    for row in system.spread:
        told = (f"{value:.4f}" for value in (row.mean, row.least, row.most, row.deviation))
        table.add_row(row.metric, *told, _ends(row.low, row.high))
    return table


def _slices(slices: Sequence[Slice], letters: dict[str, str]) -> Table:
    """Slices by one thing. Of two systems the columns are theirs; of more each row says which two."""
    several = len(letters) > 2
    sides = ("", "before", "after") if several else ("A", "B")
    table = plain_table(slices[0].by, "n", *sides, "difference", "95 % interval", "Holm")
    for piece in slices:
        row = piece.difference
        pair = [f"{letters[piece.b]} − {letters[piece.a]}"] if several else []
        change = (f"{row.difference:+.4f}", _ends(row.low, row.high), f"{piece.holm:.4f}")
        table.add_row(piece.slice[:30], f"{piece.queries:,}", *pair, f"{row.a:.4f}", f"{row.b:.4f}", *change)
    return table


def _show_changes(comparison: Comparison, a: str, b: str, what: str) -> None:
    by = f"by {comparison.by}" if (a, b) == ("A", "B") else f"by {comparison.by}, {b} − {a}"
    for name, changes in (("won", comparison.wins), ("lost", comparison.losses)):
        if changes:
            print(f"{what} {name} most, {by}:")
        for change in changes:
            print(_told(change, a, b))


def _told(change: Change, a: str, b: str) -> str:
    head = f"  {change.difference:+.3f}  {change.query or change.id}"
    return "\n".join([head, *(f"      {name} {_side(side)}" for name, side in ((a, change.a), (b, change.b)))])


def _side(side: dict[str, Any]) -> str:
    if "cosine" in side:
        return f"cosine {side['cosine']:.3f} for a score of {side['score']:g}"
    if "label" in side:
        taken = f", taken for {side['predicted']}" if side["predicted"] else ""
        return f"{side['value']:.3f}, {side['label']}{taken}"
    place = f"relevant at {side['first_relevant']}" if side["first_relevant"] else "nothing relevant found"
    return f"{side['value']:.3f}, {place}; first: {_line(side['top_text']) or side['top_id'] or 'nothing'}"


def _line(text: str) -> str:
    return " ".join(text.split())[:90]


def _show_failures(failures: Failures, what: str, count: int) -> None:
    if not failures.everywhere:
        return
    who = "both" if count == 2 else f"all {count}"
    print(f"{what} that {who} fail: {failures.everywhere:,}, of them {failures.alike:,} with the same wrong answer")
    for failure in failures.shown:
        right = "; ".join(map(_line, failure.expected[:3]))
        print(f"  {failure.query or failure.id}\n      given: {_line(failure.given_text) or failure.given}")
        print(f"      right: {right}")
