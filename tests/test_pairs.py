"""Pair classification: its figures against scikit-learn and brute force, its data, its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MINILM
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from test_tasks import Words

from kinvec import files, metrics, tasks
from kinvec.contracts import KinvecError, PairData, RecipeError

FIRST = ["a cat", "a dog", "a bird sings", "a fish swims", "rain falls", "a red car", "two men", "the end"]
SECOND = ["cat a", "the dog", "stones fall", "one fish", "rain falls now", "a tree", "two men", "a start"]
SAME = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def pairs(scores: list[float] | None = None) -> PairData:
    return PairData(FIRST, SECOND, scores or SAME, "f", "same", "test", "pair-classification")


labelled_scores = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=25)


@settings(max_examples=200)
@given(labelled_scores)
def test_average_precision_with_ties_is_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([row[0] for row in rows]), np.array([row[1] / 4 for row in rows])
    found = metrics.told_apart("ap", labels, scores[None])
    assert found == pytest.approx(average_precision_score(labels, scores) if labels.any() else 0.0, abs=1e-12)


@settings(max_examples=200)
@given(labelled_scores)
def test_accuracy_and_f1_are_the_best_of_every_threshold_tried(rows: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([row[0] for row in rows]), np.array([row[1] / 4 for row in rows])
    for name, measured in (("accuracy", accuracy_score), ("f1", lambda y, p: f1_score(y, p, zero_division=0))):
        tried = {t: measured(labels, scores >= t) for t in sorted(set(scores.tolist()))}
        assert metrics.told_apart(name, labels, scores[None]) == pytest.approx(max(tried.values()), abs=1e-12)
        threshold = metrics.best_threshold(name, labels, scores)
        assert measured(labels, scores >= threshold) == pytest.approx(max(tried.values()), abs=1e-12)
        nearest = np.sort(np.abs(np.unique(scores) - threshold))
        assert nearest[0] == 0.0 or nearest[0] == nearest[1], "midway"


@settings(max_examples=100)
@given(labelled_scores)
def test_a_pairs_own_value_is_its_part_of_the_area_under_the_curve(rows: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    found = metrics.right_side(labels, scores)
    if labels.all() or not labels.any():
        assert np.isnan(found).all()
    else:
        area = roc_auc_score(labels, scores)
        assert found[labels].mean() == pytest.approx(area) == pytest.approx(found[~labels].mean())


@pytest.mark.parametrize("name", metrics.TOLD_APART)
def test_the_interval_is_that_of_recomputing_it_on_each_resample(name: str) -> None:
    draw = np.random.default_rng(0)
    labels = draw.random(40) < 0.4
    a, b = (np.round(labels * shift + draw.normal(size=(2, 40)), 1) for shift in (0.5, 1.5))
    drawn = np.random.default_rng(7).integers(0, 40, size=(200, 40))
    own = [metrics.told_apart(name, labels[i], b[:, i]) for i in drawn]
    slow = [value - metrics.told_apart(name, labels[i], a[:, i]) for value, i in zip(own, drawn, strict=True)]
    for before, expected in ((a, slow), (None, own)):
        found = metrics.bootstrap_told_apart(name, labels, before, b, seed=7, resamples=200)
        assert found == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-12)


def test_the_paired_test_sees_a_gain_and_no_scale() -> None:
    draw = np.random.default_rng(1)
    labels = draw.random(200) < 0.5
    noisy, other, better = (labels[None] * shift + draw.normal(size=(1, 200)) for shift in (0.5, 0.5, 2.0))

    def chance(name: str, a: np.ndarray, b: np.ndarray) -> float:
        return metrics.randomisation_told_apart(name, labels, a, b, resamples=500)

    for name in metrics.TOLD_APART:
        assert chance(name, noisy, better) == 1 / 501 and chance(name, noisy, noisy) == 1.0
        assert 0.02 < chance(name, noisy, other) == chance(name, noisy, np.exp(other) * 9)


def test_swapping_scores_is_what_it_says() -> None:
    """The p-value is the count over all 2ⁿ assignments of the two models' ranks."""
    labels = np.array([True, False, True, False, True, False, False])
    a, b = np.array([[3.0, 4, 1, 6, 2, 5, 7]]), np.array([[7.0, 2, 5, 3, 6, 1, 4]])
    observed = metrics.told_apart("ap", labels, b) - metrics.told_apart("ap", labels, a)
    found = []
    for mask in range(2**7):
        swapped = np.array([bool(mask >> i & 1) for i in range(7)])
        one, two = (metrics.told_apart("ap", labels, np.where(swapped, *both)) for both in ((a, b), (b, a)))
        found.append(abs(one - two) >= abs(observed) - 1e-12)
    p = metrics.randomisation_told_apart("ap", labels, a, b, resamples=20_000)
    assert p == pytest.approx(np.mean(found), abs=0.012)


# ---- the task ----


def test_every_pair_is_kept_and_the_threshold_said(tmp_path: Path) -> None:
    names = list(tasks.TOLD_APART)
    result = tasks.measure(pairs(), Words(), names)
    rows = result.per_query
    assert (result.kind, list(result.metrics), rows["score"]) == ("pair-classification", names, SAME)
    assert rows["cosine"][0] == pytest.approx(1.0) and rows["euclidean"][6] == rows["manhattan"][6] == 0.0
    a, b = (Words().encode_queries(side).astype(float) for side in (FIRST, SECOND))
    plain = {
        "ap_cosine": (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1), "ap_dot": (a * b).sum(1),
        "ap_euclidean": -np.sqrt(((a - b) ** 2).sum(1)), "ap_manhattan": -np.abs(a - b).sum(1),
    }  # fmt: skip
    for name, scores in plain.items():
        assert result.metrics[name] == pytest.approx(average_precision_score(SAME, scores))
    assert result.metrics["ap_max"] == max(result.metrics[name] for name in plain)
    said = np.array(rows["cosine"]) >= result.thresholds["accuracy_cosine"]
    assert result.metrics["accuracy_cosine"] == accuracy_score(np.array(SAME) > 0, said)
    assert result.thresholds.keys() == {"accuracy_cosine", "f1_cosine"}
    assert tasks.load_result(tasks.save_result(result, tmp_path)) == result


def test_two_results_are_compared_pair_by_pair() -> None:
    a, b = (tasks.measure(pairs(), Words(size), list(tasks.TOLD_APART)) for size in (3, 64))
    found = tasks.compare(a, b)
    assert [d.metric for d in found.metrics] == list(tasks.TOLD_APART)
    assert all(d.low <= d.difference <= d.high and d.won + d.tied + d.lost == 8 for d in found.metrics)
    assert all(change.a["score"] in (0.0, 1.0) and "|" in change.query for change in found.wins + found.losses)


def test_what_cannot_be_told_apart_is_said() -> None:
    with pytest.raises(KinvecError, match="two labels, such as 0 and 1, and there are 1"):
        tasks.measure(pairs([1.0] * 8), Words())
    with pytest.raises(RecipeError, match="unknown measure 'ap' of pair classification; there are ap_cosine"):
        tasks.measure(pairs(), Words(), ["ap"])
    other = pairs([5.0, 5.0, 2.0, 5.0, 5.0, 2.0, 2.0, 2.0])
    assert tasks.measure(other, Words()).per_query["score"] == SAME, "the higher is positive"


# ---- its data ----


def rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "labels",
    [[1, 0, 0], ["1", "0", "0"], [True, False, False], ["yes", "no", "no"],
     ["duplicate", "not_duplicate", "not_duplicate"], ["entailment", "not_entailment", "not_entailment"]],
)  # fmt: skip
def test_labels_of_two_are_known_by_what_they_are(tmp_path: Path, labels: list[Any]) -> None:
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": label} for i, label in enumerate(labels)]
    problem = files.open_problem(rows_of(tmp_path / "pairs.jsonl", rows))
    assert isinstance(problem, PairData) and (problem.kind, list(problem.scores)) == ("pair-classification", [1, 0, 0])
    as_scores = files.open_problem(tmp_path / "pairs.jsonl", task="similarity")
    assert as_scores.kind == "similarity"


def test_scores_of_more_than_two_are_a_similarity_and_other_words_are_refused(tmp_path: Path) -> None:
    graded = [{"sentence1": "a", "sentence2": "b", "label": score} for score in (0, 1, 2)]
    assert files.open_problem(rows_of(tmp_path / "graded.jsonl", graded)).kind == "similarity"
    with pytest.raises(KinvecError, match=r"two labels, such as 0 and 1, and here are 3"):
        files.open_problem(tmp_path / "graded.jsonl", task="pair-classification")
    with pytest.raises(KinvecError, match=r"one\.jsonl: all scores are 2; give pairs that are alike and pairs"):
        files.open_problem(rows_of(tmp_path / "one.jsonl", graded[2:]))
    odd = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("same", "other")]
    with pytest.raises(KinvecError, match=r"odd\.jsonl:1: 'label' is 'same', not a finite number"):
        files.open_problem(rows_of(tmp_path / "odd.jsonl", odd))


def test_nli_can_be_told_apart_too(shared_data: Path, tmp_path: Path) -> None:
    for part in ("s1", "s2", "labels"):
        lines = (shared_data / "snli" / f"{part}.test").read_text("utf-8").splitlines()[:60]
        (tmp_path / f"{part}.test").write_text("\n".join(lines) + "\n")
    sides = ((tmp_path / f"{part}.test").read_text().splitlines() for part in ("s1", "s2", "labels"))
    premises, hypotheses, labels = ([line.strip() for line in side] for side in sides)
    known = [i for i, label in enumerate(labels) if label in ("entailment", "contradiction")]
    problem = files.open_problem(tmp_path, task="pair-classification")
    assert isinstance(problem, PairData) and problem.kind == "pair-classification"
    assert list(problem.first) == [premises[i] for i in known]
    assert list(problem.second) == [hypotheses[i] for i in known]
    assert list(problem.scores) == [float(labels[i] == "entailment") for i in known]
    assert files.open_problem(tmp_path).kind == "retrieval", "unless said otherwise, triplets"
    rows = [{"premise": premises[i], "hypothesis": hypotheses[i], "label": labels[i]} for i in range(60)]
    again = files.open_problem(rows_of(tmp_path / "nli.jsonl", rows), task="pair-classification")
    assert isinstance(again, PairData) and list(again.scores) == list(problem.scores)


def test_the_command_measures_and_compares_them(tmp_path: Path, main: Callable[..., tuple[int, str]]) -> None:
    close = [("A cat sits.", "A kitten is sitting.", 1), ("Rain.", "It rains.", 1), ("He sleeps.", "He is asleep.", 1)]
    apart = [("A cat sits.", "Markets fell.", 0), ("Rain.", "Two men play chess.", 0), ("He sleeps.", "A red car.", 0)]
    rows = [{"text1": a, "text2": b, "label": label} for a, b, label in close + apart]
    path = rows_of(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "out"
    code, said = main("evaluate", "--model", MINILM, "--data", str(path), "--precision", "fp32", "--out", str(out))
    result = tasks.load_result(out)
    assert code == 0 and "6 pairs" in said and result.metrics["ap_cosine"] == 1.0
    assert f"accuracy_cosine: pairs with a cosine of {result.thresholds['accuracy_cosine']:.4f} or more" in said
    code, said = main("compare", str(out), str(out))
    assert code == 0 and "ap_cosine" in said and "6 pairs" in said
