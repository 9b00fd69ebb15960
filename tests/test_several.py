"""Comparing any number of systems: corrected p-values, runs and seeds, slices, and what all of them fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import make_run
from test_compare import paired, searched

from kinvec import metrics, tasks
from kinvec.contracts import KinvecError, RecipeError, Result
from kinvec.files import write_json
from kinvec.metrics.several import crossed_interval, holm
from kinvec.tasks import System
from kinvec.verbs import compare as verb

DRAW = np.random.default_rng(0)
BASE = DRAW.choice([0.0, 0.3, 0.5, 1.0], 90).tolist()


def better(by: float, share: float = 0.5, seed: int = 1) -> list[float]:
    draw = np.random.default_rng(seed)
    return [min(1.0, value + by * float(draw.random() < share)) for value in BASE]


def systems(**values: list[float]) -> list[System]:
    return [System(name, [searched(column, name)]) for name, column in values.items()]


# ---- Holm ----


@given(st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p: list[float]) -> None:
    """At any level: the smallest against α / m, the next against α / (m − 1), until one is not rejected."""
    adjusted = holm(p)
    assert all(before <= after for before, after in zip(p, adjusted, strict=True)) and max(adjusted) <= 1
    for level in (0.01, 0.05, 0.2):
        rejected: list[float] = []
        for step, value in enumerate(sorted(p)):
            if value * (len(p) - step) > level:
                break
            rejected.append(value)
        assert sorted(q for q, a in zip(p, adjusted, strict=True) if a <= level) == rejected


def test_the_family_is_the_comparisons_of_a_task() -> None:
    found = tasks.compare_systems(systems(a=BASE, b=better(0.05), c=better(0.02, 0.1), d=better(0.0)))
    plain = [tasks.compare(searched(BASE), searched(v)).metrics[0].p for v in (better(0.05), better(0.02, 0.1), BASE)]
    assert [comparison.metrics[0].p for comparison in found.comparisons] == plain
    assert [comparison.holm for comparison in found.comparisons] == holm(plain)
    assert found.comparisons[0].holm == pytest.approx(3 * plain[0]) and found.comparisons[2].holm == 1
    everyone = tasks.compare_systems(systems(a=BASE, b=better(0.05), c=better(0.02)), all_pairs=True)
    assert [(x.a, x.b) for x in everyone.comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_each_system_has_its_own_interval() -> None:
    found = tasks.compare_systems(systems(a=BASE, b=better(0.1)), by="RR@10")
    assert found.by == "RR@10" and [system.name for system in found.systems] == ["a", "b"]
    for system, values in zip(found.systems, (BASE, better(0.1)), strict=True):
        row = system.metrics["nDCG@10"]
        assert row.value == pytest.approx(np.mean(values))
        assert (row.low, row.high) == tasks.statistic("nDCG@10").interval({"nDCG@10": values})


# ---- What all fail ----


def test_identical_failures() -> None:
    a, b, c = (searched([0.0, 0.0, 0.0, 0.5], name) for name in "abc")
    for result, first in ((a, ["x", "y", "z", "z"]), (b, ["x", "y", "z", "z"]), (c, ["x", "other", "z", "z"])):
        result.per_query["top_ids"] = [[top] for top in first]
    c.per_query["nDCG@10"] = [0.0, 0.0, 0.2, 0.0]
    c.documents = {"id": ["x", "y"], "text": ["the right one", "another"]}
    found = tasks.compare_systems([System(r.model, [r]) for r in (a, b, c)]).failures
    assert (found.everywhere, found.alike) == (2, 1)
    assert [(f.id, f.query, f.given, f.expected) for f in found.shown] == [("q0", "question 0", "x", ["the right one"])]
    assert tasks.compare_systems([System(r.model, [r]) for r in (a, b)]).failures.alike == 3


def test_failures_of_labels_are_the_same_wrong_label() -> None:
    def labelled(said: list[str], model: str) -> Result:
        right = ["u", "u", "v", "v"]
        rows: dict[str, list[Any]] = {"id": list("0123"), "query": list("abcd"), "label": right, "predicted": said}
        rows["accuracy"] = [float(x == y) for x, y in zip(said, right, strict=True)]
        return Result("news", "classification", "test", model, {"accuracy": metrics.mean(rows["accuracy"])}, rows, "f")

    pair = [System(m, [labelled(said, m)]) for m, said in (("m", ["u", "v", "u", "v"]), ("n", ["v", "v", "w", "v"]))]
    found = tasks.compare_systems(pair).failures
    assert (found.everywhere, found.alike) == (2, 1)
    assert [(f.query, f.given, f.expected) for f in found.shown] == [("b", "v", ["u"])]


def test_scored_pairs_have_no_failures() -> None:
    gold = np.arange(30.0)
    a, b = (paired(gold + DRAW.normal(0, s, 30), gold, str(s)) for s in (3.0, 5.0))
    assert tasks.compare_systems([System("a", [a]), System("b", [b])]).failures.everywhere == 0


# ---- Slices ----


def sourced() -> tuple[Result, Result]:
    """30 queries of one word that gain, 60 of two or three that do not; half of the documents are from each source."""
    gained = [min(1.0, v + 0.4) if i < 30 else v for i, v in enumerate(BASE)]
    found = searched(BASE, "a"), searched(gained, "b")
    for result in found:
        result.per_query["query"] = [" ".join(["w"] * (1 + i // 30)) for i in range(90)]
        result.per_query["judged_ids"] = [[f"{'wiki' if i % 2 else 'news'}-{i}", "junk-1"] for i in range(90)]
        result.per_query["judged_scores"] = [[1, 0] for _ in range(90)]
    return found


def test_slices_by_length_and_source() -> None:
    a, b = sourced()
    pair = [System("a", [a]), System("b", [b])]
    found = tasks.compare_systems(pair, sliced=["length", "source"]).slices
    assert [(s.by, s.slice, s.queries) for s in found] == [
        ("length", "1 word", 30), ("length", "2 words", 30), ("length", "3 words", 30),
        ("source", "news", 45), ("source", "wiki", 45),
    ]  # fmt: skip
    short = np.array(b.per_query["nDCG@10"][:30]) - np.array(BASE[:30])
    assert found[0].difference.difference == pytest.approx(short.mean())
    expected = tasks.compare(searched(BASE[:30]), searched(b.per_query["nDCG@10"][:30])).metrics[0]
    assert found[0].difference == expected and found[1].difference.difference == 0
    assert [s.holm for s in found] == holm([s.difference.p for s in found])


def test_slices_by_a_users_columns(tmp_path: Path) -> None:
    a, b = sourced()
    pair = [System("a", [a]), System("b", [b])]
    own = tmp_path / "topics.csv"
    own.write_text("query_id,topic,age\n" + "".join(f"q{i},{'tax' if i < 20 else 'law'},{i}\n" for i in range(80)))
    columns = tasks.read_columns(own)
    found = tasks.compare_systems(pair, sliced=["topic", "age"], columns=columns).slices
    assert [(s.slice, s.queries) for s in found[:3]] == [("law", 60), ("tax", 20), ("(none)", 10)]
    documents = tmp_path / "corpus.jsonl"
    documents.write_text("".join(json.dumps({"_id": f"{s}-{i}", "source": s.upper()}) + "\n"
                                 for i in range(90) for s in ("wiki", "news")))  # fmt: skip
    found = tasks.compare_systems(pair, sliced=["source"], columns=tasks.read_columns(documents)).slices
    assert [(s.slice, s.queries) for s in found] == [("NEWS", 45), ("WIKI", 45)]


def test_many_numbers_are_cut_into_thirds_and_small_slices_stand_together(tmp_path: Path) -> None:
    pair = [System("a", [searched(BASE)]), System("b", [searched(better(0.1))])]
    path = tmp_path / "more.jsonl"
    rows = [{"id": f"q{i}", "year": 1900 + i, "kind": "common" if i < 80 else f"rare {i}"} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tasks.compare_systems(pair, sliced=["year", "kind"], columns=tasks.read_columns(path)).slices
    assert [(s.slice, s.queries) for s in found] == [
        ("1900 to 1929", 30), ("1930 to 1959", 30), ("1960 to 1989", 30), ("common", 80), ("other", 10),
    ]  # fmt: skip


def test_slices_that_are_not_there(tmp_path: Path) -> None:
    pair = [System("a", [searched(BASE)]), System("b", [searched(better(0.1))])]
    with pytest.raises(RecipeError, match=r"no slices by 'colour': there are length, source, top_text"):
        tasks.compare_systems(pair, sliced=["colour"])
    alien = tmp_path / "alien.csv"
    alien.write_text("id,topic\nnobody,tax\n")
    with pytest.raises(KinvecError, match=r"no row of these queries.*'nobody', the queries' such as 'q0'"):
        tasks.compare_systems(pair, sliced=["topic"], columns=tasks.read_columns(alien))
    alien.write_text("name,topic\nq1,tax\n")
    with pytest.raises(KinvecError, match=r"alien.csv: no column says whose row it is"):
        tasks.read_columns(alien)
    for result in (pair[0].results[0], pair[1].results[0]):
        result.per_query["judged_ids"] = [[str(i)] for i in range(90)]
    with pytest.raises(KinvecError, match="begin with no letters"):
        tasks.compare_systems(pair, sliced=["source"])


# ---- Seeds ----


def seeded_run(folder: Path, seed: int, **settings: Any) -> Path:
    run = make_run(folder, seed=0)
    after = np.clip(np.array(tasks.load_result(run / "results/base/docs").per_query["nDCG@10"]) + 0.01 * seed, 0, 1)
    from synthetic_run import search_result

    tasks.save_result(search_result(f"{folder}/model", after), run / "results/tuned/docs")
    write_json(run / "run.json", {"format": 1, "settings": {"seed": seed, **settings}, "inputs": {"model": "m"}})
    return run


def test_runs_that_differ_in_their_seed_alone_are_one_system(tmp_path: Path) -> None:
    runs = [seeded_run(tmp_path / f"run-{seed}", seed) for seed in (1, 2, 3)]
    other = seeded_run(tmp_path / "other", 1, lr=1)
    (task,) = verb.compare(*runs, other)
    assert [system.seeds for system in task.systems] == [[], [1, 2, 3], []]
    before = np.array(tasks.load_result(runs[0] / "results/base/docs").per_query["nDCG@10"])
    each = [np.array(tasks.load_result(run / "results/tuned/docs").per_query["nDCG@10"]) - before for run in runs]
    row = task.comparisons[0].metrics[0]
    assert row.difference == pytest.approx(np.mean(each))
    mean = np.mean(each, axis=0)
    expected = tasks.statistic("nDCG@10").difference({"nDCG@10": 0 * mean}, {"nDCG@10": mean}, 0)
    assert (row.low, row.high) == pytest.approx(expected[0]) and row.p == expected[1]
    spread = task.systems[1].spread[0]
    values = [tasks.load_result(run / "results/tuned/docs").metrics["nDCG@10"] for run in runs]
    assert spread.values == values and (spread.least, spread.most) == (min(values), max(values))
    assert spread.deviation == pytest.approx(np.std(values, ddof=1))
    assert (spread.low, spread.high) == pytest.approx(crossed_interval(np.stack(each)))
    assert task.systems[2].spread == [], "other settings are another system"


def test_the_mean_of_equal_values_is_a_tie() -> None:
    same = [searched([0.1] * 9, f"seed {seed}") for seed in (1, 2, 3)]
    found = tasks.compare_systems([System("base", [same[0]]), System("tuned", same, (1, 2, 3))]).comparisons[0]
    assert np.mean([0.1] * 3) != 0.1, "which is why"
    assert [(row.won, row.tied, row.lost) for row in found.metrics] == [(0, 9, 0)] * 2 and not found.wins


def test_a_run_is_compared_with_its_base_and_stands_for_its_tuned_model(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", gain=-0.05, seed=3)
    (alone,) = verb.compare(a)
    base, tuned = (tasks.load_result(a / "results" / side / "docs") for side in ("base", "tuned"))
    assert alone.comparisons[0].metrics == tasks.compare(base, tuned).metrics
    write_json(b / "run.json", {"format": 1, "settings": {"lr": 2}})
    tasks.save_result(base, b / "results/base/docs")
    (both,) = verb.compare(a, b)
    assert [system.name for system in both.systems] == ["base", str(a), str(b)]
    assert [c.b for c in both.comparisons] == [str(a), str(b)]
    with pytest.raises(RecipeError, match="one system to compare"):
        verb.compare(a / "results" / "base")
    with pytest.raises(KinvecError, match="no results of its tuned model"):
        verb.compare(make_run(tmp_path / "going", trained=False))


def test_of_correlations_the_ends_are_averaged_and_the_largest_p_is_taken() -> None:
    gold = DRAW.uniform(0, 5, 80)
    base = paired(gold + DRAW.normal(0, 4, 80), gold, "base")
    tuned = [paired(gold + DRAW.normal(0, 2, 80), gold, "tuned") for _ in range(3)]
    found = tasks.compare_systems([System("base", [base]), System("tuned", tuned, (1, 2, 3))])
    single = [tasks.compare(base, one).metrics[0] for one in tuned]
    row = found.comparisons[0].metrics[0]
    assert row.difference == pytest.approx(np.mean([one.difference for one in single]))
    assert (row.low, row.high) == pytest.approx(tuple(np.mean([(x.low, x.high) for x in single], axis=0)))
    assert row.p == max(one.p for one in single)
    assert found.systems[1].spread[0].low is None


def test_the_interval_over_queries_and_seeds_knows_both_variances() -> None:
    draw = np.random.default_rng(4)
    queries = draw.normal(0.1, 0.3, 200)
    alike = np.stack([queries] * 3)
    low, high = crossed_interval(alike)
    half = 1.972 * queries.std(ddof=1) / np.sqrt(200)
    assert (low, high) == pytest.approx((queries.mean() - half, queries.mean() + half), rel=1e-3)
    apart = alike + np.array([[-0.1], [0.0], [0.1]])
    wider = crossed_interval(apart)
    half = 4.303 * 0.1 / np.sqrt(3)  # three seeds alone: Student with two degrees of freedom
    assert wider[1] - wider[0] == pytest.approx(2 * half, rel=0.15) and wider[0] < low < high < wider[1]


# ---- The command ----


def test_the_command_prints_several_systems(tmp_path: Path, main: Callable[..., tuple[int, str]]) -> None:
    places = []
    for name, values in (("base", BASE), ("good", better(0.2)), ("bad", [0.0] * 90)):
        places.append(str(tasks.save_result(searched(values, f"model-{name}"), tmp_path / name)))
    code, text = main("compare", *places, "--by", "length", "--shown", "1")
    assert code == 0 and "A model-base\nB model-good\nC model-bad" in text
    assert "Holm of 2" in text and "B − A" in text and "C − A" in text and "hints, not evidence" in text
    assert "queries won most, by nDCG@10:" in text and "queries lost most, by nDCG@10, C − A" in text
    assert "queries that all 3 fail" in text
    code, text = main("compare", *places, "--json", "--all-pairs")
    told = json.loads(text)
    assert [(c["a"], c["b"]) for c in told["tasks"][0]["comparisons"]] == [
        ("model-base", "model-good"), ("model-base", "model-bad"), ("model-good", "model-bad"),
    ]  # fmt: skip
    code, text = main("compare", *places, "--slices", str(tmp_path / "nothing.csv"))
    assert code == 1 and "there is no such file" in text


def test_two_results_are_told_as_ever(tmp_path: Path, main: Callable[..., tuple[int, str]]) -> None:
    for side, values in (("a", BASE), ("b", better(0.2))):
        tasks.save_result(searched(values, f"model-{side}"), tmp_path / side)
    code, text = main("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    lines = text.splitlines()
    assert code == 0 and lines[:3] == ["tiny, test: 90 queries", "A model-a", "B model-b"]
    assert lines[3].split() == "metric A B B − A 95 % interval p won tied lost".split()
    order = [text.index(part) for part in ("metric", "queries won most, by nDCG@10:")]
    assert all(x < y for x, y in pairwise(order)) and "Holm" not in text
