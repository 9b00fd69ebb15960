"""Folders → systems to compare: results, folders of results by task, runs, and runs that differ in their seed alone.

A run stands for its tuned model, several seeds of one recipe for one system. Where the first folder is a run, the base
it started from comes first, so that a single run, too, is a comparison: of base and tuned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import isdir
from pathlib import Path

from kinvec.console import say
from kinvec.contracts import KinvecError, RecipeError, Result
from kinvec.files.reading import read_object
from kinvec.tasks.several import System
from kinvec.tasks.stored import load_results

RUN_FILE = "run.json"  # of a run: its settings, and hashes of its inputs
SEEDS_FILE = "seeds.json"  # of a recipe's runs under several seeds: the folder of each
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Entry:
    """What an argument stands for: a name, and by task the results of its runs; of runs their seeds, too."""

    name: str
    tasks: dict[str, list[Result]]
    seeds: list[int] = field(default_factory=list)

    def add(self, tasks: Mapping[str, Result], seed: int) -> None:
        """Take in another run of the same recipe."""
        self.seeds.append(seed)
        for task, result in tasks.items():
            self.tasks.setdefault(task, []).append(result)


def systems_by_task(places: Sequence[str | Path]) -> list[list[System]]:
    """For each task that at least two of the places have results on, its systems in the order of the places.

    Raises `KinvecError` where a place has no result or no task is shared, `RecipeError` where there is nothing to
    compare.
    """
    entries = open_entries([Path(place) for place in places])
    if len(entries) < 2:
        raise RecipeError("there is one system to compare; name two results or more, or a run")
    if all(len(entry.tasks) == 1 for entry in entries):  # whatever copies of the data are called: fingerprints tell
        groups = [[(entry, next(iter(entry.tasks.values()))) for entry in entries]]
    else:
        first, others = entries[0], entries[1:]
        groups = [[(e, e.tasks[task]) for e in entries if task in e.tasks] for task in first.tasks]
        groups = [group for group in groups if len(group) > 1]
        for entry in entries:
            against = others if entry is first else [first]
            if alone := [task for task in entry.tasks if not any(task in other.tasks for other in against)]:
                say(f"only in {entry.name}, so not compared: {', '.join(alone)}")
    if not groups:
        tasks = " and ".join(", ".join(entry.tasks) for entry in entries)
        raise KinvecError(f"{' and '.join(map(str, places))} have no task in common ({tasks})")
    return [_named(group) for group in groups]


def _named(group: Sequence[tuple[Entry, list[Result]]]) -> list[System]:
    """A result is called by its model, runs by their folder; what is called alike, by a letter, too."""
    names = [entry.name if entry.seeds else results[0].model for entry, results in group]
    names = [f"{name} ({letter(place)})" if names.count(name) > 1 else name for place, name in enumerate(names)]
    return [
        System(name, results, entry.seeds if len(results) > 1 else ())
        for name, (entry, results) in zip(names, group, strict=True)
    ]


def letter(place: int) -> str:
    """A, B, C, … for the systems in their order."""
    return LETTERS[place] if place < len(LETTERS) else str(place + 1)


def open_entries(places: Sequence[Path]) -> list[Entry]:
    """What the places stand for, in order: runs that differ in their seed alone are one entry."""
    entries: list[Entry] = []
    groups: dict[str, Entry] = {}
    for number, place in enumerate(places):
        runs = runs_of(place)
        if not runs:
            entries.append(Entry(str(place), {task: [result] for task, result in load_results(place).items()}))
            continue
        if number == 0:
            entries.append(_base_of(place, runs))
        for run in runs:
            seed, key = _identity(run)
            key = key if len(runs) == 1 else str(place)
            if key not in groups or seed in groups[key].seeds:
                groups[key] = Entry(str(place), {})
                entries.append(groups[key])
            groups[key].add(_results(run, "tuned"), seed)
    return entries


def _base_of(place: Path, runs: Sequence[Path]) -> Entry:
    """The base of the runs: one, or one a seed where each started from another (a later stage of a chain)."""
    bases = [_results(run, "base") for run in runs]
    values = [{task: result.metrics for task, result in base.items()} for base in bases]
    entry = Entry(f"base of {place}", {})
    if all(own == values[0] for own in values):
        entry.tasks = {task: [result] for task, result in bases[0].items()}
        return entry
    for run, base in zip(runs, bases, strict=True):
        entry.add(base, _identity(run)[0])
    return entry


def runs_of(place: Path) -> list[Path]:
    """The runs that a folder is or holds: itself, or those of a recipe's seeds; none where it is something else."""
    if (place / RUN_FILE).is_file():
        return [place]
    if (place / SEEDS_FILE).is_file():
        runs = read_object(place / SEEDS_FILE).values()
        here = [isinstance(run, str) and isdir(place / run) and _is_within(place / run, place) for run in runs]
        if not all(here):
            raise KinvecError(f"{place / SEEDS_FILE}: names runs that are not in the folder")
        return [place / run for run in runs]
    return []


def _is_within(folder: Path, place: Path) -> bool:
    return folder.resolve().is_relative_to(place.resolve())


def same_but_seed(a: Path, b: Path) -> bool:
    """Whether two runs have the same settings and inputs, their seeds aside."""
    return _identity(a)[1] == _identity(b)[1]


def _identity(run: Path) -> tuple[int, str]:
    """The run's seed, and all else that decides its result: settings, and inputs by content."""
    told = read_object(run / RUN_FILE)
    settings = told.get("settings", {})
    if not isinstance(settings, dict) or not isinstance(settings.get("seed", 0), int):
        raise KinvecError(f"{run / RUN_FILE}: holds no settings with a seed")
    seed = settings.pop("seed", 0)
    return seed, json.dumps([settings, told.get("inputs")], sort_keys=True)


def _results(run: Path, side: str) -> dict[str, Result]:
    try:
        return load_results(run / "results" / side)
    except KinvecError:
        raise KinvecError(
            f"{run}: the run has no results of its {side} model; let it finish (kinvec train), with evaluate=true"
        ) from None
