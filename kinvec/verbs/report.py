"""`kinvec report`: a run's folder → one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, finished or not, to `out` or to the run's `report.html`; returns its path.

    Raises `KinvecError` where the folder is no run's.
    """
    from kinvec.files import write_text
    from kinvec.reporting import build_report, collect, render

    return build_report(run) if out is None else write_text(out, render(collect(run)))


def command(
    run: Annotated[Path, typer.Argument(help="The run folder that kinvec train wrote; the run may still be going.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; unset, report.html in the run folder.")
    ] = None,
) -> None:
    """Turn a run into one HTML page: the verdict, the tables, the learning curve, wins and losses, data, settings.

    The page is one file that loads nothing from anywhere.
    """
    print(report(run, out))
