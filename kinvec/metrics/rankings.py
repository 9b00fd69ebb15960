"""Measures of a ranking, query by query: those of ir-measures, by its names (`nDCG@10`, `RR@10`, `AP@10`, `R@100`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures.measures import Measure
from jaxtyping import Float64

from kinvec.contracts import Qrels, RecipeError

DEPTH_WITHOUT_CUTOFF = 1000  # `AP` or `RR` without @k read this many results, as TREC runs do


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """Names such as `nDCG@10` as ir-measures' values, each once. Raises `RecipeError` for a name it does not know."""
    return list(dict.fromkeys(_parse(name) for name in names))


def _parse(name: str) -> Measure:
    try:
        measure = ir_measures.parse_measure(name)
        ir_measures.evaluator([measure], {"q": {"d": 1}})  # knows the name, but can anything here compute it?
        assert measure.params.get("cutoff", 1) > 0, "a cutoff counts results"
    except (NameError, ValueError, SyntaxError, AssertionError, KeyError, TypeError):
        raise RecipeError(f"unknown measure '{name}'; write it as nDCG@10, RR@10, AP@10, R@100 or P@10") from None
    return measure


def search_depth(names: Sequence[str]) -> int:
    """How many results a query needs so that every one of these measures can be computed."""
    cutoffs = (measure.params.get("cutoff") for measure in parse_measures(names))
    return max((DEPTH_WITHOUT_CUTOFF if cutoff is None else int(cutoff) for cutoff in cutoffs), default=0)


def retrieval(
    names: Sequence[str], qrels: Qrels, ranked: Mapping[str, Sequence[str]]
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Each measure's value for every judged query, in the order of `qrels`, under ir-measures' name (MRR@10 is RR@10).

    `ranked` lists document ids best first. A judged query without results scores 0 and is not dropped. Places are
    handed on instead of scores, because the implementations behind ir-measures break ties differently (pytrec_eval by
    id descending, its RR@k by id ascending); `kinvec.topk` has already put ties in trec_eval's order.
    """
    run = {q: {d: float(len(docs) - place) for place, d in enumerate(docs)} for q, docs in ranked.items() if docs}
    row = {query: i for i, query in enumerate(qrels)}
    measures = parse_measures(names)
    values = {str(measure): np.zeros(len(qrels)) for measure in measures}
    # Some TREC judgements mark junk with −1 or −2: not relevant, and pytrec_eval crashes on a negative grade.
    judged = {q: {d: max(grade, 0) for d, grade in grades.items()} for q, grades in qrels.items()}
    for metric in ir_measures.iter_calc(measures, judged, run) if measures else ():
        values[str(metric.measure)][row[metric.query_id]] = metric.value
    return values
