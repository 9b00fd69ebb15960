"""Reranking: each query's own candidates, against pytrec_eval and a plain reading; its data, its command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import Words

from kinvec import files, tasks
from kinvec.contracts import Corpus, KinvecError, Qrels, RetrievalData
from kinvec.tasks import candidates as module

TEXTS = ["cat", "a cat", "cat", "dog", "a dog sits", "the cat sat", "rain", "the rain falls", "dog", "a cat falls"]
QUERIES = ["cat", "the dog", "rain falls", "a cat sat", "sits"]
candidates = st.dictionaries(st.integers(0, len(TEXTS) - 1), st.integers(-1, 3), min_size=1)


def problem(qrels: Qrels) -> RetrievalData:
    corpus = Corpus([f"d{i}" for i in range(len(TEXTS))], TEXTS)
    queries = {f"q{i}": text for i, text in enumerate(QUERIES)}
    return RetrievalData(corpus, queries, qrels, json.dumps(qrels), "tiny", "test", "reranking")


@settings(max_examples=60)
@given(st.lists(candidates, min_size=1, max_size=len(QUERIES)))
def test_equal_to_pytrec_eval_on_the_candidates_cosines(drawn: list[dict[int, int]]) -> None:
    """Graded, with equal texts (ties), junk below zero, and queries that have candidates of one side only."""
    qrels = {f"q{i}": {f"d{row}": grade for row, grade in found.items()} for i, found in enumerate(drawn)}
    kept = {q: grades for q, grades in qrels.items() if min(grades.values()) <= 0 < max(grades.values())}
    if not kept:
        with pytest.raises(KinvecError, match="no query has both a relevant document and one"):
            tasks.measure(problem(qrels), Words())
        return
    words, texts = Words(), dict(zip(problem(qrels).corpus.ids, TEXTS, strict=True))
    run: dict[str, dict[str, float]] = {}
    for query, grades in kept.items():
        asked = words.encode_queries([problem(qrels).queries[query]])[0].astype(float)
        for document in grades:
            vector = words.encode_documents([texts[document]])[0].astype(float)
            cosine = np.float32(asked @ vector / np.linalg.norm(asked) / np.linalg.norm(vector))
            run.setdefault(query, {})[document] = float(np.round(cosine, 5))  # equal texts are equal, whatever the bits
    judged = {q: {d: max(grade, 0) for d, grade in grades.items()} for q, grades in kept.items()}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"map", "recip_rank", "ndcg_cut_10"}).evaluate(run)
    rows = tasks.measure(problem(qrels), words).per_query
    assert rows["id"] == list(kept)
    for name, key in {"AP": "map", "RR@10": "recip_rank", "nDCG@10": "ndcg_cut_10"}.items():
        assert rows[name] == pytest.approx([theirs[query][key] for query in kept], abs=1e-6), name
    assert [set(ids) for ids in rows["top_ids"]] == [set(grades) for grades in kept.values()]


QRELS: Qrels = {"q0": {"d0": 2, "d3": 0, "d5": 1}, "q1": {"d4": 1, "d6": 0}, "q2": {"d7": 1}, "q3": {"d0": 0, "d9": 1}}


def test_only_candidates_are_encoded_and_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words()
    result = tasks.measure(problem(QRELS), words)
    assert (result.kind, result.per_query["id"]) == ("reranking", ["q0", "q1", "q3"]), "q2 has nothing to order"
    assert words.calls == [3, 6] and sorted(result.documents["id"]) == ["d0", "d3", "d4", "d5", "d6", "d9"]
    assert result.per_query["top_ids"][0] == ["d0", "d5", "d3"] and result.per_query["AP"][0] == 1.0
    monkeypatch.setattr(module, "ENCODE_ROWS", 2)
    windows = Words()
    assert tasks.measure(problem(QRELS), windows).per_query == result.per_query and windows.calls == [3, 2, 2, 2]


def test_bm25_orders_the_same_candidates() -> None:
    found = tasks.lexical_reranking(problem(QRELS))
    assert found.per_query["top_ids"][0][:2] == ["d0", "d5"], "the shorter text of the two with the word"
    assert found.per_query["top_ids"][1] == ["d4", "d6"] and found.model == "BM25"
    assert tasks.measure(problem(QRELS), Words()).baselines == {"BM25": found.metrics}
    silent = replace(problem(QRELS), queries=dict.fromkeys(problem(QRELS).queries, "zebra"))
    assert tasks.lexical_reranking(silent).per_query["top_ids"][0] == ["d5", "d3", "d0"], "no word in common: by id"


def test_a_candidate_without_a_text_is_named() -> None:
    with pytest.raises(KinvecError, match="the candidate 'd77' is judged but is not in the corpus"):
        tasks.measure(problem({"q0": {"d0": 1, "d77": 0}}), Words())


def test_two_rerankings_are_compared_and_kept(tmp_path: Path) -> None:
    a, b = (tasks.measure(problem(QRELS), Words(size)) for size in (2, 64))
    assert tasks.load_result(tasks.save_result(b, tmp_path)) == b
    found = tasks.compare(a, b)
    assert [d.metric for d in found.metrics] == ["AP", "RR@10", "nDCG@10"] and found.kind == "reranking"
    assert all(d.low <= d.difference <= d.high for d in found.metrics)


def test_lists_of_candidates_are_reranked_where_that_is_asked_for(
    tmp_path: Path, main: Callable[..., tuple[int, str]]
) -> None:
    rows: list[dict[str, Any]] = [
        {"query": "cat", "positive": ["a cat", "the cat sat"], "negative": ["a dog sits", "rain"]},
        {"query": "rain", "positive": ["the rain falls"], "negative": ["a cat falls"]},
        {"query": "dog", "positive": ["a dog sits"], "negative": []},
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert files.open_problem(path).kind == "retrieval"
    ranked = files.open_problem(path, task="reranking")
    assert isinstance(ranked, RetrievalData) and [len(grades) for grades in ranked.qrels.values()] == [4, 2, 1]
    command = (
        "evaluate",
        "--model",
        "bm25",
        "--data",
        str(path),
        "--task",
        "reranking",
        "--out",
        str(tmp_path / "out"),
    )
    code, said = main(*command)
    assert code == 0 and "2 queries" in said and "AP" in said
    assert "1 queries do not have both relevant and other candidates" in said
    assert tasks.load_result(tmp_path / "out").metrics == {"AP": 1.0, "RR@10": 1.0, "nDCG@10": 1.0}
    code, said = main("evaluate", "--model", "bm25", "--data", str(path), "--task", "rerank")
    assert code == 2 and "there is no task 'rerank'; there are retrieval, reranking" in said
