"""`kinvec report`: a run's folder, or several, → one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, finished or not, to `out` or to the run's `report.html`; returns its path.

    With `others` the page compares them to the first: runs, runs of several seeds, or results; it goes to `out` or to
    `comparison.html` here. So it does for the seeds of one recipe. Raises `KinvecError` where a folder is no run's, or
    they have no task in common.
    """
    from kinvec.contracts import one_sentence
    from kinvec.files import write_text
    from kinvec.reporting import build_report, collect, collect_several, render
    from kinvec.tasks.systems import SEEDS_FILE

    with one_sentence(f"{run}: a file of the run is not as kinvec writes it", "restore it, or take it away"):
        if others or (Path(run) / SEEDS_FILE).is_file():
            return write_text(out or "comparison.html", render(collect_several([run, *others])))
        return build_report(run) if out is None else write_text(out, render(collect(run)))


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="A run folder that kinvec train wrote, still going or finished; or several to compare."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the page; unset, report.html in the run folder, or of several comparison.html."
        ),
    ] = None,
) -> None:
    """Turn a run into one HTML page: verdict, tables, curves, every query with what both models found, map, data.

    Of several runs, or results that kinvec evaluate wrote, the page compares all with the first. It is one file that
    loads nothing from anywhere.
    """
    print(report(runs[0], *runs[1:], out=out))
