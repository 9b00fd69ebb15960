"""Folders of data, BEIR's and others, and what is made of rows: search problems, streams of queries and documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_files import GOOD, jsonl, values

from kinvec.contracts import KinvecError
from kinvec.files import (
    DataError,
    detect_kind,
    open_data,
    open_retrieval,
    read_documents,
    read_judgements,
    read_queries,
    text_id,
)

# --- BEIR folders ---


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [("d1", "Title", "one"), ("d2", "", "two"), ("d3", "Only", ""), ("d4", "", "four")]
    jsonl(folder / "corpus.jsonl", [{"_id": i, "title": title, "text": text} for i, title, text in documents])
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(1, 5)])
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq2\td2\t2\nq1\td1\t1\nq2\td3\t1\nq2\td4\t0\nq3\td4\t0\n"
    )
    (folder / "qrels" / "test.tsv").write_text("q4\td1\t1\n")
    return folder


def test_beir_grades_become_positives_and_judged_negatives(beir_folder: Path) -> None:
    table = open_data(beir_folder)
    first, second = table.example(0), table.example(1)
    assert (first.query_id, first.positives, first.positive_scores) == ("q2", ("two", "Only"), (2.0, 1.0))
    assert (first.negative_ids, first.negatives, first.negative_scores) == (("d4",), ("four",), (0.0,))
    assert (second.query_id, second.positives) == ("q1", ("Title one",))
    assert len(table) == 2 and "1 judged queries have no relevant document" in table.warnings[0]
    assert table.where(0) == f"{beir_folder / 'qrels' / 'train.tsv'}:2"


def test_beir_test_judgements_are_no_part_of_training_data(beir_folder: Path) -> None:
    before = open_data(beir_folder)
    (beir_folder / "qrels" / "test.tsv").write_text("q4\td2\t1\n")
    after = open_data(beir_folder)
    assert before.fingerprint == after.fingerprint and values(before) == values(after)


def test_ids_that_differ_by_a_capital_are_two(beir_folder: Path) -> None:
    jsonl(beir_folder / "corpus.jsonl", [{"_id": i, "text": i} for i in ("d1", "D1", "d2", "d3", "d4", " d1")])
    assert list(open_retrieval(beir_folder).corpus.ids) == ["d1", "D1", "d2", "d3", "d4", " d1"]


def test_beir_as_a_search_problem(beir_folder: Path) -> None:
    data = open_retrieval(beir_folder)
    assert (data.queries, data.qrels) == ({"q4": "question 4"}, {"q4": {"d1": 1}})
    assert list(data.corpus.ids) == ["d1", "d2", "d3", "d4"]
    assert list(data.corpus.texts) == ["Title one", "two", "Only", "four"]
    assert data.corpus.texts[-1] == "four" and data.corpus.texts[1:3] == ["two", "Only"]
    with pytest.raises(IndexError):
        data.corpus.texts[4]
    assert open_retrieval(beir_folder, split="train").qrels["q2"] == {"d2": 2, "d3": 1, "d4": 0}
    assert detect_kind(beir_folder, split="dev") == "retrieval"
    with pytest.raises(DataError, match=r"no judgements for the split 'dev' \(there are: test, train\)"):
        open_retrieval(beir_folder, split="dev")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("qrels/train.tsv", "q1\td9\t1\n", r"train.tsv:1: document 'd9' is not in corpus.jsonl"),
        ("qrels/train.tsv", "q1\td1\t1\nq9\td1\t1\n", r"train.tsv:2: query 'q9' is not in queries.jsonl"),
        ("qrels/train.tsv", "q1\td1\t1\nq1\td2\tgood\n", r"train.tsv:2: a judgement is"),
        ("qrels/train.tsv", "q1\td1\t1\nq1\td1\t0\n", r"train.tsv:2: document 'd1' has two scores"),
        ("qrels/train.tsv", "", r"train.tsv: there is no judgement"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n', r"corpus.jsonl:2: the '_id'"),
        ("corpus.jsonl", '{"_id": 1, "text": "a"}\n', r"corpus.jsonl:1: '_id' is a number"),
        ("queries.jsonl", '{"_id": "q1", "text": ""}\n', r"queries.jsonl:1: 'text' is empty"),
    ],
)
def test_faults_of_a_beir_folder(beir_folder: Path, file: str, content: str, said: str) -> None:
    (beir_folder / file).write_text(content)
    with pytest.raises(DataError, match=said):
        open_data(beir_folder)


# --- Folders of files, and data sets of the `datasets` library ---


def test_a_folder_gives_the_file_of_its_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "set-train.jsonl", GOOD[:3])
    assert len(open_data(tmp_path)) == 3
    jsonl(tmp_path / "set-validation.jsonl", GOOD[:2])
    assert len(open_data(tmp_path, split="dev")) == 2
    with pytest.raises(KinvecError, match=r"no file of the split 'test' \(there is set-train.jsonl"):
        open_data(tmp_path, split="test")
    jsonl(tmp_path / "train.jsonl", GOOD[:1])
    with pytest.raises(KinvecError, match="several files of the split 'train'"):
        open_data(tmp_path)


def test_numbered_parts_are_read_in_order_and_name_their_own_lines(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in (1, 0):
        jsonl(tmp_path / "data" / f"train-{part:05}-of-00002.jsonl", GOOD[2 * part : 2 * part + 2])
    table = open_data(tmp_path)
    assert [table.example(i).query for i in range(4)] == [f"question {i}" for i in range(4)]
    assert table.where(3) == f"{tmp_path}/data/train-00001-of-00002.jsonl:2"


def test_a_saved_data_set_and_its_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    whole = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(tmp_path / "set")
    assert [row["label"] for row in values(open_data(tmp_path / "set"))] == ["yes", "no", "yes"]
    assert values(open_data(tmp_path / "set", split="test")) == [{"text": "c", "label": "yes"}]
    with pytest.raises(KinvecError, match="no split 'dev'; name one of train, test"):
        open_data(tmp_path / "set", split="dev")


def test_a_hub_name_is_loaded_by_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert open_data("owner/set:plain").example(0).positives == ("a",)
    assert asked == [("owner/set", "plain", "train")]


def test_a_hub_name_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(
        KinvecError, match=r"^owner/no-such-set: there is no such file or folder, and as a hub data set"
    ):
        open_data("owner/no-such-set")


# --- Streams for encoding ---


def test_queries_and_documents_as_streams(tmp_path: Path, beir_folder: Path) -> None:
    assert list(read_queries(beir_folder))[0] == ("q1", "question 1")
    assert list(read_documents(beir_folder / "corpus.jsonl")) == list(read_documents(beir_folder))
    assert list(read_documents(beir_folder))[0] == ("d1", "Title one")
    rows = [{"query": "q", "pos_doc": ["a", "b"]}, {"query": "q", "pos_doc": "a", "neg_doc": "n", "neg_id": "7"}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_queries(path)) == [(text_id("q"), "q")]
    assert list(read_documents(path)) == [(text_id("a"), "a"), (text_id("b"), "b"), ("7", "n")]
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert list(read_documents(tmp_path / "lines.txt")) == [(text_id("one"), "one"), (text_id("two"), "two")]
    with pytest.raises(DataError, match=r"ids.jsonl:2: 'query_id' is a number \(2\); ids are texts"):
        list(
            read_queries(
                jsonl(tmp_path / "ids.jsonl", [{"query_id": "1", "query": "x"}, {"query_id": 2, "query": "y"}])
            )
        )
    with pytest.raises(DataError, match=r"other.jsonl:1: none of query, question"):
        list(read_queries(jsonl(tmp_path / "other.jsonl", [{"body": "x"}])))


def test_streams_of_columns_by_other_names(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text("key;Titel;Inhalt\n7;Eins;erster Text\n8;;zweiter\n", "utf-8")
    named = {"pos_id": "key", "pos_doc": "Titel+Inhalt"}
    assert list(read_documents(tmp_path / "docs.csv", columns=named)) == [("7", "Eins erster Text"), ("8", "zweiter")]
    assert list(read_documents(tmp_path / "docs.csv", columns={"text": "Inhalt", "query": "Frage"})) == [
        (text_id("erster Text"), "erster Text"), (text_id("zweiter"), "zweiter"),
    ]  # fmt: skip
    asked = jsonl(tmp_path / "asked.jsonl", [{"Nr": "1", "Frage": "was?", "text": "no", "doc_id": "7"}])
    named = {"query": "Frage", "query_id": "Nr"}
    assert list(read_queries(asked, columns=named)) == [("1", "was?")]
    assert list(read_judgements(asked, columns=named)) == [("1", "7", 1)]
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"Frage": "q", "Antwort": "a"}, {"Frage": "q", "Antwort": "b"}])
    named = {"query": "Frage", "pos_doc": "Antwort"}
    assert [text for _, text in read_queries(pairs, columns=named)] == ["q"]
    assert [text for _, text in read_documents(pairs, columns=named)] == ["a", "b"]
    with pytest.raises(
        KinvecError, match=r"docs.csv: there is no column 'Text'; name those there are in columns: 'key'"
    ):
        list(read_documents(tmp_path / "docs.csv", columns={"pos_id": "key", "text": "Text"}))
    with pytest.raises(KinvecError, match="columns: there is no role 'txt'; did you mean 'text'"):
        list(read_documents(tmp_path / "docs.csv", columns={"txt": "Inhalt"}))
    jsonl(tmp_path / "late.jsonl", [{"body": "x"}] * 200 + [{"other": "y"}])
    with pytest.raises(DataError, match="late.jsonl:201: none of body is in the row"):
        list(read_documents(tmp_path / "late.jsonl", columns={"text": "body"}))


def test_judgements_of_a_query_file(tmp_path: Path) -> None:
    rows = [
        {"query_id": "1", "query": "x", "doc_id": ["a", "b"]},
        {"query": "y", "doc_id": "c", "score": 2},
        {"query": "z"},
    ]
    found = list(read_judgements(jsonl(tmp_path / "queries.jsonl", rows)))
    assert found == [("1", "a", 1), ("1", "b", 1), (text_id("y"), "c", 2)]


def test_examples_as_a_search_problem(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query_id": "1", "query": "x", "pos_doc": ["a", "b"], "pos_score": [2, 0.5], "neg_doc": ["n"]},
        {"query_id": "1", "query": "x", "pos_doc": "n2"},
        {"query_id": "2", "query": "y", "pos_doc": "a"},
    ]
    data = open_retrieval(jsonl(tmp_path / "rows.jsonl", rows))
    a, b, n, n2 = map(text_id, ("a", "b", "n", "n2"))
    assert data.qrels == {"1": {a: 2, b: 1, n: 0, n2: 1}, "2": {a: 1}}
    assert list(data.corpus.texts) == ["a", "b", "n", "n2"]
    rows[2] |= {"pos_id": "7"}
    rows[1] |= {"pos_id": "7"}
    with pytest.raises(DataError, match=r"rows.jsonl:3: the document id '7' stands for another text"):
        open_retrieval(jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=r"rows.jsonl:2: the query_id '1' stands for another text"):
        open_retrieval(jsonl(tmp_path / "rows.jsonl", [rows[0], rows[1] | {"query": "other"}]))
