"""Tasks: an `Encoder` and a problem → a `Result` that keeps every query's values; two results → a `Comparison`."""

from __future__ import annotations

from kinvec.tasks.comparison import Change, Comparison, Difference, compare
from kinvec.tasks.evaluation import from_vectors, retrieval, similarity
from kinvec.tasks.lexical import bm25
from kinvec.tasks.rankings import MEASURES, from_rankings
from kinvec.tasks.stored import load_result, load_results, refuse_foreign, save_result, summary

__all__ = [
    "MEASURES", "Change", "Comparison", "Difference", "bm25", "compare", "from_rankings", "from_vectors", "load_result",
    "load_results", "refuse_foreign", "retrieval", "save_result", "similarity", "summary",
]  # fmt: skip
