"""Runs on each kind of evaluation data: which splits they take, what measures them, and that their page is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import WORDS

from kinvec import tasks
from kinvec.contracts import LabelledData, RetrievalData
from kinvec.pipeline import open_run_data, run
from kinvec.recipe import load_recipe
from kinvec.run_data import OpenSet

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_to(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(tmp_path: Path, *overrides: str) -> OpenSet:
    return open_run_data(load_recipe(None, ["model=none", f"out={tmp_path / 'run'}", *overrides])).sets[0]


def test_a_test_split_of_inference_is_taken(tmp_path: Path) -> None:
    """As the folder of LLM2Vec's supervised stage has it: s1, s2 and labels, a file a split."""
    for split, count in (("train", 40), ("test", 6)):
        premises = [f"premise {split} {i // 2}" for i in range(count)]
        hypotheses = [f"hypothesis {split} {i}" for i in range(count)]
        for part, lines in (("s1", premises), ("s2", hypotheses), ("labels", ["entailment", "contradiction"] * count)):
            (tmp_path / f"{part}.{split}").write_text("".join(f"{line}\n" for line in lines[:count]))
    found = opened(tmp_path, f"data.train={tmp_path}")
    assert isinstance(found.test, RetrievalData) and set(found.test.queries.values()) == {
        f"premise test {i}" for i in range(3)
    }
    assert isinstance(found.dev, RetrievalData) and all("train" in text for text in found.dev.queries.values())


def test_a_file_for_each_split_is_taken_by_examples_too(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("dev", 4), ("test", 6)):
        rows = [{"query": f"query {split} {i}", "pos_doc": f"document {split} {i}"} for i in range(count)]
        rows_to(tmp_path / "faq" / f"faq-{split}.jsonl", rows)
    found = opened(tmp_path, f"data.train={tmp_path / 'faq'}")
    assert isinstance(found.test, RetrievalData) and isinstance(found.dev, RetrievalData)
    assert (len(found.examples), len(found.dev.queries), len(found.test.queries)) == (40, 4, 6)


def test_a_run_on_pairs_with_labels_is_judged_by_how_well_they_are_told_apart(
    tmp_path: Path, tiny_folder: Path
) -> None:
    draw, rows = np.random.default_rng(0), []
    for i in range(120):
        first = draw.choice(WORDS, 5, replace=False).tolist()
        second = draw.permutation(first).tolist() if i % 2 else draw.choice(WORDS, 5, replace=False).tolist()
        rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": bool(i % 2)})
    for split, part in (("train", rows[:60]), ("dev", rows[60:80]), ("test", rows[80:])):
        rows_to(tmp_path / "same" / f"{split}.jsonl", part)
    summary = run(load_recipe(None, [
        f"model={tiny_folder}", f"data.train={tmp_path / 'same'}", f"out={tmp_path / 'run'}", "threads=1",
        "objective.name=cosent", "trainer.batch_size=12", "trainer.max_steps=10", "trainer.lr=1e-3",
    ]))  # fmt: skip
    assert summary["results"][0]["unit"] == "pairs" and list(summary["results"][0]["metrics"])[0] == "ap_cosine"
    result = tasks.load_result(tmp_path / "run" / "results" / "tuned" / "same")
    assert result.kind == "pair-classification" and len(result.per_query["id"]) == 40 and result.thresholds
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("ap_cosine" in row.get("dev", {}) for row in log)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "ap_cosine" in page and "pair-classification" in page


def test_a_run_on_plain_texts_may_be_judged_by_clusters(tmp_path: Path, tiny_folder: Path) -> None:
    texts = [f"{WORDS[i % 20]} {WORDS[(i * 7) % 20]} {WORDS[i % 13]}" for i in range(60)]
    train = rows_to(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    labelled = [{"text": text, "label": WORDS[i % 20]} for i, text in enumerate(texts[:40])]
    test = rows_to(tmp_path / "words.jsonl", labelled)
    overrides = [f"data.train={train}", f"data.test={test}", f"data.dev={test}", "objective.name=simcse"]
    found = opened(tmp_path, *overrides)
    assert isinstance(found.test, LabelledData) and found.test.kind == "clustering"
    summary = run(load_recipe(None, [
        f"model={tiny_folder}", f"out={tmp_path / 'run'}", "threads=1", "trainer.batch_size=16", "trainer.max_steps=4",
        *overrides,
    ]))  # fmt: skip
    assert list(summary["results"][0]["metrics"]) == ["v_measure", "silhouette"]
    assert "v_measure" in (tmp_path / "run" / "report.html").read_text()


def test_a_further_task_of_a_recipe_may_say_how_it_is_measured(tmp_path: Path, tiny_folder: Path) -> None:
    rows = [{"query": WORDS[i], "pos_doc": WORDS[i], "neg_doc": [WORDS[i + 1], WORDS[i + 2]]} for i in range(15)]
    path = rows_to(tmp_path / "lists.jsonl", rows)
    summary = run(load_recipe(None, [
        f"model={tiny_folder}", f"out={tmp_path / 'run'}", "threads=1", "trainer.batch_size=8", "trainer.max_steps=2",
        f"data.train={path}", f"tasks.order.data={path}", "tasks.order.task=reranking", "trainer.eval_every=0",
    ]))  # fmt: skip
    found = {one["task"]: list(one["metrics"]) for one in summary["results"]}
    assert found["order"] == ["AP", "RR@10", "nDCG@10"]
    assert tasks.load_result(tmp_path / "run" / "results" / "base" / "order").kind == "reranking"
    assert "order" in (tmp_path / "run" / "report.html").read_text()
