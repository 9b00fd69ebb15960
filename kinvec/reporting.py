"""A run's folder → one HTML page that needs nothing but itself: data in (`collect`), template, page out (`render`).

`collect` reads what the run has written so far and never fails on what is missing: a run that still goes, or one
without evaluation, has a page too. Each entry of `SECTIONS` is one template under `templates/`; a new part of the page
is a new template, its line in `SECTIONS`, and the key of `collect` that it reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from kinvec import tasks
from kinvec.contracts import KinvecError, Result
from kinvec.files import write_text
from kinvec.tasks.stored import MANIFEST

SECTIONS = (  # anchor, name in the navigation, template
    ("scores", "Before and after", "_scores.html.j2"),
    ("curve", "Learning curve", "_curve.html.j2"),
    ("examples", "Wins and losses", "_examples.html.j2"),
    ("data", "Data", "_data.html.j2"),
    ("settings", "Settings", "_settings.html.j2"),
)
Number = float | int  # JSON has both for the same thing

POINTS = 400  # of a learning curve that are drawn: more than a screen tells apart
SMOOTHING = 0.9  # of the loss: each point keeps this share of the last
EXAMPLES = 6  # wins, and losses, of each task
COLOURS = 8  # labels of a picture that have a colour of their own
SEARCH_METRICS = ("nDCG@10", "RR@10", "R@10", "R@100")  # shown first, in this order; the others follow


def build_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run's folder and return its path."""
    run_folder = Path(run_folder)
    return write_text(run_folder / "report.html", render(collect(run_folder)))


# --- Data in --------------------------------------------------------------------------------------------------------


def collect(run_folder: str | Path) -> dict[str, Any]:
    """Everything the page shows, as plain values. Raises `KinvecError` where the folder is no run's."""
    run = Path(run_folder)
    if not (run / "recipe.yaml").is_file():
        raise KinvecError(f"{run} is no run folder (it has no recipe.yaml); name the folder that kinvec train wrote")
    recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8")
    recipe: dict[str, Any] = yaml.safe_load(recipe_text) or {}
    model = _json(run / "model" / "kinvec.json")
    measured = [_task(base, tuned) for base, tuned in _results(run)]
    steps, described = _log(run / "log.jsonl"), _json(run / "data.json")
    curve = _curve(steps)
    return {
        "name": run.resolve().name,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "model": str(recipe.get("model", "")),
        "status": _status(bool(model), curve, measured, recipe),
        "verdict": _verdict(measured, recipe, bool(model)),
        "tasks": measured,
        "curve": curve,
        "sets": _sets(steps, described.get("sets") or {}),
        "data": _data(described),
        "recipe": recipe_text.strip(),
        "lineage": [_flat(stage) for stage in model.get("lineage", [])],
        "environment": _flat(_json(run / "environment.json")),
    }


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of the run; nothing where it is not written yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _log(path: Path) -> list[dict[str, Any]]:
    """The steps of `log.jsonl`; the last line of a run that still goes may be half a line and is left out."""
    steps = []
    if path.exists():
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                try:
                    steps.append(json.loads(line))
                except ValueError:
                    continue
    return [step for step in steps if isinstance(step, dict) and "step" in step]


def _results(run: Path) -> list[tuple[Result, Result | None]]:
    """(base, tuned) of each task that was measured; tuned is None until training is over."""
    sides: dict[str, dict[str, Result]] = {"base": {}, "tuned": {}}
    for side, found in sides.items():
        for manifest in sorted((run / "results" / side).glob(f"**/{MANIFEST}")):
            found[manifest.parent.name] = tasks.load_result(manifest.parent)
    return [(base, sides["tuned"].get(name)) for name, base in sides["base"].items()]


def _task(base: Result, tuned: Result | None) -> dict[str, Any]:
    """One task's table: a row for each metric, main metric first, with both values, intervals, difference and BM25."""
    comparison = tasks.compare(base, tuned, by=_main_metric(base), shown=EXAMPLES) if tuned else None
    differences = {d.metric: asdict(d) for d in comparison.metrics} if comparison else {}
    bm25 = base.baselines.get("BM25", {})
    rows: list[dict[str, Any]] = [
        {
            "metric": name,
            "base": _with_interval(name, base),
            "tuned": _with_interval(name, tuned) if tuned else None,
            "difference": differences.get(name),
            "bm25": bm25.get(name),
            "drawn": not name.startswith("P@"),  # bounded by relevant documents / k, far below the others' scale
        }
        for name in _ordered(base.metrics)
    ]
    drawn = [row for row in rows if row["drawn"]] or rows
    shown = [row[side] for row in drawn for side in ("base", "tuned") if row[side]]
    ends = [end for value in shown for end in (value["low"], value["high"])] + [r["bm25"] for r in drawn if r["bm25"]]
    return {
        "name": base.task,
        "kind": base.kind,
        "unit": tasks.unit_of(base.kind),
        "split": base.split,
        "queries": len(base.per_query["id"]),
        "models": {"base": base.model, "tuned": tuned.model if tuned else None},
        "precision": tuned.precision if tuned else base.precision,
        "rows": rows,
        "axis": axis(ends, low=0.0 if min(ends) >= 0 else -1.0, high=1.0),
        "map": _map(base, tuned),
        "by": comparison.by if comparison else None,
        "wins": [asdict(change) for change in comparison.wins] if comparison else [],
        "losses": [asdict(change) for change in comparison.losses] if comparison else [],
    }


def _map(base: Result, tuned: Result | None) -> dict[str, Any] | None:
    """The texts in the plane before and after, by label; of many labels those that the base recovers worst."""
    if "x" not in base.per_query or all(x is None for x in base.per_query["x"]):
        return None
    worst: dict[str, list[float]] = {}
    for label, value in zip(base.per_query["label"], base.per_query[_main_metric(base)], strict=True):
        worst.setdefault(label, []).append(value)
    labels = sorted(worst, key=lambda label: float(np.mean(worst[label])))[:COLOURS]
    named = sorted(labels)
    colour = {label: number for number, label in enumerate(named)}
    sides = [(title, _places(side, colour)) for title, side in (("Before", base), ("After", tuned)) if side]
    return {"labels": named, "others": len(worst) - len(named), "sides": sides}


def _places(result: Result, colour: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each text's place in per cent of a square, at one scale in both directions; texts without a colour first."""
    rows = zip(*(result.per_query[column] for column in ("x", "y", "label", "query")), strict=True)
    found = [(x, y, label, text) for x, y, label, text in rows if x is not None]
    xs, ys = ([row[i] for row in found] for i in (0, 1))
    scale = 94 / (max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0)
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    dots = [
        {
            "x": round(50 + (x - middle[0]) * scale, 1), "y": round(50 - (y - middle[1]) * scale, 1),
            "colour": colour.get(label), "title": f"{label}: {snippet(text, 90)}",
        }
        for x, y, label, text in found
    ]  # fmt: skip
    return sorted(dots, key=lambda dot: dot["colour"] is not None)


def _ordered(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [n for n in SEARCH_METRICS if n in names] + [n for n in names if n not in SEARCH_METRICS]


def _main_metric(result: Result) -> str:
    return _ordered(result.metrics)[0]


def _with_interval(name: str, result: Result) -> dict[str, float]:
    """The metric and its 95 % bootstrap interval; a statistic of the whole set is recomputed on each resample."""
    low, high = tasks.statistic(name).interval(result.per_query)
    return {"value": result.metrics[name], "low": low, "high": high}


def _verdict(measured: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], finished: bool) -> dict[str, Any]:
    """The whole run in one sentence, by the first task's main metric."""
    compared = [task for task in measured if task["by"]]
    if not compared:
        if not recipe.get("evaluate", True):
            rest = "This run's evaluation was switched off (evaluate: false)."
        elif finished:
            rest = "There is a trained model, but no result of it yet."
        else:
            rest = "The model is not trained yet."
        return {"word": "unknown", "head": "Not measured.", "rest": rest, "also": [], "difference": None}
    first, *others = compared
    row = next(row for row in first["rows"] if row["metric"] == first["by"])
    d = row["difference"]
    word = _word(d)
    head = {"better": "Better by {}:", "worse": "Worse by {}:", "unclear": "No clear change:"}[word]
    counted = f"{first['queries']:,} {first['unit']}"
    moved = f"{d['metric']} from {number(d['a'])} to {number(d['b'])}"
    interval = f"95 % interval of the difference {signed(d['low'])} to {signed(d['high'])}"
    return {
        "word": word,
        "head": head.format(number(abs(d["difference"]))),
        "rest": f"{moved} ({interval}, {counted}, p {p_value(d['p'])}).",
        "also": _also(row, first["unit"], others),
        "difference": d,
    }


def _word(difference: Mapping[str, Any]) -> str:
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "unclear"


def _also(row: Mapping[str, Any], unit: str, others: Sequence[Mapping[str, Any]]) -> list[str]:
    d, told = row["difference"], []
    if row["bm25"] is not None:
        side = "ahead of" if d["b"] > row["bm25"] else "behind" if d["b"] < row["bm25"] else "level with"
        told.append(f"The tuned model is {side} BM25, which has {number(row['bm25'])} on the same queries.")
    told.append(f"{d['won']:,} {unit} won, {d['tied']:,} unchanged, {d['lost']:,} lost.")
    for task in others:
        other = next(r for r in task["rows"] if r["metric"] == task["by"])["difference"]
        told.append(
            f"{task['name']}: {_word(other)}, {task['by']} {number(other['a'])} → {number(other['b'])} "
            f"({signed(other['low'])} to {signed(other['high'])})."
        )
    return told


def _status(
    finished: bool, curve: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]
) -> str:
    if finished and (not recipe.get("evaluate", True) or any(task["by"] for task in measured)):
        return "finished"
    if finished:
        return "trained, not evaluated yet"
    return f"not finished, {curve['steps']:,} steps so far" if curve["steps"] else "not finished, no step yet"


def _curve(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Loss (raw and smoothed), learning rate and dev metric over the steps, thinned to what a screen can show."""
    steps = sorted(steps, key=lambda step: step["step"])
    smooth: list[float] = []
    weight = total = 0.0
    for step in steps:  # bias-corrected exponential mean, as Adam's
        weight, total = SMOOTHING * weight + 1 - SMOOTHING, SMOOTHING * total + (1 - SMOOTHING) * step.get("loss", 0.0)
        smooth.append(total / weight)
    dev_name = next((name for step in steps for name in step.get("dev") or {}), None)
    dev = [(step["step"], step["dev"][dev_name]) for step in steps if dev_name in (step.get("dev") or {})]
    kept = sorted({*range(0, len(steps), math.ceil(len(steps) / POINTS) or 1), len(steps) - 1} - {-1})
    best = max(dev, key=lambda point: point[1], default=None)
    thin = [steps[i] for i in kept]
    return {
        "steps": len(steps),
        "step": [step["step"] for step in thin],
        "loss": [step.get("loss", 0.0) for step in thin],
        "smooth": [smooth[i] for i in kept],
        "lr": [step.get("lr", 0.0) for step in thin],
        "dev": dev,
        "dev_name": dev_name,
        "val_loss": [
            (step["step"], step["dev"]["val_loss"]) for step in steps if "val_loss" in (step.get("dev") or {})
        ],
        "best": best,
        "axis": axis([0.0, *(step["step"] for step in thin)], tight=True),
        "tokens": sum(step.get("tokens", 0) for step in steps),
        "tokens_per_second": float(np.median([step.get("tokens_per_s", 0.0) for step in steps])) if steps else 0.0,
        "readout": [_readout(step, dev_name) for step in thin],
    }


def _sets(steps: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of several data sets: rows each has and gave so far, and the mean loss in its first and last tenth of steps."""
    total = sum(sum(step.get("sets", {}).values()) for step in steps)
    told = []
    for name, own in described.items():
        losses = [step[f"loss/{name}"] for step in steps if f"loss/{name}" in step]
        tenth = max(1, len(losses) // 10)
        seen = sum(step.get("sets", {}).get(name, 0) for step in steps)
        told.append(
            {
                "name": name, **own, "seen": seen, "share": seen / max(total, 1),
                "first": float(np.mean(losses[:tenth])) if losses else None,
                "last": float(np.mean(losses[-tenth:])) if losses else None,
            }
        )  # fmt: skip
    return told


def _readout(step: Mapping[str, Any], dev_name: str | None) -> str:
    parts = [f"step {step['step']:,}", f"loss {step.get('loss', 0.0):.4f}", f"learning rate {step.get('lr', 0.0):.2e}"]
    if dev_name in (step.get("dev") or {}):
        parts.append(f"dev {dev_name} {number(step['dev'][dev_name])}")
    return " · ".join(parts)


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data.json` in the order of the page: counts, token lengths, warnings, and whatever else the run recorded."""
    known = ("counts", "tokens", "warnings", "sets")
    limit = data.get("max_length")
    return {
        "counts": _flat(data.get("counts") or {}),
        "lengths": [_histogram(side, summary, limit) for side, summary in (data.get("tokens") or {}).items()],
        "warnings": [str(warning) for warning in data.get("warnings") or []],
        "other": _flat({key: value for key, value in data.items() if key not in known}),
    }


def _histogram(side: str, summary: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Token lengths as bars of `from`–`to` tokens; `cut` where all of a bar's texts are longer than the maximum."""
    stored = summary.get("histogram") or {"counts": [], "edges": []}
    ends = zip(stored["counts"], stored["edges"], stored["edges"][1:], strict=False)
    bars = [{"count": n, "from": a, "to": b, "cut": limit is not None and a >= limit} for n, a, b in ends]
    return {
        "side": side,
        "bars": bars,
        "highest": max((bar["count"] for bar in bars), default=1),
        "axis": axis(stored["edges"], tight=True),
        "limit": limit,
        **{key: summary.get(key) for key in ("mean", "p95", "max", "truncated_share", "sampled")},
    }


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested values as `group.key` → text, for tables."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list | tuple):
        text = ", ".join(str(item) for item in value)
    else:
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return {prefix.rstrip("."): text} if text not in ("", "None") else {}


# --- Page out -------------------------------------------------------------------------------------------------------


def render(data: Mapping[str, Any]) -> str:
    """The page, from what `collect` returned."""
    templates = Environment(
        loader=PackageLoader("kinvec"),
        autoescape=lambda name: name is None or not name.endswith((".css", ".js")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "number": number,
        "signed": signed,
        "p_value": p_value,
        "compact": compact,
        "snippet": snippet,
    }
    templates.globals |= {"axis": axis, "zip": zip}
    return templates.get_template("report.html.j2").render(data, sections=SECTIONS)


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from values to per cent of a plot's width or height, with round ticks."""

    low: Number
    high: Number
    ticks: list[float]

    def at(self, value: Number) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def down(self, value: Number) -> float:
        """Per cent from the top: the place of the value on a vertical axis."""
        return round(100 - self.at(value), 3)


def axis(
    values: Sequence[Number], *, low: Number = -math.inf, high: Number = math.inf, ticks: int = 4, tight: bool = False
) -> Axis:
    """An axis that shows all values, within [low, high] where those bound what is possible.

    Ends are round numbers, or with `tight` the values' own. Ticks are 1, 2, 2.5 or 5 times a power of ten apart.
    """
    first, last = (min(values), max(values)) if len(values) else (0.0, 1.0)
    span = (last - first) or abs(first) / 10 or 1.0
    rough = span / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    start, end = math.floor(first / step) * step, math.ceil(last / step) * step
    if end <= start:
        start, end = (start, start + step) if start + step <= high else (start - step, start)
    marks = [round(start + i * step, 12) for i in range(round((end - start) / step) + 1)]
    if tight and last > first:
        start, end = first, last
    start, end = max(start, low), min(end, high)
    return Axis(start, end, [mark for mark in marks if start - step * 1e-6 <= mark <= end + step * 1e-6])


def number(value: Number) -> str:
    """A metric to four places."""
    return f"{value:.4f}"


def signed(value: Number) -> str:
    """A difference to four places, with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def p_value(p: Number) -> str:
    """`< 0.001`, or `= 0.034`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def compact(value: Number) -> str:
    """A tick's label: 1,200 · 0.25 · 2e-5."""
    if value and abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4f}".rstrip("0").rstrip(".").replace("-", "−")


def snippet(text: str | None, length: int = 170) -> str:
    """The beginning of a text, cut between words."""
    text = " ".join((text or "").split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"
