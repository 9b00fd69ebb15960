"""Comparing two results: paired statistics, refusal of different data, and wins and losses a person can read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinvec import metrics, tasks
from kinvec.contracts import KinvecError, RecipeError, Result
from kinvec.verbs import compare as verb


def searched(values: list[float], model: str = "model", **changed: Any) -> Result:
    """A retrieval result of as many queries as there are values."""
    n = len(values)
    rows: dict[str, list[Any]] = {
        "id": [f"q{i}" for i in range(n)],
        "query": [f"question {i}" for i in range(n)],
        "nDCG@10": values,
        "RR@10": [v / 2 for v in values],
        "top_ids": [[f"{model}-{i}", "x"] for i in range(n)],
        "top_scores": [[0.9, 0.1] for _ in range(n)],
        "top_text": [f"{model} says {i}" for i in range(n)],
        "first_relevant": [int(1 / v) if v else None for v in values],
        "judged_ids": [["x"] for _ in range(n)],
        "judged_scores": [[1] for _ in range(n)],
    }
    means = {name: metrics.mean(rows[name]) for name in ("nDCG@10", "RR@10")}
    base: dict[str, Any] = {"task": "tiny", "kind": "retrieval", "split": "test", "fingerprint": "same"} | changed
    return Result(model=model, metrics=means, per_query=rows, **base)


def paired(cosines: np.ndarray, gold: np.ndarray, model: str) -> Result:
    rows = {
        "id": [str(i) for i in range(len(gold))],
        "query": [f"a{i}" for i in range(len(gold))],
        "second": [f"b{i}" for i in range(len(gold))],
        "score": gold.tolist(),
        "cosine": cosines.tolist(),
    }
    values = {"spearman_cosine": metrics.spearman(gold, cosines), "pearson_cosine": metrics.pearson(gold, cosines)}
    return Result("sts", "similarity", "test", model, values, rows, "pairs")


RANDOM = np.random.default_rng(0)
BASE = RANDOM.uniform(0, 0.8, 60).round(3).tolist()
TUNED = [min(1.0, v + d) for v, d in zip(BASE, RANDOM.choice([0.0, 0.2, -0.05], 60), strict=True)]


def test_means_difference_interval_and_p_are_those_of_the_paired_statistics() -> None:
    comparison = tasks.compare(searched(BASE, "base"), searched(TUNED, "tuned"))
    row = comparison.metrics[0]
    gain = np.array(TUNED) - np.array(BASE)
    assert (comparison.a, comparison.b, comparison.queries, comparison.by) == ("base", "tuned", 60, "nDCG@10")
    assert row.metric == "nDCG@10" and row.difference == pytest.approx(gain.mean()) == pytest.approx(row.b - row.a)
    assert (row.low, row.high) == metrics.mean_interval(gain) and row.p == metrics.randomisation_p(gain)
    assert row.low < row.difference < row.high and 0 < row.p <= 1
    assert (row.won, row.tied, row.lost) == tuple(int(np.sum(t)) for t in (gain > 0, gain == 0, gain < 0))


def test_a_result_against_itself_differs_in_nothing() -> None:
    comparison = tasks.compare(searched(BASE), searched(BASE))
    for row in comparison.metrics:
        assert (row.difference, row.low, row.high, row.p, row.tied) == (0, 0, 0, 1.0, 60)
    assert comparison.wins == comparison.losses == []
    assert comparison.a != comparison.b, "two results of one model are told apart"


def test_turned_round_it_says_the_opposite() -> None:
    there, back = tasks.compare(searched(BASE), searched(TUNED)), tasks.compare(searched(TUNED), searched(BASE))
    for x, y in zip(there.metrics, back.metrics, strict=True):
        assert (x.difference, x.p, x.won, x.lost) == (-y.difference, y.p, y.lost, y.won)
        assert (x.low, x.high) == pytest.approx((-y.high, -y.low))
    assert [change.id for change in there.wins] == [change.id for change in back.losses]


def test_wins_and_losses_can_be_read() -> None:
    a, b = searched([0.0, 1.0, 0.5, 0.2], "base"), searched([1.0, 0.25, 0.5, 0.4], "tuned")
    comparison = tasks.compare(a, b, shown=5)
    assert [(w.id, w.query, w.difference) for w in comparison.wins] == [
        ("q0", "question 0", 1.0), ("q3", "question 3", pytest.approx(0.2)),
    ]  # fmt: skip
    assert comparison.wins[0].a == {"value": 0.0, "top_id": "base-0", "top_text": "base says 0", "first_relevant": None}
    assert comparison.wins[0].b == {"value": 1.0, "top_id": "tuned-0", "top_text": "tuned says 0", "first_relevant": 1}
    assert [(x.id, x.difference) for x in comparison.losses] == [("q1", -0.75)]
    assert [w.id for w in tasks.compare(a, b, shown=1).wins] == ["q0"]
    assert tasks.compare(a, b, by="RR@10").wins[0].difference == 0.5


def test_queries_are_matched_by_id_not_by_place() -> None:
    a, b = searched(BASE), searched(TUNED)
    order = np.random.default_rng(1).permutation(60)
    b.per_query = {name: [column[i] for i in order] for name, column in b.per_query.items()}
    assert tasks.compare(a, b).metrics == tasks.compare(a, searched(TUNED)).metrics


@pytest.mark.parametrize(
    "other", [{"fingerprint": "another corpus"}, {"per_query": "fewer"}], ids=["other data", "other queries"]
)
def test_different_data_are_refused(other: dict[str, str]) -> None:
    b = searched(TUNED[:59]) if "per_query" in other else searched(TUNED, **other)
    with pytest.raises(KinvecError, match=r"different data: A is tiny \(test\), 60 queries.*B is tiny .*evaluate both"):
        tasks.compare(searched(BASE), b)


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"by recall: both have nDCG@10, RR@10"):
        tasks.compare(searched(BASE), searched(TUNED), by="recall")
    b = searched(TUNED)
    b.metrics = {"P@1": 0.5}
    with pytest.raises(RecipeError, match="none in common"):
        tasks.compare(searched(BASE), b)


def test_a_correlation_is_resampled_as_a_whole() -> None:
    gold = RANDOM.uniform(0, 5, 150).round(1)
    a, b = paired(gold + RANDOM.normal(0, 4, 150), gold, "base"), paired(gold + RANDOM.normal(0, 1, 150), gold, "tuned")
    comparison = tasks.compare(a, b)
    spearman = comparison.metrics[0]
    assert spearman.metric == "spearman_cosine" and spearman.low > 0 and spearman.p < 0.001
    x, y = np.array(a.per_query["cosine"]), np.array(b.per_query["cosine"])
    assert (spearman.low, spearman.high) == metrics.bootstrap_correlation("spearman_cosine", gold, x, y)
    assert spearman.won + spearman.tied + spearman.lost == 150 and spearman.won > spearman.lost
    win = comparison.wins[0]
    i = int(win.id)
    assert win.query == f"a{i} | b{i}" and win.b["cosine"] == y[i] and win.b["score"] == gold[i]
    assert 0 <= win.a["value"] < win.b["value"] <= 1


def test_the_verb_takes_result_folders_and_folders_of_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold = np.arange(20.0)
    for side, values, noise in (("base", BASE, 9.0), ("tuned", TUNED, 1.0)):
        tasks.save_result(searched(values, side), tmp_path / side / "tiny")
        tasks.save_result(paired(gold + RANDOM.normal(0, noise, 20), gold, side), tmp_path / side / "sts")
    tasks.save_result(searched(BASE, task="only here"), tmp_path / "base" / "alone")
    by_task = verb.compare(tmp_path / "base", tmp_path / "tuned")
    assert [task.task for task in by_task] == ["sts", "tiny"]
    assert [task.comparisons[0].metrics for task in by_task] == [
        tasks.compare(tasks.load_result(tmp_path / "base" / name), tasks.load_result(tmp_path / "tuned" / name)).metrics
        for name in ("sts", "tiny")
    ]
    assert "only in" in capsys.readouterr().err
    assert verb.compare(tmp_path / "base" / "tiny", tmp_path / "tuned" / "tiny") == by_task[1:]
    with pytest.raises(KinvecError, match="there is no result here"):
        verb.compare(tmp_path, tmp_path / "tuned")


def test_the_command_prints_for_people_and_for_programs(
    tmp_path: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for side, values in (("a", BASE), ("b", TUNED)):
        tasks.save_result(searched(values, f"model-{side}"), tmp_path / side)
    monkeypatch.setenv("COLUMNS", "140")
    command = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    (code, told), (again, text) = main(*command, "--json"), main(*command)
    assert code == again == 0
    row = json.loads(told)["tasks"][0]["comparisons"][0]["metrics"][0]
    assert row["difference"] == pytest.approx(np.mean(TUNED) - np.mean(BASE)) and {"low", "high", "p"} <= set(row)
    assert "model-a" in text and "95 % interval" in text and f"{row['difference']:+.4f}" in text
    assert "queries won most, by nDCG@10" in text and "model-b says" in text and "relevant at" in text
