"""Several data sets in one training: shares, order, prompts, masks across data sets, recipe, log, report, resume."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import Rows, closed_of, plain, rows, source_of, table_of
from tiny_models import WORDS

from kinvec.contracts import KinvecError, RecipeError
from kinvec.embedder import open_folder
from kinvec.mixing import Mixture, TrainingSet, divide
from kinvec.objectives import ObjectiveSettings, make_objective
from kinvec.pipeline import run
from kinvec.recipe import load_recipe
from kinvec.reporting import collect
from kinvec.run_data import open_run_data

pytestmark = pytest.mark.usefixtures("one_thread")

CONTRASTIVE = make_objective(ObjectiveSettings())


def numbered(name: str, count: int) -> Rows:
    return [{"query": f"{name} question {i}", "pos_doc": f"{name} answer {i}"} for i in range(count)]


def mixture(folder: Path, sizes: dict[str, int], weights: dict[str, float] | None = None, **changes: Any) -> Mixture:
    """Data sets of so many rows, each with prompts of its own."""
    parts = [
        TrainingSet(
            name, source_of(table_of(numbered(name, count), folder, f"{name}.jsonl")), CONTRASTIVE,
            {"query": f"{name}? ", "document": f"{name}: "}, (weights or {}).get(name),
        )
        for name, count in sizes.items()
    ]  # fmt: skip
    return Mixture(tuple(parts), **changes)


# ---- which data set a step draws from ----


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(6, 300))
def test_shares_become_whole_numbers_that_add_up(raw: list[float], total: int) -> None:
    shares = np.array(raw) / sum(raw)
    counts = divide(total, shares)
    assert sum(counts) == total and min(counts) >= 1
    if (shares * total >= 1).all():
        assert np.abs(np.array(counts) - shares * total).max() < 1


def test_by_size_an_epoch_goes_once_through_every_data_set(tmp_path: Path) -> None:
    """In an order that mixes the sets, another one in the next epoch, and the same again for the same seed."""
    sizes = {"a": 40, "b": 13, "c": 5}
    source = mixture(tmp_path, sizes, seed=3)
    steps = source.steps_per_epoch(4)
    assert steps == 10 + 4 + 2
    orders = []
    for epoch in range(3):
        drawn = [source.step(epoch * steps + place, 4) for place in range(steps)]
        seen = Counter(query for step in drawn for query in step.queries)
        assert len(seen) == 58 and set(seen.values()) == {1}
        orders.append([next(iter(step.rows)) for step in drawn])
        for step in drawn:
            assert len({query.split()[0] for query in step.queries}) == 1 and set(step.rows) == {step.queries[0][0]}
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
    again = mixture(tmp_path, sizes, seed=3)
    for step in (31, 2, 17):  # whatever was drawn before
        assert again.step(step, 4).queries == source.step(step, 4).queries
    assert [mixture(tmp_path, sizes, seed=4).step(k, 4).queries for k in range(steps)] != [
        source.step(k, 4).queries for k in range(steps)
    ]


def test_weights_and_temperature_set_the_shares(tmp_path: Path) -> None:
    """Weights alone, where there are some; a small set is repeated, each of its rows as often as any other."""
    sizes = {"a": 80, "b": 16}
    source = mixture(tmp_path, sizes, {"a": 1.0, "b": 3.0})
    assert source.counts(4) == (6, 18)
    assert source.plan(4, 48) == {
        "a": {"rows": 80, "share": 0.25, "passes": 0.6}, "b": {"rows": 16, "share": 0.75, "passes": 9.0},
    }  # fmt: skip
    seen = Counter(query for k in range(48) for query in source.step(k, 4).queries)
    assert {n for query, n in seen.items() if query[0] == "b"} == {9}
    assert {n for query, n in seen.items() if query[0] == "a"} == {1} and len(seen) == 16 + 48
    assert mixture(tmp_path, sizes, share_temperature=1e9).counts(4) == (12, 12)
    assert mixture(tmp_path, sizes, share_temperature=2.0).counts(4) == (17, 7)  # √20 : √4 of 24


def test_every_text_goes_behind_the_prompt_of_its_data_set(tmp_path: Path) -> None:
    alone = mixture(tmp_path, {"a": 6, "b": 6})
    for number in range(4):
        step = alone.step(number, 3)
        name = step.queries[0][0]
        assert step.query_prompts == [f"{name}? "] * 3 and step.document_prompts == [f"{name}: "] * 3
    step = mixture(tmp_path, {"a": 6, "b": 6}, batches="mixed").step(0, 4)
    assert step.rows == {"a": 2, "b": 2} and step.batch.targets.tolist() == [0, 1, 2, 3]
    assert [p[0] for p in step.query_prompts] == [q[0] for q in step.queries] == ["a", "a", "b", "b"]
    assert [p[0] for p in step.document_prompts] == [d[0] for d in step.documents] == ["a", "a", "b", "b"]


def test_a_mixed_batch_has_room_for_every_data_set(tmp_path: Path) -> None:
    sizes = {"a": 90, "b": 9, "c": 1}
    source = mixture(tmp_path, sizes, batches="mixed")
    assert source.counts(10) == (8, 1, 1) and source.counts(3) == (1, 1, 1)


# ---- masks across data sets ----


@given(st.data())
def test_a_mixed_batch_masks_known_positives_of_all_data_sets(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Within a data set as ever; across data sets by text: against a reference that looks at every pair of texts."""
    folder = tmp_path_factory.mktemp("mixed")
    sets = [data.draw(rows()) for _ in range(2)]
    sources = [source_of(table_of(made, folder, f"{n}.jsonl"), negatives_per_query=2) for n, made in enumerate(sets)]
    parts = tuple(TrainingSet(str(n), one, CONTRASTIVE, {}) for n, one in enumerate(sources))
    size = data.draw(st.integers(2, 8))
    source = Mixture(parts, "mixed")
    batch = source.step(0, size).batch
    own = [one.batch(0, count) for one, count in zip(sources, source.counts(size), strict=True)]
    assert batch.queries == own[0].queries + own[1].queries
    count = len(own[0].queries)
    positives = [document for one in own for document in one.documents[: len(one.queries)]]
    assert batch.documents[: len(batch.queries)] == positives
    assert sorted(batch.documents) == sorted(own[0].documents + own[1].documents)
    closed = closed_of(batch)
    known = {(plain(r["query"]), plain(d)) for made in sets for r in made for d in r["pos_doc"]}
    for i, query in enumerate(batch.queries):
        for j, document in enumerate(batch.documents):
            by_text = (plain(query), plain(document)) in known or plain(query) == plain(document)
            same_set = (i < count) == (int(batch.owner[j]) < count)
            if j == i:
                assert not closed[i, j]
            elif by_text:
                assert closed[i, j], (query, document)
            elif not same_set:
                assert not closed[i, j], (query, document)
    for part, one in enumerate(own):
        chosen = [j for j in range(len(batch.documents)) if (int(batch.owner[j]) < count) == (part == 0)]
        assert [batch.documents[j] for j in chosen] == one.documents
        rows_of = slice(0, count) if part == 0 else slice(count, None)
        assert (closed[rows_of][:, chosen] | ~closed_of(one)).all()
        assert torch.equal(batch.owner[chosen] - (0 if part == 0 else count), one.owner)


def test_the_loss_of_each_data_set_is_measured_in_a_mixed_batch(tmp_path: Path) -> None:
    """They average, by their queries' weights, to the loss of the batch."""
    step = mixture(tmp_path, {"a": 8, "b": 4}, batches="mixed").step(0, 6)
    draw = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(6, 5, generator=draw) for _ in range(2))
    found = step.objective.measures(queries, documents, step.batch)
    whole = step.objective.loss(queries, documents, step.batch)
    assert set(found) == {"loss/a", "loss/b"}
    assert (4 * found["loss/a"] + 2 * found["loss/b"]) / 6 == pytest.approx(float(whole), rel=1e-5)
    first = replace(step.batch, weights=torch.tensor([1.0, 1, 1, 1, 0, 0]))
    assert found["loss/a"] == pytest.approx(float(CONTRASTIVE.loss(queries, documents, first)))


# ---- the recipe ----

LIST = """\
model: tiny
out: {out}
prompts: {{query: "ask: "}}
objective: {{temperature: 0.03}}
data:
  - {{train: red.jsonl, weight: 2, negatives_per_query: 1, prompts: {{document: "red: "}}}}
  - {{name: blue, train: other.jsonl, weight: 1, objective: {{label_smoothing: 0.1}}}}
"""


def written(folder: Path, text: str = LIST) -> Path:
    (folder / "mix.yaml").write_text(text.format(out=folder / "run"))
    return folder / "mix.yaml"


def test_a_list_under_data_is_several_data_sets(tmp_path: Path) -> None:
    """Keys of all hold where a data set has none of its own; overrides reach both."""
    overrides = ["data.max_length=20", "data.negatives_per_query=7", "data.sets.blue.weight=5"]
    recipe = load_recipe(written(tmp_path), overrides)
    red, blue = recipe.sets["red"], recipe.sets["blue"]
    assert list(recipe.sets) == ["red", "blue"] and recipe.data.max_length == 20
    assert (red.train, red.weight, red.negatives_per_query) == ("red.jsonl", 2, 1)
    assert (blue.train, blue.weight, blue.negatives_per_query) == ("other.jsonl", 5, 7)
    assert red.prompts == {"query": "ask: ", "document": "red: "} and blue.prompts == {"query": "ask: "}
    assert [(one.objective.temperature, one.objective.label_smoothing) for one in (red, blue)] == [
        (0.03, 0),
        (0.03, 0.1),
    ]
    from kinvec.config import dump

    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_single_data_set_is_the_recipes_own(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["model=m", f"out={tmp_path}", "data.train=a.jsonl", "data.negatives_per_query=2"])
    assert list(recipe.sets) == [""] and recipe.sets[""].train == "a.jsonl" and recipe.data.sets == {}
    assert recipe.sets[""].negatives_per_query == 2 and recipe.sets[""].objective == recipe.objective


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train=x.jsonl"], r"data\.train is 'x\.jsonl', and there are several .* data\.sets\.NAME\.train"),
        (["data.test=x.jsonl"], r"data\.test is .* data\.sets\.NAME\.test"),
        (["data.sets.blue.wieght=2"], r"unknown recipe key 'data\.sets\.blue\.wieght'; did you mean .*weight"),
        (["data.sets.green.weight=2"], r"data\.sets\.green\.train is not set"),
        (["data.sets.blue.weight=null"], r"data\.sets\.blue\.weight is not set, and others are"),
        (
            ["data.batches=mixed", "data.sets.blue.objective.label_smoothing=0", "trainer.batch_size=1"],
            r"trainer\.batch_size: 1 rows are no mixture of 2 data sets",
        ),
        (["data=[]"], "recipe: data is a list in one place and a mapping in another"),
        (["data.batches=mixed"], r"data\.sets\.blue\.objective differs .* data\.batches=homogeneous"),
    ],
)
def test_data_sets_that_do_not_go_together_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(written(tmp_path), overrides)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[{train: a/x.jsonl}, {train: b/x.jsonl}]", "two entries are named 'x'"),
        ("[a.jsonl]", "every entry of the list is a mapping"),
        ("[{train: a.jsonl, name: 'my data'}]", "cannot be named 'my data'"),
        ("[{weight: 2}]", "cannot be named ''"),
    ],
)
def test_a_list_that_names_nothing_is_refused(tmp_path: Path, entries: str, said: str) -> None:
    (tmp_path / "mix.yaml").write_text(f"model: m\nout: o\ndata: {entries}\n")
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "mix.yaml")


# ---- a run ----


@pytest.fixture
def three_kinds(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> Path:
    """A recipe over judged queries, labelled texts and scored pairs, each with its own objective."""
    draw = random.Random(0)
    labelled = [
        {"text": " ".join(draw.sample(WORDS[n * 4 : n * 4 + 6], 4)), "label": f"L{n}"}
        for n in range(3)
        for _ in range(20)
    ]
    scored = [
        {"sentence1": " ".join(a), "sentence2": " ".join(a[:k] + draw.sample(WORDS, 5 - k)), "score": k}
        for k in range(5) for a in [draw.sample(WORDS, 5) for _ in range(12)]
    ]  # fmt: skip
    for name, found in (("labelled", labelled), ("scored", scored)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "mix.yaml").write_text(f"""\
model: {tiny_folder}
out: {tmp_path / "run"}
threads: 1
precision: fp32
trainer: {{batch_size: 12, epochs: 2, lr: 0.002}}
data:
  sets:
    search: {{train: {tiny_pairs}, prompts: {{query: "red ", document: "blue "}}}}
    topics: {{train: {tmp_path / "labelled.jsonl"}, objective: {{name: triplet}}}}
    scores: {{train: {tmp_path / "scored.jsonl"}, objective: {{name: cosent}}, limit: 30}}
""")
    return tmp_path / "mix.yaml"


def test_three_kinds_of_data_train_one_model(three_kinds: Path) -> None:
    """Each is logged, chosen by and measured; the report and the folder say so."""
    summary = run(load_recipe(three_kinds))
    folder = Path(summary["out"])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {name for row in log for name in row["sets"]} == {"search", "topics", "scores"}
    for row in log:
        (name,) = row["sets"]
        assert row[f"loss/{name}"] == row["loss"] and row["sets"][name] == row["pairs"]
    planned = summary["training"]["sets"]
    assert planned["scores"]["rows"] == 30 and sum(part["share"] for part in planned.values()) == pytest.approx(
        1, abs=1e-3
    )
    dev = next(row["dev"] for row in log if "dev" in row)
    main = [dev["search nDCG@10"], dev["topics accuracy_knn"], dev["scores spearman_cosine"]]
    assert next(iter(dev)) == "mean" and dev["mean"] == pytest.approx(sum(main) / 3)
    assert {result["task"] for result in summary["results"]} == {"search", "topics", "scores"}
    found = json.loads((folder / "results" / "tuned" / "search" / "results.json").read_text())
    assert found["prompts"] == {"query": "red ", "document": "blue "}
    assert "query" not in open_folder(folder / "model").prompts  # a data set's prompts are not the model's
    shown = collect(folder)["sets"]
    assert [(one["name"], one["objective"]) for one in shown] == [
        ("search", "contrastive"), ("topics", "triplet"), ("scores", "cosent"),
    ]  # fmt: skip
    for one in shown:
        assert one["seen"] == sum(row["sets"].get(one["name"], 0) for row in log)
        own = [row["loss"] for row in log if one["name"] in row["sets"]]
        assert (one["first"], one["last"]) == pytest.approx((own[0], own[-1]))
    assert "<h3>Data sets</h3>" in (folder / "report.html").read_text()
    described = json.loads((folder / "data.json").read_text())
    assert described["counts"]["examples"] > 100 and set(described["tokens"]) == {"query", "document", "text"}
    assert run(load_recipe(three_kinds)) == summary  # finished: it says so, and trains nothing


def test_killed_and_started_again_a_mixture_ends_with_the_same_weights(tmp_path: Path, three_kinds: Path) -> None:
    argv = ["train", str(three_kinds), "trainer.save_every=3", "evaluate=false"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command_line.start([*argv, f"out={whole}"], tmp_path / "said").wait() == 0
    command = command_line.start([*argv, f"out={killed}"], tmp_path / "said")
    assert command.wait_for(killed / "log.jsonl", 7), command.said
    assert command.kill() == -signal.SIGKILL
    assert command_line.start([*argv, f"out={killed}"], tmp_path / "said").wait() == 0
    assert "continuing after step" in command.said
    hashes = {hashlib.sha256((f / "model" / "model.safetensors").read_bytes()).hexdigest() for f in (whole, killed)}
    assert len(hashes) == 1


def test_a_query_of_one_data_set_that_another_is_tested_on_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "red.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered("red", 12)))
    (tmp_path / "test.jsonl").write_text(json.dumps(numbered("red", 12)[5]) + "\n")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered("blue", 9)))
    text = LIST.replace("red.jsonl", str(tmp_path / "red.jsonl")).replace("other.jsonl", str(tmp_path / "other.jsonl"))
    recipe = load_recipe(written(tmp_path, text), [
        f"data.sets.blue.test={tmp_path / 'test.jsonl'}", "data.sets.red.holdout=0", "data.sets.red.limit=12",
    ])  # fmt: skip
    data = open_run_data(recipe)
    assert data.warnings == [
        "blue: 1 training queries are also test queries: the gain will look too good (see kinvec check)"
    ]
    assert [len(one.examples) for one in data.sets] == [12, 8] and data.sets[0].test is None
    with pytest.raises(KinvecError, match=r"holds retrieval; triplet .* data\.sets\.blue\.objective\.name=contrastive"):
        open_run_data(load_recipe(tmp_path / "mix.yaml", ["data.sets.blue.objective.name=triplet"]))


def test_only_judged_queries_share_a_batch(three_kinds: Path) -> None:
    same = ["data.batches=mixed", *(f"data.sets.{name}.objective.name=contrastive" for name in ("topics", "scores"))]
    with pytest.raises(KinvecError, match="holds labelled"):
        open_run_data(load_recipe(three_kinds, same))
