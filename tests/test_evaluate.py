"""`kinvec evaluate`: what it detects, what it refuses before any work, and what it prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import MINILM
from test_tasks import Words

from kinvec import Embedder, tasks
from kinvec.cli import load_verb
from kinvec.contracts import KinvecError, RecipeError
from kinvec.tasks.further import TaskSettings, open_named
from kinvec.verbs.evaluate import evaluate

DOCUMENTS = {"d1": "The cat sat on the mat.", "d2": "Stock markets fell.", "d3": "Rivers flow to the sea."}


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": key, "title": "", "text": text} for key, text in DOCUMENTS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": "q1", "text": "a kitten on a rug"}, {"_id": "q2", "text": "rivers"}]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td3\t1\n")
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded although the arguments are wrong")

    monkeypatch.setattr("kinvec.embedder.Embedder.load", load)


def test_bm25_can_be_evaluated_by_itself_and_compared_with(beir: Path, tmp_path: Path) -> None:
    result = evaluate("bm25", beir, out=tmp_path / "out", measures=["RR@10"])
    assert result.model == "BM25" and result.per_query["RR@10"] == [0.0, 1.0] and result.baselines == {}
    assert tasks.load_result(tmp_path / "out") == result


def test_a_model_understands_what_bm25_does_not(beir: Path) -> None:
    result = evaluate(MINILM, beir, precision="fp32", device="cpu")
    assert result.metrics["RR@10"] == 1.0 and result.baselines["BM25"]["RR@10"] == 0.5
    assert (result.task, result.split, result.model) == ("tiny", "test", MINILM)


def test_scored_pairs_are_detected(tmp_path: Path) -> None:
    pairs = [
        ("A cat sits.", "A kitten is sitting.", 4.5),
        ("A cat sits.", "Markets fell.", 0.2),
        ("Rain.", "It rains.", 4.8),
    ]
    rows = [{"first": a, "second": b, "score": s} for a, b, s in pairs]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(MINILM, tmp_path / "sts.jsonl", precision="fp32", device="cpu")
    assert result.kind == "similarity" and set(result.metrics) == {"spearman_cosine", "pearson_cosine"}
    assert result.metrics["pearson_cosine"] > 0.9 and result.per_query["query"][2] == "Rain."
    with pytest.raises(RecipeError, match="bm25 searches"):
        evaluate("bm25", tmp_path / "sts.jsonl")


@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_before_a_model_is_loaded(beir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not a result")
    (tmp_path / "labels.csv").write_text("text,label\nhello,greeting\nbye,farewell\n")
    wrong: list[tuple[type[KinvecError], str, dict[str, Any]]] = [
        (RecipeError, "either --model NAME or --embeddings", {"data": beir}),
        (RecipeError, "add --data", {"model": MINILM}),
        (RecipeError, "unknown measure 'ndcg'", {"model": MINILM, "data": beir, "measures": ["ndcg"]}),
        (KinvecError, r"notes\.txt", {"model": MINILM, "data": beir, "out": tmp_path / "mine"}),
        (KinvecError, "split 'dev'", {"model": MINILM, "data": beir, "split": "dev"}),
        (
            KinvecError,
            "train.csv beside test.csv",
            {"model": MINILM, "data": tmp_path / "labels.csv", "task": "classification"},
        ),
        (RecipeError, "^--column says what .* add --data", {"embeddings": beir, "columns": {"query": "question"}}),
        (RecipeError, "there is no task 'nli'", {"model": MINILM, "data": beir, "task": "nli"}),
        (RecipeError, "--task reranking goes with --model", {"embeddings": beir, "task": "reranking"}),
        (KinvecError, "no such file", {"model": MINILM, "data": tmp_path / "absent"}),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            evaluate(**arguments)


def test_the_command_prints_a_table_and_json(beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = load_verb("evaluate")
    command(["--model", "bm25", "--data", str(beir), "--out", str(tmp_path / "out")], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "tiny, test: 2 queries" in shown and "nDCG@10" in shown and "BM25" in shown and "written to" in shown
    command(["--model", "bm25", "--data", str(beir), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["R@10"] == 0.5 and told["queries"] == 2
    assert told["metrics"] == json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]


def test_columns_of_other_names_are_named(
    tmp_path: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # so that no path is broken
    asked = [("rivers", "Rivers flow to the sea."), ("markets", "Stock markets fell.")]
    (tmp_path / "faq.csv").write_text("Frage,Antwort\n" + "".join(f"{a},{b}\n" for a, b in asked))
    data, named = str(tmp_path / "faq.csv"), ("--column", "query=Frage", "--column", "pos_doc=Antwort")
    code, said = main("evaluate", "--model", "bm25", "--data", data)
    assert code == 1 and "say which is which, by name or number from 0: --column query=NAME" in said
    for more in ((), ("--task", "retrieval"), ("--split", "test", "--split", "test")):
        code, said = main("evaluate", "--model", "bm25", "--data", data, *more, *named)
        assert code == 0 and "2 queries" in said
    code, said = main("check", data, *named)
    assert "faq.csv: retrieval" in said
    code, said = main("evaluate", "--model", "bm25", "--data", data, "--column", "Frage")
    assert code == 2 and "--column Frage names no column; write ROLE=NAME" in said
    task = TaskSettings(data=data, columns={"query": "Frage", "pos_doc": "Antwort"})
    assert open_named("tasks", "faq", task).kind == "retrieval"


def test_several_splits_are_scored_with_one_encoding_of_the_corpus(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[..., tuple[int, str]]
) -> None:
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    encoded: list[int] = []
    original = Embedder.encode_documents

    def counting(self: Embedder, texts: Sequence[str]) -> Any:
        encoded.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(Embedder, "encode_documents", counting)
    command = ("evaluate", "--model", MINILM, "--data", str(beir), "--precision", "fp32", "--split", "dev")
    code, said = main(*command, "--split", "test", "--out", str(tmp_path / "both"))
    assert code == 0 and "tiny, dev: 1 queries" in said and "tiny, test: 2 queries" in said and encoded == [3]
    found = tasks.load_results(tmp_path / "both")
    assert list(found) == ["tiny, dev", "tiny, test"] and found["tiny, dev"].metrics["RR@10"] < 1
    alone = evaluate(MINILM, beir, precision="fp32")
    assert found["tiny, test"].metrics == alone.metrics and found["tiny, test"].fingerprint == alone.fingerprint
    encoded.clear()
    code, said = main(*command, "--split", "train")
    assert code == 1 and "there are no judgements for the split 'train'" in said and not encoded


def test_an_encoder_of_ones_own_is_measured(beir: Path) -> None:
    result = evaluate(Words(), beir)
    assert result.model == "words" and list(result.metrics) == list(tasks.MEASURES)
