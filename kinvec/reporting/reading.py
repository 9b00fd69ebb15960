"""A run's files, as far as they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kinvec import tasks
from kinvec.contracts import KinvecError, Result
from kinvec.files.reading import read_object
from kinvec.tasks.stored import MANIFEST

SEARCH_METRICS = ("nDCG@10", "RR@10", "R@10", "R@100")  # shown first, in this order; the others follow


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run; nothing where it is not written yet."""
    try:
        return read_object(path)
    except (KinvecError, OSError):
        return {}


def read_results(run: Path, later: Sequence[str] = ()) -> list[tuple[Result, Result | None]]:
    """(base, tuned) of each task that was measured, those named last; tuned is None until training is over."""
    sides: dict[str, dict[str, Result]] = {"base": {}, "tuned": {}}
    for side, found in sides.items():
        for manifest in sorted((run / "results" / side).glob(f"**/{MANIFEST}")):
            found[manifest.parent.name] = tasks.load_result(manifest.parent)
    names = sorted(sides["base"], key=lambda name: later.index(name) if name in later else -1)
    return [(sides["base"][name], sides["tuned"].get(name)) for name in names]


def ordered(names: Iterable[str]) -> list[str]:
    """Names of metrics, those that a person looks for first at the front."""
    names = list(names)
    return [n for n in SEARCH_METRICS if n in names] + [n for n in names if n not in SEARCH_METRICS]


def main_metric(result: Result) -> str:
    """The metric that the page judges by."""
    return ordered(result.metrics)[0]


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested values as `group.key` → text, for tables."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list | tuple):
        text = ", ".join(str(item) for item in value)
    else:
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return {prefix.rstrip("."): text} if text not in ("", "None") else {}
