"""`kinvec train`: recipe in, tuned model, evidence and report out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinvec.console import plain_table
from kinvec.contracts import GateError

if TYPE_CHECKING:
    from rich.table import Table

    from kinvec.recipe import Recipe


def train(recipe: str | Path | None = None, overrides: Sequence[str] = (), force: bool = False) -> dict[str, Any]:
    """Train as the recipe says (a shipped name, a YAML file, or None for the defaults, with `key=value` overrides).

    Returns the run's summary: where everything is, and for every metric base, tuned, difference and interval; of a
    chain of stages that of the last, with all of them under `stages`. With a guard, what became of it is under
    `guard`, and a chain ends with the stage whose verdict is `broken`. With `seeds` all of this is under `runs`, and
    the metrics are means with their spread (`kinvec.seeds`).
    """
    from functools import partial

    from kinvec.pipeline import open_run_data
    from kinvec.recipe import load_seeds
    from kinvec.seeds import run_seeds

    chains, out = load_seeds(recipe, overrides)
    for stage in chains[0][1:]:  # what is wrong with the last one's data is said before the first one trains
        open_run_data(stage)
    if out is None:
        return _run_chain(chains[0], None, force)
    return run_seeds(chains, out, partial(_run_chain, force=force))


def _run_chain(stages: Sequence[Recipe], base: Path | None, force: bool) -> dict[str, Any]:
    """One stage after the other; `base` is a run of the first stage under another seed."""
    from kinvec.console import say
    from kinvec.pipeline import broken, run

    summaries: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            say(f"stage {number} of {len(stages)}: {stage.objective.name} in {stage.out}")
        summaries.append(run(stage, force=force, base=None if summaries else base))
        if broken(summaries[-1]):
            break
    return summaries[-1] | ({"stages": summaries} if len(stages) > 1 else {})


def named(recipe: str, settings: Sequence[str] | None, **flags: Any) -> tuple[str | None, list[str]]:
    """The recipe's name, if it has one, and `key=value` for all that was given besides."""
    given = [recipe, *(settings or [])]
    name = None if "=" in recipe else given.pop(0)
    return name, given + [f"{key}={value}" for key, value in flags.items() if value is not None]


def command(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (scifact, demo), a YAML file, or the first key=value.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value …, for example trainer.epochs=3 (docs/recipe.md)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start the run afresh, deleting what its folder holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto; the same as device=.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; the same as threads=.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or auto; the same as precision=.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and model, say what would be done.")
    ] = False,
) -> None:
    """Train an embedding model on your data, and prove that it got better.

    The same command on the same out= continues a run that was stopped. Settings are key=value; docs/recipe.md has all.
    """
    name, given = named(recipe, settings, device=device, threads=threads, precision=precision)
    if dry_run:
        print(json.dumps(_preview(name, given), indent=2))
        return
    summary = train(name, given, force)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    for one in summary.get("runs", [summary]):
        if one.get("guard", {}).get("verdict") == "broken":
            raise GateError(one["guard"]["said"])


def _preview(name: str | None, given: Sequence[str]) -> dict[str, Any]:
    from kinvec.pipeline import describe_data, open_model, open_run_data
    from kinvec.recipe import load_seeds

    recipe = load_seeds(name, given)[0][0][0]  # the first stage under the first seed
    data = open_run_data(recipe)
    return {"recipe": recipe.model_dump(mode="json"), "data": describe_data(data, open_model(recipe))}


def show(summary: dict[str, Any]) -> None:
    """Print a run's summary for a person: before, after, interval, and where everything is."""
    from rich.console import Console

    console = Console()
    for result in summary["results"]:
        console.print(f"{result['task']}: {result['queries']} test {result['unit']}", highlight=False)
        console.print(_results(result))
        if "seeds" in summary:
            print(f"over {len(summary['seeds'])} seeds, whose mean these figures are:")
            console.print(_seeds(result))
    if "seeds" in summary:
        for one in summary["runs"]:
            console.print(f"model   {one['model']}\nreport  {one['report']}")
    else:
        _show_run(summary, console)


def _results(result: dict[str, Any]) -> Table:
    baselines = result["baselines"]
    table = plain_table("metric", *baselines, "base", "tuned", "difference", "95 % interval", "p")
    for metric, row in result["metrics"].items():
        table.add_row(
            metric, *(f"{beside[metric]:.4f}" if metric in beside else "" for beside in baselines.values()),
            f"{row['base']:.4f}", f"{row['tuned']:.4f}",
            f"{row['difference']:+.4f}", f"{row['low']:+.4f}, {row['high']:+.4f}", f"{row['p']:.4f}",
        )  # fmt: skip
    return table


def _seeds(result: dict[str, Any]) -> Table:
    """How far the seeds are apart, and where the difference lies for other queries and other seeds."""
    table = plain_table("metric", "least", "most", "deviation", "95 % for other queries and seeds")
    for metric, row in result["metrics"].items():
        both = "" if row["low_seeds"] is None else f"{row['low_seeds']:+.4f}, {row['high_seeds']:+.4f}"
        spread = (f"{row[key]:.4f}" for key in ("least", "most", "deviation"))
        table.add_row(metric, *spread, both)
    return table


def _show_run(summary: dict[str, Any], console: Any) -> None:
    """What became of the guard, how long it trained, and where everything is."""
    if "guard" in summary:
        _show_guard(summary["guard"], console)
    training = summary["training"]
    console.print(
        f"trained {training['steps']} steps in {training['seconds']:.0f} s; best at step {training['best_step']}"
    )
    console.print(f"model   {summary['model']}\nreport  {summary['report']}")


def _show_guard(guard: dict[str, Any], console: Any) -> None:
    """Print what became of the guard: a row a guard, the verdict, and of a mixture what it keeps of the gain."""
    mixture = ["model", "drop"] if guard["share"] < 1 else []
    table = plain_table("guard", "metric", "base", "tuned", "drop", "tolerated", *mixture, left=(0, 1))
    for name, row in guard["guards"].items():
        shown = [row["full"], row["model"]] if mixture else [row["full"]]
        drops = [text for drop in shown for text in (f"{drop['value']:.4f}", f"{0 - drop['difference']:.4f}")]
        drops.insert(2, f"{row['tolerance']:g}")
        table.add_row(name, row["metric"], f"{row['base']:.4f}", *drops)
    console.print(table)
    made = f": {guard['share']:g} of the tuned weights, the rest the base's" if mixture else ""
    console.print(f"guard {guard['verdict']}{made}", highlight=False)
    for name, kept in guard["retained"].items():
        gain, whole = (f"{kept[key] - kept['base']:+.4f}" for key in ("model", "full"))
        share = ""  # not of a gain that may be none
        if kept["retained"] is not None:
            share = f", {kept['retained']:.0%} of it (95 % interval {kept['low']:.0%} to {kept['high']:.0%})"
        console.print(f"{name}: {kept['metric']} {gain}, with the whole tuned model {whole}{share}", highlight=False)
