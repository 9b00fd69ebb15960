"""Tasks: an `Encoder` and a problem → a `Result` that keeps every query's values; results → comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from kinvec.contracts import Encoder, LabelledData, PairData, Problem, RecipeError, Result
from kinvec.tasks.classification import LABELLED, classification
from kinvec.tasks.comparison import Change, Comparison, Difference, compare, unit_of
from kinvec.tasks.compression import cheaper, small_enough, with_cheaper
from kinvec.tasks.evaluation import from_vectors, retrieval, similarity
from kinvec.tasks.lexical import bm25
from kinvec.tasks.rankings import MEASURES, from_rankings
from kinvec.tasks.several import Failures, Standing, System, TaskComparison, compare_systems
from kinvec.tasks.slices import Slice, read_columns
from kinvec.tasks.statistics import statistic
from kinvec.tasks.stored import load_result, load_results, refuse_foreign, save_result, summary
from kinvec.tasks.systems import SEEDS_FILE, letter, systems_by_task
from kinvec.tasks.triplets import TRIPLETS


def measure(data: Problem, encoder: Encoder, measures: Sequence[str] = ()) -> Result:
    """The task that fits the data, by the task's own measures unless some are named."""
    if isinstance(data, LabelledData):
        return classification(data, encoder, measures)
    if isinstance(data, PairData):
        if measures:
            raise RecipeError("scored pairs are measured by Spearman and Pearson; leave out the measures")
        return similarity(data, encoder)
    return retrieval(data, encoder, measures)


__all__ = [
    "LABELLED", "MEASURES", "SEEDS_FILE", "TRIPLETS", "Change", "Comparison", "Difference", "Failures", "Slice",
    "Standing", "System", "TaskComparison", "bm25", "cheaper", "classification", "compare", "compare_systems",
    "from_rankings", "from_vectors", "letter", "load_result", "load_results", "measure", "read_columns",
    "refuse_foreign", "retrieval", "save_result", "similarity", "small_enough", "statistic", "summary",
    "systems_by_task", "unit_of", "with_cheaper",
]  # fmt: skip
