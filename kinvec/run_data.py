"""The data of a run: what it trains on, chooses its checkpoint by, and is judged by; of one data set or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from kinvec import doctor
from kinvec.checks import evaluation_of
from kinvec.contracts import KinvecError, Problem, RecipeError
from kinvec.embedder import Embedder
from kinvec.files import Table, content_fingerprint, has_split, open_data
from kinvec.kinds import CLASSIFIER_TEXTS, DEV_CLASSIFIER_TEXTS, FITTING, KINDS, NEEDS, Kind
from kinvec.merging import Guard, GuardSettings
from kinvec.mixing import Mixture, SetSettings, TrainingSet
from kinvec.objectives import Objective, make_objective
from kinvec.recipe import Recipe
from kinvec.sampling import hold_out
from kinvec.tasks.further import Task, open_named, open_part

SAMPLE = 2000  # rows whose texts describe the data, or prepare an objective


@dataclass(frozen=True)
class OpenSet:
    """One data set, opened. `examples` are the table's rows that are trained on; the only one of a run has no name."""

    name: str
    table: Table
    examples: Int[np.ndarray, " E"]
    settings: SetSettings
    objective: Objective
    dev: Problem | None
    test: Problem | None

    @property
    def kind(self) -> Kind:
        """What is done with data of this kind."""
        return KINDS[self.table.kind]


@dataclass(frozen=True)
class RunData:
    """All data sets of a run, what its user should know of them, and on what else the model is measured."""

    sets: Sequence[OpenSet]
    warnings: list[str]
    tasks: Sequence[Task] = ()
    guards: Sequence[Guard] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained on."""
        found = [one.table.fingerprint for one in self.sets]
        return found[0] if len(found) == 1 else content_fingerprint("-".join(found).encode())


def open_run_data(recipe: Recipe) -> RunData:
    """Open all data of the run; nothing of a model is loaded before this has succeeded.

    Raises `KinvecError` for data that are wrong, or of another kind than the objective learns from.
    """
    further = [Task(name, open_named("tasks", name, task), task) for name, task in recipe.tasks.items()]
    guards = [_open_guard(name, settings) for name, settings in recipe.guard.items()]
    sets = [_open_set(recipe, name, settings) for name, settings in recipe.sets.items()]
    if recipe.data.batches == "mixed" and (other := [one for one in sets if one.table.kind != "retrieval"]):
        raise KinvecError(
            f"{other[0].settings.train}: holds {other[0].table.kind}, and only queries with documents can share a "
            "batch with another data set; use data.batches=homogeneous"
        )
    warnings = [f"{_prefix(one)}{text}" for one in sets for text in _warnings(one)]
    for one in sets:
        shared = sum(_shared_queries(other, one) for other in sets)
        if shared:
            warnings.append(
                f"{_prefix(one)}{shared} training queries are also test queries: the gain will look too good "
                "(see kinvec check)"
            )
    data = RunData([_complete(one) for one in sets], warnings, further, guards)
    _check_names(data)
    if guards and not any(one.dev for one in sets):
        raise RecipeError(
            f"guard.{guards[0].name}: if it breaks, dev data choose what is kept, and there are none; name data.dev, "
            "or hold some out (data.holdout)"
        )
    return data


def _open_guard(name: str, settings: GuardSettings) -> Guard:
    """The guard, opened, with other data that choose where there are some: named, or the split `dev` beside.

    Raises as `open_named`, and `RecipeError` where they are of another kind.
    """
    problem = open_named("guard", name, settings)
    beside = settings.split != "dev" and has_split(settings.data, "dev")
    place = settings.dev or (settings.data if beside else None)
    if place is None:
        return Guard(name, problem, settings, problem)
    dev = open_part(name, settings, place, "dev")
    if dev.kind != problem.kind:
        raise RecipeError(
            f"guard.{name}.dev: {place} is of another kind than {settings.data}; name data of the same kind"
        )
    return Guard(name, problem, settings, dev)


def _check_names(data: RunData) -> None:
    """Raises `RecipeError` where two results would have one name."""
    taken = [own_name(one) for one in data.sets if one.test is not None]
    for key, named in (("tasks", data.tasks), ("guard", data.guards)):
        for task in named:
            if task.name in taken:
                raise RecipeError(f"{key}.{task.name}: results of that name are there already; choose another name")
            taken.append(task.name)


def own_name(one: OpenSet) -> str:
    """What the results on a data set's own test are called."""
    assert one.test is not None
    return one.test.name or one.table.kind


def measured(data: RunData) -> Iterator[tuple[str, Problem, Sequence[str], Mapping[str, str]]]:
    """All that base and tuned model are measured on: name, problem, measures (none: the task's own), prompts."""
    for one in data.sets:
        if one.test is not None:
            yield own_name(one), one.test, (), one.settings.prompts
    for task in (*data.tasks, *data.guards):
        yield task.name, task.problem, task.settings.measures, task.settings.prompts


def prepared(data: RunData, embedder: Embedder) -> RunData:
    """The data with objectives that have seen the untrained model and a sample of the texts, where they need it."""
    sets = []
    for one in data.sets:
        if one.objective.prepare:
            texts = [text for _, text in _sample(one)]
            one = replace(one, objective=one.objective.prepare(embedder, texts))
        sets.append(one)
    return replace(data, sets=sets)


def _sample(one: OpenSet, sets: int = 1) -> Iterator[tuple[str, str]]:
    """Side and text of about `SAMPLE` rows, of all `sets` together."""
    for row in one.examples[:: max(1, len(one.examples) * sets // SAMPLE)].tolist():
        yield from one.kind.texts(one.table, row)


def mixture(recipe: Recipe, data: RunData, prompts: dict[str, str]) -> Mixture:
    """What the training draws its steps from; `prompts` are the model's own."""
    parts = [
        TrainingSet(
            one.name, one.kind.source(one.table, one.examples, one.settings, recipe.seed), one.objective,
            prompts | one.settings.prompts, one.settings.weight,
        )
        for one in data.sets
    ]  # fmt: skip
    return Mixture(tuple(parts), recipe.data.batches, recipe.data.share_temperature, recipe.seed)


def _open_set(recipe: Recipe, name: str, settings: SetSettings) -> OpenSet:
    table = open_data(
        settings.train, split=settings.split, kind=settings.kind, columns=settings.columns, skip_bad=settings.skip_bad
    )
    objective = make_objective(settings.objective)
    if table.kind != objective.kind:
        key = f"data.sets.{name}.objective.name" if name else "objective.name"
        fitting = f"; for these data set {key}={FITTING[table.kind]}" if table.kind in FITTING else ""
        raise KinvecError(
            f"{settings.train}: holds {table.kind}; {objective.name} training needs {NEEDS[objective.kind]}{fitting}"
        )
    kind = KINDS[table.kind]
    examples = kind.rows(table, settings)
    test = _named(recipe, settings, kind, "test")
    if test is None and kind.held and recipe.evaluate and settings.holdout:
        examples, held = _hold_out(table, examples, settings.holdout, "test")
        test = kind.held(table, held, settings, "test")
    dev = _named(recipe, settings, kind, "dev")
    if dev is None and kind.held and settings.holdout and recipe.evaluate and recipe.trainer.eval_every != 0:
        examples, held = _hold_out(table, examples, settings.holdout, "dev")
        dev = kind.held(table, held, settings, "dev")
    examples = _limited(examples, settings.limit, recipe.seed)
    if not len(examples):
        raise KinvecError(f"{settings.train}: no query is left to train on; lower data.holdout or give more data")
    if name:  # results of several data sets lie beside each other, by these names
        dev, test = (replace(problem, name=name) if problem else None for problem in (dev, test))
    return OpenSet(name, table, examples, settings, objective, dev, test)


def _named(recipe: Recipe, settings: SetSettings, kind: Kind, name: str) -> Problem | None:
    """The evaluation data named in the recipe, else the split of that name beside the training split."""
    test = name == "test"
    place, split = (settings.test, settings.test_split) if test else (settings.dev, "dev")
    wanted = recipe.evaluate and (test or recipe.trainer.eval_every != 0)
    if place is not None and (recipe.evaluate or not test):
        return kind.named(place, split, settings)
    return kind.named(settings.train, split, settings) if wanted and kind.beside(settings.train, split) else None


def _hold_out(table: Table, examples: np.ndarray, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    kept, held = hold_out(table, share, name, KINDS[table.kind].column)
    return np.intersect1d(examples, kept), np.intersect1d(examples, held)


def _limited(examples: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or len(examples) <= limit:
        return examples
    return np.sort(np.random.default_rng(seed).choice(examples, limit, replace=False))


def _complete(one: OpenSet) -> OpenSet:
    """With what its dev and test data need of the rows that are trained on."""
    complete = one.kind.complete
    test = complete(one.test, one.table, one.examples, CLASSIFIER_TEXTS) if one.test else None
    dev = complete(one.dev, one.table, one.examples, DEV_CLASSIFIER_TEXTS) if one.dev else None
    return replace(one, dev=dev, test=test)


def _warnings(one: OpenSet) -> Iterator[str]:
    yield from one.table.warnings
    if one.table.dropped:
        yield f"{one.table.dropped:,} bad rows were dropped (data.skip_bad)"


def _prefix(one: OpenSet) -> str:
    return f"{one.name}: " if one.name else ""


def _shared_queries(trained: OpenSet, tested: OpenSet) -> int:
    """Rows trained on whose query is asked in the test of this data set or another."""
    if tested.test is None:
        return 0
    known = {" ".join(text.split()).lower() for text in tested.kind.asked(tested.test)}
    chosen = set(trained.examples.tolist())
    shared = row = 0
    for batch in trained.table.batches([trained.kind.column]):
        for query in batch.column(0).to_pylist():
            shared += row in chosen and " ".join(query.split()).lower() in known
            row += 1
    return shared


def describe(data: RunData) -> dict[str, Any]:
    """Source, counts and warnings, and a sample of the texts by side under `texts`."""
    texts: dict[str, list[str]] = {}
    counts: dict[str, int] = {"examples": 0, "dropped": 0}
    for one in data.sets:
        counts["examples"] += len(one.examples)
        counts["dropped"] += one.table.dropped
        for name, part in (("dev", one.dev), ("test", one.test)):
            for what, count in (one.kind.sizes(part) if part is not None else {}).items():
                counts[f"{name}_{what}"] = counts.get(f"{name}_{what}", 0) + count
        for side, text in _sample(one, len(data.sets)):
            texts.setdefault(side, []).append(text)
    source = ", ".join(one.table.source for one in data.sets)
    told = {"source": source, "counts": counts, "texts": texts, "warnings": data.warnings}
    if len(data.sets) > 1:
        told["sets"] = {
            one.name: {"kind": one.table.kind, "objective": one.objective.name, "examples": len(one.examples)}
            for one in data.sets
        }
    return told


def examined(data: RunData) -> dict[str, Any]:
    """What the data doctor says of the rows trained on, held against the test data (see `kinvec.doctor`).

    It takes some seconds, however large the data are: of many rows it looks at a sample.
    """
    found = []
    for one in data.sets:
        evaluation = None
        if one.test is not None:
            apart = one.settings.test not in (None, one.settings.train)
            name = str(one.settings.test) if apart else "the test data"
            evaluation = evaluation_of(one.test, name, same_corpus=not apart)
        rows = np.asarray(one.examples, dtype=np.int64)
        found.append(doctor.examine(one.table, evaluation, rows=rows, effort=doctor.QUICK))
    return doctor.to_json(found)
