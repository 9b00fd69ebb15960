"""The forgetting guard: what a tuned model may lose elsewhere, and the mixture with its base that keeps to it.

A guard is a task with a tolerated drop. Where the tuned model drops by more, the weights between base and tuned model,
(1 − a) · base + a · tuned for a share a in `SHARES`, are measured: on the dev data of the run for the gain, and on the
dev data of every guard for the drop (interpolation in weight space: Wortsman et al. 2022, "Robust fine-tuning of
zero-shot models", equation 1; for embeddings Xiao et al. 2023, "LM-Cocktail"). Adapters need no path of their own: with
W = base + B·A, scaling B·A by a is the same mixture.

Of the shares whose drop keeps to the tolerance with its whole 95 % interval, the one with the best dev measure of the
run is chosen. The interval, and not the drop alone, because a share just at the edge on the data that choose is beyond
it on other data half of the time. The test data of the run choose nothing. The verdict is the drop, as measured, on
the guard's test data, which choose only where the guard has no dev data (`chosen_on` says so).

`guard.json` in the run's folder, rewritten after each share so that a killed sweep continues, holds:

    verdict   null while the sweep goes, then `held` (by the tuned model itself), `restored` (by a mixture), `broken`
    said      the verdict as a sentence
    share     of the tuned weights in `model/`: 1.0 unless a mixture was chosen
    guards    name → {metric, tolerance, chosen_on: dev | test, base, full: DROP, model: DROP}
    measure   the run's dev measure that chooses, such as nDCG@10; null where there was no sweep
    points    the curves: [{share, dev: value, guards: {name: DROP}}], shares ascending; [] where there was no sweep
    retained  what a mixture keeps of the gain, on the run's test data and each further task: name → {metric, base,
              full, model, retained, low, high}; {} unless a mixture was chosen

where DROP is {value, difference, low, high, p}: the figure, its difference to the base (a drop is negative) with the
95 % paired interval, and the p-value. `full` is the tuned model as trained, `model` what `model/` holds. The results
of `full` lie in `results/full/` where a mixture was chosen, whose results are in `results/tuned/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kinvec import tasks
from kinvec.console import say
from kinvec.contracts import KinvecError, Problem, RecipeError, Result
from kinvec.embedder import Embedder, open_folder, with_prompts
from kinvec.files import write_json
from kinvec.folder import optional_json
from kinvec.tasks.further import Task, TaskSettings

GUARD_FILE = "guard.json"
SHARES = tuple(tenth / 10 for tenth in range(11))  # 0 is the base, 1 the tuned model
RESAMPLES = 2_000  # of the share of the gain that is retained

Drop = dict[str, float]
Develop = Callable[[Embedder], Mapping[str, float]]
Evaluate = Callable[[Path, Embedder], None]


class GuardSettings(TaskSettings):
    """What the model must not lose: a task, with all keys of one under `tasks`, and how much it may drop."""

    dev: str | None = None
    """Data of the same kind that chooses among mixtures; unset, the split `dev` beside `split`, else `data` itself."""
    metric: str | None = None
    """The measure that counts; unset, the task's main one."""
    tolerance: float = Field(0.01, ge=0)
    """The largest tolerated drop of the measure, as an absolute difference to the model that the run started from."""


@dataclass(frozen=True)
class Guard(Task):
    """A guard, opened. `dev` chooses among mixtures, `problem` gives the verdict; they may be the same."""

    settings: GuardSettings
    dev: Problem


def interpolate(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 − share) · base + share · tuned, in float32; what is no floating number is the tuned model's.

    Raises `KinvecError` where the two have not the same weights.
    """
    if mismatched := [key for key in tuned if key not in base or base[key].shape != tuned[key].shape]:
        raise KinvecError(
            f"the base and the tuned model differ in their weights ('{mismatched[0]}'): no mixture of them"
        )
    return {
        key: torch.lerp(base[key].float(), value.float(), share) if value.is_floating_point() else value
        for key, value in tuned.items()
    }


def keep_guards(
    run: Path, embedder: Embedder, base: str, guards: Sequence[Guard], develop: Develop, evaluate: Evaluate
) -> dict[str, Any]:
    """Judge the tuned model of a run by its guards, and put a mixture in its place where that holds them.

    `embedder` is the tuned model, whose results are in `results/tuned/`; afterwards it is what `model/` holds. `base`
    names the model that the run started from, `evaluate` writes a model's results into a folder. Returns what
    `guard.json` says; what it says already is not done again.
    """
    told = optional_json(run / GUARD_FILE)
    if told.get("verdict"):
        return told
    results = run / "results"
    full = results / ("full" if (results / "full").is_dir() else "tuned")
    told = _judged(told, guards, results / "base", full, "full")
    if all(_holds(guard, "full") for guard in told["guards"].values()):
        return _conclude(run, told, "held")
    share = choose(_swept(run, told, embedder, base, guards, develop), told["guards"])
    if share is None:
        return _conclude(run, told, "broken")
    told["share"] = share
    _put(run, embedder, base, share)
    if full.name == "tuned":  # only now: until then a killed run finds the results of the model it finds
        os.replace(full, results / "full")
    evaluate(results / "tuned", embedder)
    told = _judged(told, guards, results / "base", results / "tuned", "model")
    told["retained"] = {
        path.name: retained(*(tasks.load_result(results / side / path.name) for side in ("base", "full", "tuned")))
        for path in sorted((results / "tuned").iterdir())
        if path.name not in told["guards"]
    }
    held = all(_holds(guard, "model") for guard in told["guards"].values())
    return _conclude(run, told, "restored" if held else "broken")


def check_metrics(guards: Sequence[Guard], base: Path) -> None:
    """Raise `RecipeError` where a guard's metric is none that the base was measured by."""
    for guard in guards:
        measured, metric = tasks.load_result(base / guard.name).metrics, guard.settings.metric
        if metric is not None and metric not in measured:
            there = ", ".join(measured)
            raise RecipeError(f"guard.{guard.name}.metric: '{metric}' is not measured there; there are {there}")


# --- The verdict ----------------------------------------------------------------------------------------------------


def _judged(told: dict[str, Any], guards: Sequence[Guard], base: Path, folder: Path, model: str) -> dict[str, Any]:
    """What is told, with every guard's drop of the results in `folder`, under the name of their model."""
    found = dict(told.get("guards", {}))
    for guard in guards:
        before, after = (tasks.load_result(place / guard.name) for place in (base, folder))
        metric = guard.settings.metric or next(iter(before.metrics))
        said = {
            "metric": metric, "tolerance": guard.settings.tolerance,
            "chosen_on": "test" if guard.dev is guard.problem else "dev", "base": before.metrics[metric],
        }  # fmt: skip
        found[guard.name] = said | found.get(guard.name, {}) | {model: drop(before, after, metric)}
    nothing: dict[str, Any] = {"verdict": None, "said": "", "share": 1.0, "measure": None, "points": [], "retained": {}}
    return nothing | told | {"guards": found}


def drop(base: Result, other: Result, metric: str) -> Drop:
    """The metric of `other`, its difference to the base (negative: a drop), 95 % paired interval, and p-value."""
    assert base.per_query["id"] == other.per_query["id"], "results of one task"
    (low, high), p = tasks.statistic(metric).difference(base.per_query, other.per_query, 0)
    value = other.metrics[metric]
    return {"value": value, "difference": value - base.metrics[metric], "low": low, "high": high, "p": p}


def _holds(guard: Mapping[str, Any], model: str) -> bool:
    return bool(guard[model]["difference"] >= -guard["tolerance"])


def _conclude(run: Path, told: dict[str, Any], verdict: str) -> dict[str, Any]:
    """With the verdict, in a word and in a sentence, and written."""
    for guard in told["guards"].values():
        guard.setdefault("model", guard["full"])
    told |= {"verdict": verdict, "said": _sentence(told, verdict)}
    write_json(run / GUARD_FILE, told)
    say(told["said"])
    return told


def _sentence(told: Mapping[str, Any], verdict: str) -> str:
    parts = "; ".join(_told(name, guard, "full") for name, guard in told["guards"].items())
    if verdict == "held":
        return f"the guard holds: {parts}"
    share = f"{told['share']:g} of the tuned weights"
    after = "; ".join(_told(name, guard, "model") for name, guard in told["guards"].items())
    if verdict == "restored":
        return f"the guard holds with {share} (and the rest of the base): {after}; the whole tuned model: {parts}"
    remedy = "train for fewer steps or at a lower rate, or tolerate more (guard.NAME.tolerance)"
    if told["share"] < 1:
        return f"the guard is broken: with {share}, which held it where it was chosen, {after}; {remedy}"
    return (
        f"the guard is broken: {parts}; no share of the tuned weights keeps it, and the model is as trained; {remedy}"
    )


def _told(name: str, guard: Mapping[str, Any], model: str) -> str:
    found = guard[model]
    sure = "significant" if found["low"] > 0 or found["high"] < 0 else "not significant"
    return (
        f"{name}, {guard['metric']} {guard['base']:.4f} → {found['value']:.4f} ({found['difference']:+.4f}, {sure}, "
        f"95 % interval {found['low']:+.4f} to {found['high']:+.4f}; tolerated −{guard['tolerance']:g})"
    )


# --- The sweep ------------------------------------------------------------------------------------------------------


def _swept(
    run: Path, told: dict[str, Any], embedder: Embedder, base: str, guards: Sequence[Guard], develop: Develop
) -> list[dict[str, Any]]:
    """The points of all shares, measured where they are not told yet; `embedder` changes, and is left as tuned."""
    left = [share for share in SHARES if share not in [point["share"] for point in told["points"]]]
    if not left:
        return told["points"]
    start, end = open_folder(base).state_dict(), open_folder(run / "model").state_dict()
    metrics = {name: guard["metric"] for name, guard in told["guards"].items()}
    embedder.load_state_dict(start)
    before = {guard.name: _measure(guard, embedder, metrics[guard.name]) for guard in guards}
    for share in left:
        say(f"the guard is broken: measuring a mixture, {share:g} tuned and {1 - share:g} base")
        embedder.load_state_dict(interpolate(start, end, share))
        found = dict(develop(embedder))
        told["measure"] = next(iter(found))
        drops = {
            guard.name: drop(before[guard.name], _measure(guard, embedder, metrics[guard.name]), metrics[guard.name])
            for guard in guards
        }
        told["points"].append({"share": share, "dev": found[told["measure"]], "guards": drops})
        write_json(run / GUARD_FILE, told)
    embedder.load_state_dict(end)
    return told["points"]


def _measure(guard: Guard, encoder: Embedder, metric: str) -> Result:
    """The metric on the data that choose; scored pairs have no choice of measures."""
    measures = () if guard.dev.kind == "similarity" else (metric,)
    return tasks.measure(guard.dev, with_prompts(encoder, guard.settings.prompts), measures)


def choose(points: Sequence[Mapping[str, Any]], guards: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The share with the best dev measure among the mixtures that keep every guard with the whole interval; of equals
    the largest. None where none does.
    """
    keeping = [
        point
        for point in points
        if 0 < point["share"] < 1  # the tuned model itself has broken a guard, if not on these data
        and all(point["guards"][name]["low"] >= -guard["tolerance"] for name, guard in guards.items())
    ]
    return max(keeping, key=lambda point: (point["dev"], point["share"]))["share"] if keeping else None


def _put(run: Path, embedder: Embedder, base: str, share: float) -> None:
    """Make the mixture the run's model, unless it is already: its lineage says so. An adapter is scaled alike."""
    model = open_folder(run / "model")
    if "share" not in model.lineage[-1]:
        model.load_state_dict(interpolate(open_folder(base).state_dict(), model.state_dict(), share))
        model.lineage[-1]["share"] = share
        adapter = run / "adapter" / "adapter_config.json"
        if adapter.is_file():  # from the recipe's value, so that a second time scales no further
            alpha = model.lineage[-1]["recipe"]["lora"]["alpha"]
            write_json(adapter, json.loads(adapter.read_text("utf-8")) | {"lora_alpha": alpha * share})
        model.save(run / "model")
    embedder.load_state_dict(model.state_dict())
    embedder.lineage = model.lineage


# --- What is retained -----------------------------------------------------------------------------------------------


def retained(base: Result, full: Result, model: Result) -> dict[str, Any]:
    """The share of the gain by the task's main metric that a mixture keeps: (model − base) / (full − base).

    The 95 % interval is the percentile bootstrap of the ratio, rows resampled with all three models' values. All three
    are null where more than a fortieth of the resamples have no gain: a share of what may be nothing says nothing.
    """
    metric = next(iter(base.metrics))
    values = [result.metrics[metric] for result in (base, full, model)]
    told = {"metric": metric, **dict(zip(("base", "full", "model"), values, strict=True))}
    columns = [_columns(result) for result in (base, full, model)]
    value, draws, n = tasks.statistic(metric).value, np.random.default_rng(0), len(base.per_query["id"])
    ratios = []
    for _ in range(RESAMPLES):
        rows = draws.integers(0, n, n)
        ratios.append(_ratio(*(value({name: column[rows] for name, column in own.items()}) for own in columns)))
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < 0.975 * RESAMPLES:
        return told | {"retained": None, "low": None, "high": None}
    low, high = np.quantile(known, [0.025, 0.975]).tolist()
    return told | {"retained": _ratio(*values), "low": low, "high": high}


def _ratio(base: float, full: float, model: float) -> float | None:
    return (model - base) / (full - base) if full > base else None


def _columns(result: Result) -> dict[str, np.ndarray]:
    """The columns that metrics are made of: numbers and labels."""
    return {
        name: np.array(column)
        for name, column in result.per_query.items()
        if all(isinstance(value, int | float) for value in column) or name in ("label", "predicted")
    }
