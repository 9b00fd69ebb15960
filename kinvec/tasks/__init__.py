"""Tasks: an `Encoder` and a problem → a `Result` that keeps every query's values; results → comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kinvec.contracts import Encoder, Problem, Result
from kinvec.tasks.candidates import lexical_reranking, reranking
from kinvec.tasks.classification import LABELLED, classification
from kinvec.tasks.comparison import Change, Comparison, Difference, compare, unit_of
from kinvec.tasks.compression import cheaper, small_enough, with_cheaper
from kinvec.tasks.evaluation import from_vectors, retrieval, similarity
from kinvec.tasks.lexical import bm25
from kinvec.tasks.pairs import pair_classification
from kinvec.tasks.rankings import MEASURES, from_rankings
from kinvec.tasks.several import Failures, Spread, Standing, System, TaskComparison, compare_systems
from kinvec.tasks.slices import Slice, read_columns
from kinvec.tasks.statistics import TOLD_APART, statistic
from kinvec.tasks.stored import load_result, load_results, refuse_foreign, save_result, summary
from kinvec.tasks.systems import SEEDS_FILE, letter, same_but_seed, systems_by_task
from kinvec.tasks.triplets import TRIPLETS

TASKS: dict[str, Callable[..., Result]] = {
    "retrieval": retrieval, "reranking": reranking,
    "similarity": similarity, "pair-classification": pair_classification,
    "classification": classification, "clustering": classification,
}  # fmt: skip
"""The kind of a problem → what measures it: (problem, encoder, measures) → `Result`."""


def measure(data: Problem, encoder: Encoder, measures: Sequence[str] = ()) -> Result:
    """The task that fits the data, by the task's own measures unless some are named."""
    return TASKS[data.kind](data, encoder, measures)


__all__ = [
    "LABELLED", "MEASURES", "SEEDS_FILE", "TASKS", "TOLD_APART", "TRIPLETS", "Change", "Comparison", "Difference",
    "Failures", "Slice", "Spread", "Standing", "System", "TaskComparison", "bm25", "cheaper", "classification",
    "compare", "compare_systems", "from_rankings", "from_vectors", "letter", "lexical_reranking", "load_result",
    "load_results", "measure", "pair_classification", "read_columns", "refuse_foreign", "reranking", "retrieval",
    "same_but_seed", "save_result", "similarity", "small_enough", "statistic", "summary", "systems_by_task",
    "unit_of", "with_cheaper",
]  # fmt: skip
