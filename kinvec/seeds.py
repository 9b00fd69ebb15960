"""One recipe under several seeds: a run for each, the base measured once, and a summary that keeps two variances apart.

The gain of a training depends on the queries that it is measured on and on the seed that it was trained under. The
interval over queries holds for these trainings; the spread of the seeds says what another one may bring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kinvec import distributed, tasks
from kinvec.console import say
from kinvec.contracts import KinvecError
from kinvec.files import write_json
from kinvec.recipe import Recipe
from kinvec.run_data import open_run_data
from kinvec.tasks import SEEDS_FILE, Comparison, Spread

SUMMARY = "summary.json"

Chain = Sequence[Recipe]
RunChain = Callable[[Chain, Path | None], dict[str, Any]]
"""Does a chain of stages, with the run whose results of the base may be taken over; returns the last one's summary."""


def run_seeds(chains: Sequence[Chain], out: Path, run: RunChain) -> dict[str, Any]:
    """Run the recipe under each of its seeds, finished ones being skipped, and summarise them in `out`.

    The summary has the keys of a single run's; `metrics` are means over the seeds, with their `values`, `deviation`,
    `least` and `most`, and `low_seeds` and `high_seeds`, the interval over queries and seeds. Raises `KinvecError`
    where `out` holds other things, or the seeds would be judged by different data.
    """
    distributed.start()
    distributed.led(partial(_claim, out, chains))
    distributed.led(partial(_check_same_test, chains))
    done: list[dict[str, Any]] = []
    for number, chain in enumerate(chains, 1):
        say(f"seed {chain[0].seed}, {number} of {len(chains)}: {chain[-1].out}")
        done.append(run(chain, Path(chains[0][0].out) if number > 1 else None))
    return distributed.led(partial(_summarise, out, chains, done))


def _summarise(out: Path, chains: Sequence[Chain], done: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {"out": str(out), "seeds": [chain[0].seed for chain in chains], "runs": done, "results": _results(out)}
    write_json(out / SUMMARY, summary)
    return summary


def _claim(out: Path, chains: Sequence[Chain]) -> None:
    folders = {str(chain[0].seed): Path(chain[-1].out).relative_to(out) for chain in chains}
    foreign = [path.name for path in out.iterdir() if not _ours(path.name)] if out.is_dir() else []
    if foreign:
        raise KinvecError(f"{out}: holds other things than a recipe's seeds ('{min(foreign)}'); choose another out=")
    (out / SUMMARY).unlink(missing_ok=True)  # of fewer seeds, perhaps
    before: dict[str, str] = json.loads((out / SEEDS_FILE).read_text("utf-8")) if (out / SEEDS_FILE).is_file() else {}
    kept = {seed: run for seed, run in before.items() if seed not in folders and (out / run / SUMMARY).is_file()}
    if kept:
        say(f"{out}: seeds of an earlier call are there as well, and not in this summary: {', '.join(kept)}")
    write_json(out / SEEDS_FILE, {seed: str(run) for seed, run in folders.items()})


def _ours(name: str) -> bool:
    return name.startswith("seed-") or name in (SEEDS_FILE, SUMMARY) or name.startswith(".")


def _check_same_test(chains: Sequence[Chain]) -> None:
    """Raises `KinvecError` where the seed decides what a model is judged by: labels known from a drawn part of rows."""
    if not any(settings.limit for settings in chains[0][0].sets.values()):
        return
    found = [[one.test and one.test.fingerprint for one in open_run_data(chain[0]).sets] for chain in chains]
    if any(own != found[0] for own in found):
        raise KinvecError(
            "seeds: data.limit draws other rows under each seed, and here the test is judged by them; leave out "
            "data.limit, or name data that are smaller"
        )


def _results(out: Path) -> list[dict[str, Any]]:
    """As in the summary of a run, task by task; none where nothing was evaluated."""
    runs = [out / run for run in json.loads((out / SEEDS_FILE).read_text("utf-8")).values()]
    if not all((run / "results" / "tuned").is_dir() for run in runs):
        return []
    found = []
    for systems in tasks.systems_by_task([out]):
        task = tasks.compare_systems(systems)
        spread = {row.metric: row for row in task.systems[1].spread}
        comparison = task.comparisons[0]
        found.append({
            "task": task.task, "queries": task.queries, "unit": tasks.unit_of(task.kind),
            "baselines": systems[0].results[0].baselines,
            "metrics": {row.metric: _metric(comparison, spread[row.metric], place)
                        for place, row in enumerate(comparison.metrics)},
        })  # fmt: skip
    return found


def _metric(comparison: Comparison, spread: Spread, place: int) -> dict[str, Any]:
    row = comparison.metrics[place]
    return {
        "base": row.a, "tuned": row.b, "difference": row.difference, "low": row.low, "high": row.high, "p": row.p,
        "values": spread.values, "deviation": spread.deviation, "least": spread.least, "most": spread.most,
        "low_seeds": spread.low, "high_seeds": spread.high,
    }  # fmt: skip
