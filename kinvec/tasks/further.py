"""Tasks that a recipe names besides the data's own test: what it says of them, and opened."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kinvec.config import Settings
from kinvec.contracts import Problem, RecipeError
from kinvec.files import open_problem


class TaskSettings(Settings):
    """A further task, under a name of its own: base and tuned model are measured on it. A list works too."""

    data: str = ""
    """Judged queries, scored pairs or labelled texts: a file, a folder, or a hub data set."""
    split: str = "test"
    """The split of a folder or hub data set."""
    task: str | None = None
    """What is measured, where it is not what the data look like: `clustering`, `reranking`, … (`evaluate --task`)."""
    columns: dict[str, str] | None = None
    """Names of the columns, where they differ: `{query: question, pos_doc: answer}`."""
    measures: list[str] = []
    """What is measured, the main measure first; unset, all of the task's own."""
    prompts: dict[str, str] = {}
    """Put before its queries and documents; unset, those of the model."""


@dataclass(frozen=True)
class Task:
    """A task of the recipe, opened."""

    name: str
    problem: Problem
    settings: TaskSettings


def open_named(key: str, name: str, settings: TaskSettings) -> Problem:
    """What the task `key.name` of a recipe is measured on, under that name.

    Raises `RecipeError` where it names no data, `KinvecError` where they are wrong.
    """
    if not settings.data:
        raise RecipeError(f"{key}.{name}.data is not set; name judged queries, scored pairs or labelled texts")
    return open_part(name, settings, settings.data, settings.split)


def open_part(name: str, settings: TaskSettings, source: str, split: str) -> Problem:
    """Other data, read as those of the task. Raises `KinvecError` where they are wrong."""
    problem = open_problem(source, split=split, columns=settings.columns, task=settings.task)
    return replace(problem, name=name)
