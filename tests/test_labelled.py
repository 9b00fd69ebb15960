"""Labelled texts and scored pairs: batches, training, classifiers and clusters over embeddings, whole runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score, v_measure_score
from synthetic_run import make_run

from kinvec import metrics, tasks
from kinvec.contracts import KinvecError, LabelledData, RecipeError, Result
from kinvec.embedder import open_folder
from kinvec.files import open_data, open_problem
from kinvec.gradcache import backward
from kinvec.mixing import alone
from kinvec.objectives import ObjectiveSettings, make_objective
from kinvec.pipeline import open_run_data, run
from kinvec.recipe import load_recipe
from kinvec.reporting import build_report, collect
from kinvec.sampling import DataSettings, LabelSource, label_source, scored_source
from kinvec.trainer import step_chunks, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")


def write_labelled(path: Path, counts: Sequence[int]) -> Path:
    rows = [
        {"text": f"text {i} of label {label}", "label": f"L{label}"} for label, n in enumerate(counts) for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled_source(path: Path, seed: int = 0, **changes: Any) -> LabelSource:
    table = open_data(path)
    return label_source(table, np.arange(len(table)), DataSettings(**changes), seed)


# ---- batches by label ----


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(2, 9), min_size=2, max_size=6), size=st.integers(4, 24), each=st.integers(2, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_text_of_a_batch_has_a_positive_and_a_negative(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], size: int, each: int, seed: int
) -> None:
    path = write_labelled(tmp_path_factory.mktemp("labels") / "rows.jsonl", counts)
    source = labelled_source(path, seed, texts_per_label=each)
    for step in range(2 * source.steps_per_epoch(size)):
        batch = source.batch(step, size)
        labels = Counter(batch.labels.tolist())
        assert len(labels) == min(len(counts), max(2, size // each)), "P labels"
        assert min(labels.values()) >= 2 and len(set(batch.queries)) == len(batch.queries) <= size
        names = {label: text.split()[-1] for text, label in zip(batch.queries, batch.labels.tolist(), strict=True)}
        for text, label in zip(batch.queries, batch.labels.tolist(), strict=True):
            assert text.endswith(names[label]), "one number a label"


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    path = write_labelled(tmp_path / "rows.jsonl", [11, 7, 23, 5])
    source = labelled_source(path, 3)
    batches = [source.batch(step, 8) for step in range(20)]
    for step in (17, 2, 11, 3):  # a resumed run begins anywhere
        again = labelled_source(path, 3).batch(step, 8)
        assert again.queries == batches[step].queries and torch.equal(again.labels, batches[step].labels)
    assert labelled_source(path, 4).batch(2, 8).queries != batches[2].queries
    assert batches[0].ids[0].startswith(f"{path}:")


def test_a_labels_texts_all_come_before_one_comes_again(tmp_path: Path) -> None:
    source = labelled_source(write_labelled(tmp_path / "rows.jsonl", [12, 12]), texts_per_label=2)
    assert source.steps_per_epoch(8) == 3
    epochs = [[text for step in range(3) for text in source.batch(3 * e + step, 8).queries] for e in (0, 1)]
    assert all(Counter(texts) == Counter(epochs[0]) and len(set(texts)) == 24 for texts in epochs)
    assert epochs[0] != epochs[1]


def test_labels_that_cannot_be_trained_on_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = labelled_source(write_labelled(tmp_path / "one.jsonl", [4, 1, 4]))
    assert "labels with a single text are not trained on: L1" in capsys.readouterr().err
    assert len(source) == 8
    with pytest.raises(RecipeError, match=r"trainer\.batch_size: 3"):
        source.batch(0, 3)
    with pytest.raises(KinvecError, match="two labels with at least two texts"):
        labelled_source(write_labelled(tmp_path / "none.jsonl", [4, 1]))


def write_scored(path: Path, count: int = 10) -> Path:
    rows = [{"sentence1": f"first {i}", "sentence2": f"second {i}", "score": i / 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scored_pairs_come_once_an_epoch_with_scores_from_0_to_1(tmp_path: Path) -> None:
    table = open_data(write_scored(tmp_path / "pairs.jsonl"))
    source = scored_source(table, np.arange(1, 10), DataSettings(), 0)
    batches = [source.batch(step, 4) for step in range(source.steps_per_epoch(4))]
    seen = {}
    for batch in batches:
        first, second = batch.queries[: len(batch.ids)], batch.queries[len(batch.ids) :]
        assert [text.split()[1] for text in first] == [text.split()[1] for text in second]
        seen |= {int(text.split()[1]): score for text, score in zip(first, batch.scores.tolist(), strict=True)}
    assert seen == pytest.approx({i: (i - 1) / 8 for i in range(1, 10)}) and len(batches) == 3
    assert scored_source(table, np.arange(10), DataSettings(score_range=(0, 9)), 0).high == 9
    with pytest.raises(KinvecError, match=r"pairs\.jsonl:10: the score 4\.5 is outside data\.score_range, 0 to 4"):
        scored_source(table, np.arange(10), DataSettings(score_range=(0, 4)), 0)
    with pytest.raises(KinvecError, match="all scores are 0"):
        scored_source(table, np.arange(1), DataSettings(), 0)


# ---- training ----


@pytest.mark.parametrize("objective", [{"name": "triplet"}, {"name": "supcon"}, {"name": "triplet", "mining": "all"}])
def test_a_step_in_chunks_is_the_step_in_one_piece(
    tmp_path: Path, tiny_folder: Path, objective: dict[str, Any]
) -> None:
    """Loss and gradients, whether chunks of 16 tokens are recomputed or one holds everything."""
    embedder, chosen = open_folder(tiny_folder), make_objective(ObjectiveSettings(**objective))
    asked = alone(labelled_source(write_labelled(tmp_path / "rows.jsonl", [9, 9, 9])), chosen).step(0, 12)
    found = {}
    for tokens in (4096, 16):
        embedder.zero_grad()
        chunks, _ = step_chunks(embedder, tokenized(embedder, asked), tokens)
        value = backward(
            embedder, chunks, lambda vectors: chosen.loss(vectors, vectors[:0], asked.batch), keep=tokens // 4096
        )
        found[tokens] = value, {name: p.grad for name, p in embedder.named_parameters() if p.grad is not None}
        assert (len(chunks) > 1) == (tokens == 16)
    assert found[16][0] == pytest.approx(found[4096][0], rel=1e-5) and found[16][0] > 0
    assert found[16][1].keys() == found[4096][1].keys()
    for name, gradient in found[16][1].items():
        torch.testing.assert_close(gradient, found[4096][1][name], rtol=1e-3, atol=1e-6)


SENTENCES = {
    "weather": ["rain fell all day", "a storm is near", "the sun shines", "snow in the hills", "wind and clouds"],
    "money": ["the bank lends", "stocks fell again", "prices rise", "a loan at low rates", "the market closed"],
    "food": ["bread and cheese", "the soup is hot", "fresh fruit", "a bowl of rice", "fish for dinner"],
}


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.csv"
    rows = [(f"{text} {again}", label) for label, texts in SENTENCES.items() for text in texts for again in "abcd"]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.mark.parametrize("name", ["triplet", "supcon"])
def test_a_run_on_labels_measures_before_and_after(
    tmp_path: Path, tiny_folder: Path, sentences: Path, name: str
) -> None:
    overrides = [
        f"model={tiny_folder}", f"data.train={sentences}", f"out={tmp_path / 'run'}", f"objective.name={name}",
        "objective.margin=0.5", "data.holdout=0.25", "trainer.batch_size=12", "trainer.max_steps=30", "trainer.lr=3e-3",
        "threads=1",
    ]  # fmt: skip
    summary = run(load_recipe(None, overrides))
    found = summary["results"][0]
    assert list(found["metrics"]) == list(tasks.LABELLED) and found["unit"] == "texts"
    assert found["metrics"]["silhouette"]["difference"] > 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ("active_triplets" in log[0]) == (name == "triplet")
    assert log[-1]["loss"] < log[0]["loss"] and any("accuracy_knn" in row.get("dev", {}) for row in log)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(title in page for title in ("t-SNE", "PCA", "silhouette"))
    count = len(tasks.load_result(tmp_path / "run" / "results" / "base" / "sentences").per_query["id"])
    (picture,) = collect(tmp_path / "run")["maps"]
    for method in picture["methods"]:
        assert [len(side) for side in method["places"]] == [count, count], "each test text once before and once after"
    assert run(load_recipe(None, overrides)) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert build_report(tmp_path / "run").is_file()


@pytest.mark.parametrize("name", ["cosent", "angle", "cosine"])
def test_a_run_on_scored_pairs_learns_their_order(tmp_path: Path, tiny_folder: Path, name: str) -> None:
    words = [text for texts in SENTENCES.values() for text in texts]
    draw = np.random.default_rng(0)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(80):
            a, b = (words[j] for j in draw.choice(len(words), 2, replace=False))
            same = next(label for label, texts in SENTENCES.items() if a in texts)
            row = {"sentence1": f"{a} {i}", "sentence2": b, "score": 4.0 if b in SENTENCES[same] else 1.0}
            file.write(json.dumps(row) + "\n")
    summary = run(load_recipe(None, [
        f"model={tiny_folder}", f"data.train={tmp_path / 'pairs.jsonl'}", f"out={tmp_path / 'run'}", "threads=1",
        f"objective.name={name}", "trainer.batch_size=16", "trainer.max_steps=40", "trainer.lr=3e-3",
        "data.holdout=0.25",
    ]))  # fmt: skip
    moved = summary["results"][0]["metrics"]["spearman_cosine"]
    assert moved["tuned"] > moved["base"] + 0.1 and summary["results"][0]["unit"] == "pairs"


def test_what_does_not_fit_is_said_before_a_model_is_loaded(tmp_path: Path, sentences: Path, tiny_pairs: Path) -> None:
    def opening(*overrides: str) -> Any:
        return open_run_data(load_recipe(None, ["model=none", f"out={tmp_path / 'run'}", *overrides])).sets[0]

    labels = f"data.train={sentences}"
    with pytest.raises(KinvecError, match=r"holds labelled; contrastive .* set objective\.name=triplet"):
        opening(labels)
    with pytest.raises(
        KinvecError, match=r"holds retrieval; triplet .* texts with labels.*objective\.name=contrastive"
    ):
        opening(f"data.train={tiny_pairs}", "objective.name=triplet")
    with pytest.raises(RecipeError, match=r"no label 'mony'; did you mean 'money'"):
        opening(labels, "objective.name=triplet", "data.labels=[mony]")
    with pytest.raises(RecipeError, match=r"data\.labels: .* no labels"):
        opening(f"data.train={tiny_pairs}", "data.labels=[money]")
    found = opening(labels, "objective.name=triplet", "data.labels=[money,food]", "data.holdout=0.2")
    assert isinstance(found.test, LabelledData) and isinstance(found.dev, LabelledData)
    sides = [set(found.test.texts), set(found.dev.texts), set(found.test.training_texts)]
    assert (
        set(found.test.labels) == {"money", "food"} and not sides[0] & sides[1] and not (sides[0] | sides[1]) & sides[2]
    )
    assert sum(map(len, sides)) == 40 and found.test.training_texts == found.dev.training_texts


def test_a_folder_with_a_test_file_is_tested_on_it(tmp_path: Path, sentences: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_text(sentences.read_text())
    (folder / "test.csv").write_text("text,label\nhail and fog,weather\na new coin,money\n")
    data = open_run_data(load_recipe(None, [
        "model=none", f"out={tmp_path / 'run'}", f"data.train={folder}", "objective.name=triplet",
    ])).sets[0]  # fmt: skip
    assert isinstance(data.test, LabelledData) and data.test.texts == ["hail and fog", "a new coin"]
    problem = open_problem(folder)
    assert isinstance(problem, LabelledData) and list(problem.texts) == data.test.texts
    assert len(problem.training_texts) == 60 and len(data.test.training_texts) == 54


# ---- classifiers, neighbours, clusters ----


class Planted:
    """Texts are `label:number`; a label's texts lie around its own direction."""

    name = "planted"

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        vectors = []
        for text in texts:
            label, number = text.split(":")
            around = np.random.default_rng([int(number), 7]).normal(size=6)
            vectors.append(np.eye(6)[int(label)] + self.noise * around)
        return np.array(vectors, dtype=np.float32) * 3

    encode_documents = encode_queries


def planted(labels: int = 3, each: int = 12, training: int = 20) -> LabelledData:
    texts = [f"{label}:{label * 100 + i}" for label in range(labels) for i in range(each)]
    known = [f"{label}:{1000 + label * 100 + i}" for label in range(labels) for i in range(training)]
    return LabelledData(texts, [t[0] for t in texts], known, [t[0] for t in known], "f", "planted", "test")


def test_separated_labels_are_all_recovered() -> None:
    result = tasks.measure(planted(), Planted(0.01))
    assert {name: round(value, 2) for name, value in result.metrics.items()} == {
        "accuracy": 1.0, "accuracy_lr": 1.0, "accuracy_knn": 1.0, "silhouette": 1.0, "v_measure": 1.0,
    }  # fmt: skip
    assert result.per_query["predicted"] == result.per_query["label"] == result.per_query["nearest_label"]
    assert len(set(zip(result.per_query["tsne_x"], result.per_query["tsne_y"], strict=True))) == 36


def test_each_measure_is_that_of_a_plain_reading_of_its_definition() -> None:
    data = planted()
    result = tasks.classification(data, Planted(0.6))
    assert all(0.0 < value < 0.99 for value in result.metrics.values()), result.metrics
    x, y = (Planted(0.6).encode_queries(texts) for texts in (data.texts, data.training_texts))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    labels, known = np.array(data.labels), np.array(data.training_labels)
    rows = {
        name: np.array(result.per_query[name]) for name in ("accuracy", "accuracy_lr", "accuracy_knn", "silhouette")
    }
    nearest = np.argsort(-(x @ y.T), axis=1)[:, :5]
    votes = [Counter(known[row].tolist()) for row in nearest]
    majority = [min(vote, key=lambda label: (-vote[label], label)) for vote in votes]
    assert (rows["accuracy_knn"] == (np.array(majority) == labels)).all()
    assert result.per_query["nearest"] == [data.training_texts[row[0]] for row in nearest]
    assert (rows["accuracy_lr"] == (LogisticRegression().fit(y, known).predict(x) == labels)).all()
    assert result.metrics["silhouette"] == pytest.approx(silhouette_score(x, labels, metric="cosine"), abs=1e-5)
    clustered = []
    drawing, model = random.Random(42), MiniBatchKMeans(3, batch_size=512, n_init=1, random_state=42)
    for _ in range(10):  # MTEB: one drawing for all samples, the same seed for each
        chosen = np.array(drawing.choices(range(len(labels)), k=16_384))
        clustered.append(v_measure_score(labels[chosen], model.fit_predict(x[chosen])))
    assert result.metrics["v_measure"] == pytest.approx(np.mean(clustered), abs=1e-9)
    order, right = list(range(len(known))), np.zeros(len(labels))
    for _ in range(10):  # MTEB: one list of indices, shuffled on by the same seed
        np.random.seed(42)
        np.random.shuffle(order)
        seen: dict[str, list[int]] = {label: [] for label in "012"}
        for row in order:
            seen[known[row]] = (seen[known[row]] + [row])[:8]
        chosen = sorted(row for rows_ in seen.values() for row in rows_)
        right += LogisticRegression().fit(y[chosen], known[chosen]).predict(x) == labels
    np.testing.assert_allclose(rows["accuracy"], right / 10)


def test_two_results_on_labels_are_compared_text_by_text() -> None:
    before, after = (tasks.classification(planted(), Planted(noise)) for noise in (0.9, 0.5))
    found = tasks.compare(before, after, shown=3)
    assert [d.metric for d in found.metrics] == list(tasks.LABELLED) and found.by == "accuracy"
    for d in found.metrics:
        assert d.low < d.difference < d.high and d.low > 0 and d.p < 0.05, d
        assert d.won + d.tied + d.lost == 36
    assert found.wins[0].b["label"] == found.wins[0].b["predicted"] != found.wins[0].a["predicted"]
    other = planted(each=13)
    with pytest.raises(KinvecError, match="different data"):
        tasks.compare(before, tasks.classification(other, Planted(0.5)))


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(KinvecError, match="fewer than two labels"):
        tasks.classification(planted(labels=1), Planted(0.5))
    with pytest.raises(RecipeError, match="unknown measure 'accuracy_svm'"):
        tasks.classification(planted(), Planted(0.5), ["accuracy_svm"])


def test_of_many_labels_the_picture_colours_those_that_are_recovered_worst(tmp_path: Path) -> None:
    place = make_run(tmp_path / "run", evaluate=False)
    labels = [f"<b>{number}</b>" for number in range(10) for _ in range(4)]
    draw = np.random.default_rng(0)
    for side in ("base", "tuned"):
        right = [0.0 if side == "tuned" else float(label < "<b>2") for label in labels]  # 0 and 1 are the best
        columns = {
            "id": [str(i) for i in range(40)], "query": ["a text"] * 40, "label": labels, "accuracy": right,
            "predicted": labels, "nearest": labels, "nearest_label": labels,
            "tsne_x": [None, *draw.normal(size=39).tolist()], "tsne_y": [None, *draw.normal(size=39).tolist()],
        }  # fmt: skip
        result = Result("many", "classification", "test", side, {"accuracy": metrics.mean(right)}, columns, "f")
        tasks.save_result(result, place / "results" / side / "many")
    (found,) = collect(place)["maps"]
    assert found["groups"] == [*(f"<b>{number}</b>" for number in range(2, 10)), "2 other labels"]
    assert found["group"].count(8) == 7 and found["coloured"] == 8 and len(found["group"]) == 39
    assert all(0 <= value <= 100 for side in found["methods"][0]["places"] for dot in side for value in dot)
    assert "<b>2</b>" not in build_report(place).read_text()


# ---- v-measure and its intervals ----

CLUSTERINGS = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 4), min_size=n, max_size=n) for _ in range(3)))
)


@settings(max_examples=60, deadline=None)
@given(CLUSTERINGS)
def test_v_measure_is_scikit_learns(both: tuple[list[int], list[int], list[int]]) -> None:
    labels, clusters, others = map(np.array, both)
    once = np.ones((1, len(labels)), dtype=np.int64)
    assert metrics.v_measure(labels, clusters[None], once) == pytest.approx(v_measure_score(labels, clusters), abs=1e-9)
    several, often = np.stack([clusters, others]), np.stack([1 + clusters % 3, others % 2])
    samples = [np.repeat(np.arange(len(labels)), times) for times in often]
    scores = [v_measure_score(labels[i], row[i]) if len(i) else 1.0 for i, row in zip(samples, several, strict=True)]
    assert metrics.v_measure(labels, several, often) == pytest.approx(np.mean(scores), abs=1e-9)


@settings(max_examples=8, deadline=None)
@given(CLUSTERINGS)
def test_its_interval_is_that_of_recomputing_it_on_each_resample(both: tuple[list[int], ...]) -> None:
    labels, a, b = map(np.array, both)
    draws = np.random.default_rng(5).integers(0, len(labels), size=(60, len(labels)))
    expected = [v_measure_score(labels[d], b[d]) - v_measure_score(labels[d], a[d]) for d in draws]
    once = np.ones((1, len(labels)), dtype=np.int64)
    low, high = metrics.bootstrap_v_measure(labels, a[None], b[None], once, seed=5, resamples=60)
    assert (low, high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-9)


def test_its_p_value_knows_no_numbers_of_clusters() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 80)
    noisy = np.where(draw.random(80) < 0.5, labels, draw.integers(0, 4, 80))
    twice = np.stack([noisy, np.array([1, 0, 3, 2])[noisy]])
    renamed, exact, once = np.array([2, 3, 1, 0])[twice], np.stack([labels, labels]), np.ones((2, 80), dtype=np.int64)
    assert metrics.randomisation_v_measure(labels, twice, renamed, once, resamples=1000) == 1.0
    assert metrics.randomisation_v_measure(labels, twice, exact, once, resamples=1000) < 0.01


def test_an_older_v_measure_is_not_taken_for_this_one() -> None:
    with pytest.raises(KinvecError, match="of a single clustering; evaluate again"):
        tasks.statistic("v_measure").value({"label": ["a", "b"], "cluster": [0, 1]})


# ---- clustering ----


def test_texts_without_training_texts_are_clustered(tmp_path: Path) -> None:
    data = planted()
    rows = [{"text": text, "label": f"L{label}"} for text, label in zip(data.texts, data.labels, strict=True)]
    for name in ("alone.jsonl", "folder/test.jsonl", "both/train.jsonl", "both/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows[name == "both/train.jsonl" :]))
    for source, split, task in (
        ("alone.jsonl", "test", None), ("folder", "test", None), ("both", "train", None),
        ("both", "test", "clustering"),
    ):  # fmt: skip
        problem = open_problem(tmp_path / source, split=split, task=task)
        assert problem.kind == "clustering" and isinstance(problem, LabelledData) and not len(problem.training_texts)
    assert open_problem(tmp_path / "both").kind == "classification"
    with pytest.raises(KinvecError, match="train.csv beside test.csv, or cluster them"):
        open_problem(tmp_path / "alone.jsonl", task="classification")
    with pytest.raises(RecipeError, match="there is no task 'cluster'; there are retrieval, reranking"):
        open_problem(tmp_path / "alone.jsonl", task="cluster")


def test_clusterings_are_compared_text_by_text(tmp_path: Path) -> None:
    data = replace(planted(), training_texts=[], training_labels=[], kind="clustering")
    before, after = (tasks.measure(data, Planted(noise)) for noise in (0.9, 0.4))
    assert (before.kind, list(before.metrics)) == ("clustering", ["v_measure", "silhouette"])
    assert tasks.load_result(tasks.save_result(before, tmp_path)) == before
    found = tasks.compare(before, after)
    assert found.by == "v_measure" and found.metrics[0].low > 0 and found.metrics[0].p < 0.01
    assert found.wins[0].a["predicted"] in "012" and found.wins[0].b["value"] > found.wins[0].a["value"]
    with pytest.raises(KinvecError, match="a classifier needs two to learn"):
        tasks.measure(data, Planted(0.5), ["accuracy"])
