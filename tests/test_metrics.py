"""Measures against pytrec_eval itself, statistics against scipy and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kinvec import metrics
from kinvec.contracts import RecipeError
from kinvec.topk import empty_best, keep_best, rank_ids

PYTREC = {
    "nDCG@3": "ndcg_cut_3",
    "AP@3": "map_cut_3",
    "R@2": "recall_2",
    "P@5": "P_5",
    "nDCG": "ndcg",
    "RR": "recip_rank",
}
grades = st.integers(0, 3)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict, dict]:
    """Graded judgements and runs with many ties, queries without results, judgements of documents never retrieved."""
    docs = [f"d{i}" for i in range(draw(st.integers(1, 14)))]
    queries = [f"q{i}" for i in range(draw(st.integers(1, 5)))]
    qrels = {q: draw(st.dictionaries(st.sampled_from([*docs, "never"]), grades, min_size=1)) for q in queries}
    score = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0])
    scores = {q: draw(st.dictionaries(st.sampled_from(docs), score)) for q in queries}
    return qrels, {q: run for q, run in scores.items() if run}


def ranked(run: dict[str, float], k: int) -> list[str]:
    ids = list(run)
    scores = np.array([list(run.values())], dtype=np.float32)
    _, found = keep_best(empty_best(1, min(k, len(ids))), scores, 0, rank_ids(ids))
    return [ids[j] for j in found[0]]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_equal_to_pytrec_eval_on_the_raw_scores_ties_and_all(problem: tuple[dict, dict]) -> None:
    qrels, run = problem
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(PYTREC.values())).evaluate(run)
    ours = metrics.retrieval(list(PYTREC), qrels, {q: ranked(scores, 20) for q, scores in run.items()})
    for name, key in PYTREC.items():
        for value, query in zip(ours[name], qrels, strict=True):
            assert value == pytest.approx(theirs[query][key] if query in theirs else 0.0, abs=1e-7), (name, query)


@settings(max_examples=50, deadline=None)
@given(problems(), st.integers(1, 4))
def test_reciprocal_rank_with_a_cutoff_breaks_ties_like_the_rest(problem: tuple[dict, dict], k: int) -> None:
    """ir-measures' own RR@k orders ties by id ascending; ours must equal pytrec_eval's recip_rank cut at k."""
    qrels, run = problem
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
    ours = metrics.retrieval([f"RR@{k}"], qrels, {q: ranked(scores, 20) for q, scores in run.items()})[f"RR@{k}"]
    for value, query in zip(ours, qrels, strict=True):
        whole = theirs.get(query, {"recip_rank": 0.0})["recip_rank"]
        assert value == pytest.approx(whole if whole >= 1 / k - 1e-9 else 0.0)


def test_a_judged_query_without_results_scores_zero_and_is_kept() -> None:
    qrels = {"a": {"x": 1}, "b": {"y": 2}, "c": {"z": 0}}
    values = metrics.retrieval(["nDCG@10", "RR@10"], qrels, {"a": ["x"], "b": []})
    assert values["nDCG@10"].tolist() == values["RR@10"].tolist() == [1.0, 0.0, 0.0]
    assert metrics.mean(values["RR@10"]) == pytest.approx(1 / 3)


def test_graded_judgements_weigh_in() -> None:
    qrels = {"q": {"best": 3, "good": 1}}
    first = metrics.retrieval(["nDCG@10"], qrels, {"q": ["best", "good"]})["nDCG@10"][0]
    second = metrics.retrieval(["nDCG@10"], qrels, {"q": ["good", "best"]})["nDCG@10"][0]
    assert first == 1.0
    assert second == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))


def test_junk_judged_below_zero_counts_as_not_relevant() -> None:
    junk, zero = ({"q": {"a": grade, "b": 1}, "r": {"a": grade}} for grade in (-2, 0))
    ranked = {"q": ["a", "b"], "r": ["a"]}
    names = ["nDCG@10", "RR@10", "AP@10", "P@10", "R@10"]
    ours, theirs = metrics.retrieval(names, junk, ranked), metrics.retrieval(names, zero, ranked)
    assert all((ours[name] == theirs[name]).all() for name in names) and ours["RR@10"].tolist() == [0.5, 0.0]


def test_names_are_those_of_ir_measures() -> None:
    assert [str(m) for m in metrics.parse_measures(["MRR@10", "RR@10", "Recall@100"])] == ["RR@10", "R@100"]
    assert metrics.search_depth(["nDCG@10", "R@100"]) == 100
    assert metrics.search_depth(["AP"]) == 1000
    for wrong in ("ndcg@10", "nDCG@0", "Foo@3", "", "P"):
        with pytest.raises(RecipeError, match="unknown measure"):
            metrics.parse_measures([wrong])


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(3).normal(0.05, 0.2, 80)
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    assert metrics.mean_interval(values) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert metrics.mean_interval(np.array([0.3])) == (0.3, 0.3)
    assert metrics.mean_interval(np.zeros(9)) == (0.0, 0.0)


def test_randomisation_equals_the_count_over_all_sign_flips() -> None:
    differences = np.array([0.3, 0.0, -0.1, 0.4, 0.2, 0.25, -0.05, 0.3, 0.1])
    every = np.array(list(itertools.product([1, -1], repeat=len(differences)))) @ differences
    exact = np.mean(np.abs(every) >= abs(differences.sum()) - 1e-12)
    assert metrics.randomisation_p(differences, resamples=40_000) == pytest.approx(exact, abs=0.004)


def test_randomisation_at_its_ends() -> None:
    assert metrics.randomisation_p(np.zeros(20)) == 1.0
    assert metrics.randomisation_p(np.ones(60)) == 1 / (metrics.RESAMPLES + 1)


def test_chunks_of_resamples_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    gold, a, b = np.arange(50.0), values, values[::-1].copy()

    def drawn() -> tuple[object, ...]:
        return metrics.bootstrap_correlation("pearson_cosine", gold, a, b), metrics.randomisation_p(values)

    whole = drawn()
    monkeypatch.setattr("kinvec.metrics.resampling.DRAWS_AT_A_TIME", 500)
    assert drawn() == whole


def test_statistics_leave_the_global_random_state_alone() -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    metrics.bootstrap_correlation("pearson_cosine", np.arange(5.0), np.ones(5), np.arange(5.0))
    metrics.randomisation_p(np.arange(5.0))
    assert (np.random.random(3) == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=30))
def test_correlations_are_scipys_and_zero_for_a_constant(rows: list[tuple[int, int]]) -> None:
    x, y = np.array(rows).T
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert metrics.spearman(x, y) == metrics.pearson(x, y) == 0.0
    else:
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


SCIPY = {
    "spearman_cosine": lambda x, y: stats.spearmanr(x, y).statistic,
    "pearson_cosine": lambda x, y: stats.pearsonr(x, y).statistic,
}


@pytest.mark.parametrize("name", SCIPY)
def test_a_resampled_correlation_is_recomputed_from_scratch(name: str) -> None:
    """The interval equals the one from scipy's statistic on each resample's items, ties included."""
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 6, 40).astype(float)
    a, b = gold + generator.normal(0, 3, 40), np.round(gold + generator.normal(0, 1, 40))
    drawn = np.random.default_rng(7).integers(0, 40, size=(300, 40))
    slow = [SCIPY[name](gold[i], b[i]) - SCIPY[name](gold[i], a[i]) for i in drawn]
    fast = metrics.bootstrap_correlation(name, gold, a, b, seed=7, resamples=300)
    assert fast == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=1e-9)


@pytest.mark.parametrize("name", SCIPY)
def test_randomised_correlations(name: str) -> None:
    generator = np.random.default_rng(0)
    gold = generator.normal(size=200)
    noisy, other, better = (gold + generator.normal(0, s, 200) for s in (2.0, 2.0, 0.5))
    assert metrics.randomisation_correlation(name, gold, noisy, better) == 1 / (metrics.RESAMPLES + 1)
    assert metrics.randomisation_correlation(name, gold, noisy, noisy) == 1.0
    equal = metrics.randomisation_correlation(name, gold, noisy, other)
    assert 0.02 < equal < 1.0
    scaled = metrics.randomisation_correlation(name, gold, noisy, 100 * other - 40)
    assert scaled == pytest.approx(equal, abs=1e-3), "another scale of cosines says nothing about the models"
