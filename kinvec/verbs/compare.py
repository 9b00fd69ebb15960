"""`kinvec compare`: two results in, the difference with its interval and p-value, and the queries that changed most."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kinvec.tasks import Comparison
    from kinvec.tasks.comparison import Change


def compare(a: str | Path, b: str | Path, *, metric: str | None = None, shown: int = 5) -> list[Comparison]:
    """Compare the results in folders `a` and `b`, each a result or a folder of results by task; differences are B − A.

    `metric` ranks the wins and losses (the first metric unless named), of which at most `shown` each are returned.
    Raises `KinvecError` if there is no result, no task in common, or the data differ.
    """
    from kinvec import tasks
    from kinvec.console import say
    from kinvec.contracts import KinvecError

    before, after = tasks.load_results(a), tasks.load_results(b)
    if len(before) == len(after) == 1:  # whatever the copies of the data are called: the fingerprint tells
        pairs = [(*before.values(), *after.values())]
    else:
        pairs = [(before[task], after[task]) for task in before if task in after]
        for folder, own, other in ((a, before, after), (b, after, before)):
            if alone := ", ".join(task for task in own if task not in other):
                say(f"only in {folder}, so not compared: {alone}")
    if not pairs:
        raise KinvecError(f"{a} and {b} have no task in common ({', '.join(before)} and {', '.join(after)})")
    return [tasks.compare(x, y, by=metric, shown=shown) for x, y in pairs]


def command(
    a: Annotated[Path, typer.Argument(help="A result folder, or one with a folder for each task (the base).")],
    b: Annotated[Path, typer.Argument(help="The other one, measured on the same data (the tuned model).")],
    metric: Annotated[str | None, typer.Option(help="Rank wins and losses by this metric.")] = None,
    shown: Annotated[int, typer.Option(min=0, help="How many wins and losses to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare two results: difference, interval, p-value, wins and losses.

    The difference is B − A. The interval is a 95 % paired bootstrap, p a two-sided paired randomisation test.
    """
    comparisons = compare(a, b, metric=metric, shown=shown)
    if as_json:
        tasks = [asdict(comparison) for comparison in comparisons]
        print(json.dumps({"a": str(a), "b": str(b), "tasks": tasks}, indent=2, ensure_ascii=False))
    else:
        for comparison in comparisons:
            show(comparison)


def show(comparison: Comparison) -> None:
    """Print a comparison for a person."""
    from rich.console import Console
    from rich.table import Table

    from kinvec.tasks import unit_of

    what = unit_of(comparison.kind)
    split = f", {comparison.split}" if comparison.split else ""
    print(f"{comparison.task}{split}: {comparison.queries:,} {what}\nA {comparison.a}\nB {comparison.b}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("metric", "A", "B", "B − A", "95 % interval", "p", "won", "tied", "lost"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for row in comparison.metrics:
        table.add_row(
            row.metric, f"{row.a:.4f}", f"{row.b:.4f}", f"{row.difference:+.4f}", f"{row.low:+.4f}, {row.high:+.4f}",
            f"{row.p:.4f}", f"{row.won:,}", f"{row.tied:,}", f"{row.lost:,}",
        )  # fmt: skip
    Console().print(table)
    for name, changes in (("won", comparison.wins), ("lost", comparison.losses)):
        if changes:
            print(f"{what} {name} most, by {comparison.by}:")
        for change in changes:
            print(_told(change))


def _told(change: Change) -> str:
    head = f"  {change.difference:+.3f}  {change.query or change.id}"
    return "\n".join([head, *(f"      {name} {_side(side)}" for name, side in (("A", change.a), ("B", change.b)))])


def _side(side: dict[str, Any]) -> str:
    if "cosine" in side:
        return f"cosine {side['cosine']:.3f} for a score of {side['score']:g}"
    if "label" in side:
        taken = f", taken for {side['predicted']}" if side["predicted"] else ""
        return f"{side['value']:.3f}, {side['label']}{taken}"
    place = f"relevant at {side['first_relevant']}" if side["first_relevant"] else "nothing relevant found"
    first = " ".join(side["top_text"].split())[:90] or side["top_id"] or "nothing"
    return f"{side['value']:.3f}, {place}; first: {first}"
