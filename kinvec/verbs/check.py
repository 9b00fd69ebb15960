"""`kinvec check`: what is wrong with training data, where, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinvec.contracts import RecipeError

if TYPE_CHECKING:
    from kinvec.checks import Checked, Problem, TokenLimit


def check(
    *sources: str | Path,
    model: str | None = None,
    evaluation: str | Path | None = None,
    split: str = "train",
    kind: str | None = None,
    columns: Mapping[str, Any] | None = None,
    skip_bad: bool = False,
) -> list[Checked]:
    """Check each source of training data; `Checked.wrong` says whether training on it would be wrong.

    With `model` the texts it would cut are counted; `evaluation` is data that training must share no query with.
    """
    from kinvec.checks import check_source

    limit = token_limit(model) if model else None
    options: dict[str, Any] = {"split": split, "kind": kind, "columns": columns, "skip_bad": skip_bad}
    return [check_source(source, evaluation=evaluation, limit=limit, **options) for source in sources]


def token_limit(model: str) -> TokenLimit:
    """How a model counts tokens and where it cuts, from its folder."""
    from kinvec.checks import TokenLimit
    from kinvec.embedder import Embedder

    embedder = Embedder.load(model, device="cpu", precision="fp32")

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in embedder.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]

    return TokenLimit(count, embedder.max_length, embedder.prompts)


def command(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC…", help="Files, folders (BEIR too) or hub data sets to train on.")
    ],
    model: Annotated[str | None, typer.Option(help="Count the texts that this model would cut.")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Evaluation data that must share no query (BEIR: its own test split).")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to check, where the source has several.")] = "train",
    kind: Annotated[str | None, typer.Option(help="retrieval, pairs, labelled or texts, if detected wrongly.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=NAME", help="A column by another name, as in query=question.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Rows that cannot be read are dropped: warnings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
) -> None:
    """Say what is wrong with training data: file, line and remedy. Exit code 1 if training on it would be wrong."""
    found = check(
        *sources,
        model=model,
        evaluation=evaluation,
        split=split,
        kind=kind,
        columns=_columns(column),
        skip_bad=skip_bad,
    )
    if as_json:
        print(json.dumps([checked.to_json() for checked in found], indent=2, ensure_ascii=False))
    else:
        for checked in found:
            show(checked)
    if any(checked.wrong for checked in found):
        raise typer.Exit(1)


def _columns(given: list[str] | None) -> dict[str, str] | None:
    for pair in given or []:
        if "=" not in pair:
            raise RecipeError(f"--column {pair} names no column; write ROLE=NAME, for example --column query=question")
    return {role: name for role, name in (pair.split("=", 1) for pair in given)} if given else None


def show(checked: Checked) -> None:
    """The summary, a table of problems (worst first) and a verdict."""
    from rich.console import Console

    console = Console(soft_wrap=False, highlight=False)
    console.print(_summary_line(checked), markup=False)
    if checked.problems:
        console.print(_problem_table(checked))
    counts = {s: sum(p.severity == s for p in checked.problems) for s in ("error", "warning", "note")}
    said = ", ".join(f"{n} {severity}{'s' if n > 1 else ''}" for severity, n in counts.items() if n)
    verdict = "training on this would be wrong" if checked.wrong else "fit for training"
    console.print(f"{checked.source}: {verdict}" + (f" ({said})." if said else "; nothing found wrong."), markup=False)


def _summary_line(checked: Checked) -> str:
    summary = {key: value for key, value in checked.summary.items() if key != "fingerprint" and value not in (0, None)}
    shown = [f"{key.replace('_', ' ')} {value:,}" for key, value in summary.items() if key != "kind"]
    return f"{checked.source}: {summary.get('kind', 'cannot be read')}" + (f" ({', '.join(shown)})" if shown else "")


def _problem_table(checked: Checked) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("problem")
    table.add_column("where", no_wrap=True, overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("remedy")
    for problem in checked.problems:
        cells = (problem.message, _place(problem, checked.source), f"{problem.count:,}", problem.remedy)
        table.add_row(Text(problem.severity, colours[problem.severity]), *map(Text, cells))
    return table


def _place(problem: Problem, source: str) -> str:
    """The place, without the folder that the summary names already."""
    short = problem.file.removeprefix(source).lstrip("/") or Path(source).name
    return f"{short}:{problem.line}" if problem.line else short
