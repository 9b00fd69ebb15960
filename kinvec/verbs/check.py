"""`kinvec check`: what is wrong with training data, where, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinvec.contracts import RecipeError

SHOWN = 3  # texts of an example in the table

if TYPE_CHECKING:
    from kinvec.checks import Finding, TokenLimit
    from kinvec.doctor import Checked
    from kinvec.embedder import Embedder


def check(
    *sources: str | Path,
    model: str | None = None,
    evaluation: str | Path | None = None,
    split: str = "train",
    kind: str | None = None,
    columns: Mapping[str, Any] | None = None,
    skip_bad: bool = False,
    write: str | Path | None = None,
) -> list[Checked]:
    """Examine each source of training data; `Checked.wrong` says whether training on it would be wrong.

    With `model` the texts it would cut are counted and false negatives are suspected; `evaluation` is data that
    training must share no query with. `write` names a file for the rows of the one source without those whose absence
    is a remedy. Raises `RecipeError` if it is there already, or there are several sources.
    """
    from kinvec.doctor import check_source, write_clean

    if write is not None and (len(sources) != 1 or Path(write).exists()):
        what = f"{write} is there already; name a new file" if len(sources) == 1 else "--write takes one source"
        raise RecipeError(what)

    encoder, limit = _opened(model) if model else (None, None)
    options: dict[str, Any] = {"split": split, "kind": kind, "columns": columns, "skip_bad": skip_bad}
    found = [check_source(source, evaluation=evaluation, limit=limit, encoder=encoder, **options) for source in sources]
    if write is not None and found[0].table is not None:
        write_clean(found[0], write)
    return found


def _opened(model: str) -> tuple[Embedder, TokenLimit]:
    """A model, and how it counts tokens and where it cuts."""
    from kinvec.checks import TokenLimit
    from kinvec.embedder import Embedder

    embedder = Embedder.load(model)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in embedder.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]

    return embedder, TokenLimit(count, embedder.max_length, embedder.prompts)


def command(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC…", help="Files, folders (BEIR too) or hub data sets to train on.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Count the texts that this model cuts; suspect false negatives.")
    ] = None,
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
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the data without the rows that are better left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
) -> None:
    """Examine training data: what is wrong with it, where, and the remedy. Exit code 1 if training would be wrong."""
    from kinvec.doctor import to_json
    from kinvec.files import named_columns

    found = check(
        *sources,
        model=model,
        evaluation=evaluation,
        split=split,
        kind=kind,
        columns=named_columns(column or ()),
        skip_bad=skip_bad,
        write=write,
    )
    if as_json:
        print(json.dumps(to_json(found), indent=2, ensure_ascii=False))
    else:
        for checked in found:
            show(checked, write)
    if any(checked.wrong for checked in found):
        raise typer.Exit(1)


def show(checked: Checked, written: Path | None = None) -> None:
    """The summary, a table of findings (worst first), the verdict, and what was not looked at."""
    from rich.console import Console

    console = Console(soft_wrap=False, highlight=False)
    console.print(_summary_line(checked), markup=False)
    if checked.findings:
        console.print(_finding_table(checked))
    console.print(f"{checked.source}: {checked.verdict}.", markup=False, style="bold")
    if written is not None and checked.table is not None:
        kept = len(checked.table) - len(checked.drop)
        console.print(f"{written}: {kept:,} rows, {len(checked.drop):,} left out.", markup=False)
    elif len(checked.drop):
        many = "1 row is" if len(checked.drop) == 1 else f"{len(checked.drop):,} rows are"
        console.print(f"{many} better left out; the same command with --write FILE writes the others.", markup=False)
    for rule, remedy in checked.not_looked.items():
        console.print(f"{rule}: not looked for: {remedy}", markup=False, style="dim")


def _summary_line(checked: Checked) -> str:
    summary = {key: value for key, value in checked.summary.items() if key != "fingerprint" and value not in (0, None)}
    shown = [f"{key.replace('_', ' ')} {value:,}" for key, value in summary.items() if key != "kind"]
    return f"{checked.source}: {summary.get('kind', 'cannot be read')}" + (f" ({', '.join(shown)})" if shown else "")


def _finding_table(checked: Checked) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    table.add_column("finding, where, example, remedy")
    for finding in checked.findings:
        place = _place(finding, checked.source)
        told = [
            Text.assemble(finding.message, (f"  {place}", "cyan")),
            *(Text(line, "dim", no_wrap=True, overflow="ellipsis") for line in _example(finding)),
            Text(f"→ {finding.remedy}"),
        ]
        share = "" if finding.share is None else f"{finding.share:.1%}"
        table.add_row(Text(finding.severity, colours[finding.severity]), f"{finding.count:,}", share, Group(*told))
    return table


def _example(finding: Finding) -> list[str]:
    """The first example: what it shows, and a line for each of its texts."""
    if not finding.examples:
        return []
    first = finding.examples[0]
    lines = ["  " + " ".join(one["text"].split()) for one in first["texts"][:SHOWN]]
    return [f"{first['note']}:", *lines] if first["note"] else lines


def _place(finding: Finding, source: str) -> str:
    """The place, without what the summary names already."""
    inside = finding.file.removeprefix(source).lstrip("/")
    if not inside:
        return f"line\u00a0{finding.line}" if finding.line else ""  # a space that does not break
    return f"{inside}:{finding.line}" if finding.line else inside
