"""A run's folder → one HTML page that needs nothing but itself: data in (`collect`), template, page out (`render`).

`collect` reads what the run has written so far and never fails on what is missing: a run that still goes, or one
without evaluation, has a page too. Each entry of `SECTIONS` is one template under `templates/`; a new part of the page
is a new template, its line in `SECTIONS`, and the key of `collect` that it reads, made by a module of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from kinvec.config import read_mapping
from kinvec.contracts import KinvecError
from kinvec.files import write_text
from kinvec.files.reading import read_log
from kinvec.reporting import findings
from kinvec.reporting.browser import browse
from kinvec.reporting.curve import learning_curve, shares
from kinvec.reporting.data import described
from kinvec.reporting.maps import pictures
from kinvec.reporting.reading import flat, read_json, read_results
from kinvec.reporting.rendering import axis, compact, render
from kinvec.reporting.scores import task_table, verdict
from kinvec.reporting.several import collect_several
from kinvec.reporting.similarities import similarities

SECTIONS = (  # anchor, name in the navigation, template; a section of `OPTIONAL` is there only if its data are
    ("scores", "Before and after", "_scores.html.j2"),
    ("guard", "Guard", "_guard.html.j2"),
    ("curve", "Learning curve", "_curve.html.j2"),
    ("queries", "Query by query", "_queries.html.j2"),
    ("maps", "Map", "_maps.html.j2"),
    ("similarities", "Similarities", "_similarities.html.j2"),
    ("mining", "Mined negatives", "_mining.html.j2"),
    ("doctor", "Data doctor", "_doctor.html.j2"),
    ("data", "Data", "_data.html.j2"),
    ("cheaper", "Cheaper vectors", "_cheaper.html.j2"),
    ("settings", "Settings", "_settings.html.j2"),
)
OPTIONAL = ("guard", "queries", "maps", "similarities", "mining", "doctor", "cheaper")


def build_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run's folder and return its path."""
    run_folder = Path(run_folder)
    return write_text(run_folder / "report.html", render(collect(run_folder)))


def collect(run_folder: str | Path) -> dict[str, Any]:
    """Everything the page shows, as plain values. Raises `KinvecError` where the folder is no run's."""
    run = Path(run_folder)
    if not (run / "recipe.yaml").is_file():
        raise KinvecError(f"{run} is no run folder (it has no recipe.yaml); name the folder that kinvec train wrote")
    recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8")
    recipe: dict[str, Any] = read_mapping(run / "recipe.yaml")
    model = read_json(run / "model" / "kinvec.json")
    later = [*(recipe.get("tasks") or {}), *(recipe.get("guard") or {})]  # after what the run itself is judged by
    results = read_results(run, later)
    measured = [task_table(base, tuned) for base, tuned in results]
    both = [[base, tuned] if tuned else [base] for base, tuned in results]
    steps, learned = read_log(run / "log.jsonl"), read_json(run / "data.json")
    curve = learning_curve(steps)
    page: dict[str, Any] = {
        "name": run.resolve().name,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "model": str(recipe.get("model", "")),
        "status": _status(bool(model), curve, measured, recipe),
        "verdict": verdict(measured, recipe, bool(model)),
        "tasks": measured,
        "queries": browse(both, ("Before", "After")),
        "maps": pictures(both),
        "similarities": similarities(both),
        "guard": findings.guard(run),
        "mining": findings.audits(run),
        "doctor": findings.doctor(run),
        "cheaper": findings.cheaper(both),
        "curve": curve,
        "sets": shares(steps, learned.get("sets") or {}),
        "data": described(learned),
        "recipe": recipe_text.strip(),
        "lineage": [flat(stage) for stage in model.get("lineage", [])],
        "environment": flat(read_json(run / "environment.json")),
    }
    return page | {"sections": [section for section in SECTIONS if section[0] not in OPTIONAL or page[section[0]]]}


def _status(
    finished: bool, curve: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]
) -> str:
    if finished and (not recipe.get("evaluate", True) or any(task["by"] for task in measured)):
        return "finished"
    if finished:
        return "trained, not evaluated yet"
    return f"not finished, {curve['steps']:,} steps so far" if curve["steps"] else "not finished, no step yet"


__all__ = ["SECTIONS", "axis", "build_report", "collect", "collect_several", "compact", "render"]
