"""Files of data: every form as it comes, every fault with its file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinvec.contracts import KinvecError, RecipeError
from kinvec.files import DataError, detect_kind, normalise, open_data, open_pairs, text_id
from kinvec.files import records as records_module

GOOD = [{"query": f"question {i}", "pos_doc": f"answer {i}", "neg_doc": [f"other {i}"]} for i in range(40)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def with_line(number: int, row: Any) -> list[Any]:
    return [*GOOD[: number - 1], row, *GOOD[number:]]


def values(table: Any) -> list[dict[str, Any]]:
    """The rows without their places."""
    rows: list[dict[str, Any]] = table.rows.drop_columns(["file", "line"]).to_pylist()
    return rows


# --- Faults, each with its place ---

FAULTS = {
    "broken JSON": ('{"query": "x", "pos_doc": ', 27, "json"),
    "missing key": ({"query": "x"}, 35, "schema"),
    "a number for a text": ({"query": 5, "pos_doc": "d"}, 13, "schema"),
    "an empty positive": ({"query": "x", "pos_doc": "  "}, 29, "empty"),
    "no positive": ({"query": "x", "pos_doc": []}, 8, "no positive"),
    "a list of lists": ({"query": "x", "pos_doc": [["a"]]}, 24, "schema"),
    "null": ({"query": None, "pos_doc": "d"}, 32, "schema"),
    "a null positive": ({"query": "x", "pos_doc": None}, 3, "schema"),
    "a query of several": ({"query": ["x"], "pos_doc": "d"}, 2, "schema"),
    "a number as an id": ({"query": "x", "pos_doc": "d", "query_id": 17}, 40, "id"),
    "a number as a document's id": ({"query": "x", "pos_doc": "d", "doc_id": 17}, 11, "id"),
    "ids that do not match": ({"query": "x", "pos_doc": ["d", "e"], "pos_id": ["1"]}, 12, "schema"),
    "a word for a score": ({"query": "x", "pos_doc": "d", "score": "high"}, 5, "schema"),
    "an infinite score": ('{"query": "x", "pos_doc": "d", "score": Infinity}', 5, "schema"),
    "no object": ("[1, 2]", 9, "schema"),
    "half a surrogate pair": ('{"query": "\\ud800", "pos_doc": "d"}', 6, "encoding"),
    "brackets without end": ("[" * 100_000, 7, "json"),
}


@pytest.mark.parametrize(("row", "line", "rule"), FAULTS.values(), ids=FAULTS)
def test_a_fault_names_file_line_and_remedy_or_is_dropped_and_counted(
    tmp_path: Path, row: Any, line: int, rule: str
) -> None:
    path = jsonl(tmp_path / "data.jsonl", with_line(line, row))
    with pytest.raises(DataError) as raised:
        open_data(path)
    assert str(raised.value).startswith(f"{path}:{line}: ")
    assert raised.value.rule == rule
    assert raised.value.remedy
    assert len(str(raised.value).splitlines()) == 1
    table = open_data(path, skip_bad=True)
    assert (len(table), table.dropped, dict(table.counts)) == (39, 1, {rule: 1})
    assert [problem.line for problem in table.problems] == [line]


def test_latin_1_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in GOOD[:25])
    path.write_bytes(good.encode() + '{"query": "café", "pos_doc": "d"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=rf"^{path}:26: byte 15 of the line \(0xe9\) is not UTF-8; .*iconv -f latin-1"):
        open_data(path)
    assert open_data(path, skip_bad=True).dropped == 1


def test_utf_16_is_named_and_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    text = json.dumps(GOOD[0])
    (tmp_path / "wide.jsonl").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=r"wide.jsonl:1: the file is UTF-16"):
        open_data(tmp_path / "wide.jsonl")
    (tmp_path / "marked.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert open_data(tmp_path / "marked.jsonl").example(0).query == "question 0"


def test_problems_are_kept_to_a_cap_and_all_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", [*GOOD, *[{"query": "x", "pos_doc": ""}] * 50, "{"])
    for _ in range(2):  # parsed, then from the cache
        table = open_data(path, skip_bad=True)
        assert dict(table.counts) == {"empty": 50, "json": 1}
        assert table.dropped == 51
        assert len(table.problems) == 21


def test_nothing_and_nothing_good(tmp_path: Path) -> None:
    for name, content in {"nothing.jsonl": "", "blank.csv": " \n\n", "header.csv": "query,pos_doc\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            open_data(tmp_path / name)
    (tmp_path / "tall.json").write_text(json.dumps(GOOD[0], indent=1))
    with pytest.raises(DataError, match=r"tall.json:1: .* one object a line, or a JSON array"):
        open_data(tmp_path / "tall.json")
    with pytest.raises(KinvecError, match="no data is named"):
        open_data("")
    with pytest.raises(DataError, match=r"bad.jsonl:1: 'pos_doc' is empty"):
        open_data(jsonl(tmp_path / "bad.jsonl", [{"query": "x", "pos_doc": ""}]), skip_bad=True)


def test_an_absent_file_hints_at_a_near_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(
        KinvecError, match=r"trian.jsonl: there is no such file or folder; did you mean .*train.jsonl\?"
    ):
        open_data(tmp_path / "trian.jsonl")
    with pytest.raises(KinvecError, match="check the path"):
        open_data(tmp_path / "no" / "such" / "folder")


def test_columns_that_fit_no_kind_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "odd.jsonl", [{"frage": "x", "antwort": "y"}])
    with pytest.raises(DataError, match="'frage', 'antwort'"):
        open_data(path)
    assert open_data(path, columns={"query": "frage", "pos_doc": "antwort"}).example(0).positives == ("y",)
    with pytest.raises(KinvecError, match="there is no column 'fragen'"):
        open_data(path, columns={"query": "fragen", "pos_doc": "antwort"})
    with pytest.raises(RecipeError, match="no role 'qery'; did you mean 'query'"):
        open_data(path, columns={"qery": "frage"})
    with pytest.raises(RecipeError, match="no kind of data 'labeled'"):
        open_data(path, kind="labeled")
    with pytest.raises(DataError, match="'pos_doc' is missing"):
        open_data(jsonl(tmp_path / "queries.jsonl", [{"query": "x"}]))


# --- JSON arrays ---


def test_an_array_keeps_line_numbers_and_takes_elements_longer_than_its_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "WINDOW", 32)
    rows = [{"query": f"frage ä{i}", "pos_doc": "ö" * (50 * i + 1)} for i in range(20)]
    path = tmp_path / "array.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    table = open_data(path)
    assert [table.example(i).positives[0] for i in range(20)] == [row["pos_doc"] for row in rows]
    assert [table.where(i) for i in (0, 1, 19)] == [f"{path}:{line}" for line in (2, 6, 78)]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    {
        "truncated": ('[\n{"query": "x", "pos_doc": "d"},', 2, "breaks off"),
        "truncated in a row": ('[\n{"query": "x", "pos_doc": "d"},\n{"query": "y', 3, "unterminated string"),
        "no comma": ('[\n{"query": "x", "pos_doc": "d"}\n{"query": "y", "pos_doc": "d"}]', 3, "',' is missing"),
        "broken": ('[\n{"query": "x", "pos_doc": "d"},\n\n{"query" "y"}' + " " * 100 + "]", 4, "broken JSON"),
        "null": ('[{"query": "x", "pos_doc": "d"},\nnull]', 2, "null stands where"),
    }.values(),
    ids=lambda value: None,
)
def test_a_broken_array_names_the_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "array.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"^{path}:{line}: .*{said}"):
        open_data(path)


def test_a_byte_that_is_not_utf_8_spoils_one_element_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    rows = [
        '{"query": "x", "pos_doc": "d"}',
        '{"query": "caf\u00e9",\n "pos_doc": "\u00e9"}',
        '{"query": "z", "pos_doc": "e"}',
    ]
    path.write_bytes(("[" + ",\n".join(rows) + "]").encode("latin-1"))
    with pytest.raises(DataError, match=rf"^{path}:2: byte 15 of the line"):
        open_data(path)
    table = open_data(path, skip_bad=True)
    assert [table.example(i).query for i in range(2)] == ["x", "z"]


# --- The same rows in every form ---

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
ROW = st.builds(
    lambda query, positives, negatives: {"query": query, "pos_doc": positives, "neg_doc": negatives},
    TEXT,
    st.lists(TEXT, min_size=1, max_size=3),
    st.lists(TEXT, max_size=2),
)


def write_all_forms(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    names = ["jsonl", "json", "csv", "tsv", "parquet"]
    paths = {name: folder / f"rows.{name}" for name in names}
    paths["jsonl"].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="")
    paths["json"].write_text(json.dumps(rows, indent=1), newline="")
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(paths[name], "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerow(rows[0])
            writer.writerows([[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows])
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return list(paths.values())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=8))
def test_the_same_rows_open_to_the_same_arrow_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("forms")
    first, *others = (open_data(path) for path in write_all_forms(folder, rows))
    assert [(r["query"], r["pos_doc"], r["neg_doc"]) for r in values(first)] == [tuple(row.values()) for row in rows]
    for other in others:
        assert other.rows.drop_columns(["file", "line"]).equals(first.rows.drop_columns(["file", "line"])), other.source


def test_optional_columns_may_begin_after_the_sample(tmp_path: Path) -> None:
    rows: list[Any] = [{"query": f"q{i}", "pos_doc": "d"} for i in range(300)]
    rows.append({"query": "late", "pos_doc": "d", "neg_doc": "n", "query_id": "own"})
    example = open_data(jsonl(tmp_path / "late.jsonl", rows)).example(300)
    assert (example.query_id, example.negatives) == ("own", ("n",))


def test_ids_and_scores_are_kept_and_made_where_absent(tmp_path: Path) -> None:
    row = {
        "query": "q",
        "query_id": "7",
        "pos_doc": ["a", "b", "c"],
        "pos_id": ["1", "2", "3"],
        "pos_score": [2, 0, 1.5],
    }
    rows = [row | {"neg_doc": "n", "neg_score": -0.5}, {"question": "q", "positive": "a", "negative": "n"}]
    first = open_data(jsonl(tmp_path / "ids.jsonl", rows[:1])).example(0)
    assert (first.query_id, first.positive_ids, first.positive_scores) == ("7", ("1", "3"), (2.0, 1.5))
    assert (first.negatives, first.negative_ids[0], first.negative_scores) == (("b", "n"), "2", (0.0, -0.5))
    second = open_data(jsonl(tmp_path / "made.jsonl", rows[1:])).example(0)
    assert second.positive_ids == (text_id("a"),) and second.positive_scores == (1.0,)
    assert second.query_id == text_id("q") and second.negative_ids == (text_id("n"),) == first.negative_ids[1:]


# --- Delimited text ---


def test_quoted_line_breaks_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"one\ntwo, three",a\n"four ""five""",b\n,c\n')
    with pytest.raises(DataError, match=rf"^{path}:5: 'text' is empty"):
        open_data(path)
    table = open_data(path, skip_bad=True)
    assert values(table) == [{"text": "one\ntwo, three", "label": "a"}, {"text": 'four "five"', "label": "b"}]
    assert table.where(1) == f"{path}:4"


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("text,label\nfine,a\none, two,b\n", 3, "3 cells, the header 2"),
        ('text,label\nfine,a\n"open,b\nmore,c\n', 3, "broken quoting"),
        ("text,label\nfine\n", 2, "'label' is empty"),
        ("I am lost,card\nMe too,card\n", 1, "names no known column"),
    ],
)
def test_broken_delimited_text(tmp_path: Path, content: str, line: int, said: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"^{path}:{line}: .*{said}"):
        open_data(path)


def test_columns_by_position_joined_columns_and_other_separators(tmp_path: Path) -> None:
    (tmp_path / "bare.tsv").write_text('one "half\tx\ntwo\ty\n')
    assert values(open_data(tmp_path / "bare.tsv", columns={"text": 0})) == [{"text": 'one "half'}, {"text": "two"}]
    (tmp_path / "semicolon.csv").write_text("headline;body;topic\nA;b;t\nC;;u\n")
    columns = {"text": "headline+body", "label": "topic"}
    found = values(open_data(tmp_path / "semicolon.csv", columns=columns))
    assert found == [{"text": "A b", "label": "t"}, {"text": "C", "label": "u"}]
    example = open_data(tmp_path / "semicolon.csv", columns={"query": "topic", "pos_doc": "headline+body"}).example(0)
    assert (example.query, example.positives) == ("t", ("A b",))
    assert values(open_data(tmp_path / "semicolon.csv", columns=columns | {"text": ["headline", "body"]})) == found


def test_scored_pairs_with_a_header_and_without(tmp_path: Path) -> None:
    (tmp_path / "named.csv").write_text("sentence1,sentence2,score\na,b,0.5\nc,d,1\n")
    pairs = open_pairs(tmp_path / "named.csv")
    assert (list(pairs.first), list(pairs.second), list(pairs.scores)) == (["a", "c"], ["b", "d"], [0.5, 1.0])
    rows = ['g\tf\t2012\t1\t5.000\tA "b\tc', 'g\tf\t2012\t2\t0\t"d"\te\tlicence\tmore']
    (tmp_path / "bare.csv").write_text("\n".join(rows) + "\n")
    pairs = open_pairs(tmp_path / "bare.csv")
    assert (list(pairs.first), list(pairs.second), list(pairs.scores)) == (['A "b', '"d"'], ["c", "e"], [5.0, 0.0])


# --- Texts, SQuAD, NLI ---


def test_plain_texts_and_conllu(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("[1] one\n\n{two}\n")
    assert values(open_data(tmp_path / "lines.txt")) == [{"text": "[1] one"}, {"text": "{two}"}]
    (tmp_path / "bank.conllu").write_text("# sent_id = 1\n# text = Ето.\n1\tЕто\n\n")
    assert values(open_data(tmp_path / "bank.conllu")) == [{"text": "Ето."}]
    (tmp_path / "list.json").write_text('["one", "two"]')
    assert values(open_data(tmp_path / "list.json")) == [{"text": "one"}, {"text": "two"}]


def test_squad_questions_with_answers(tmp_path: Path) -> None:
    asked = [{"id": "1", "question": "Who?"}, {"id": "1", "question": "When?"}]
    paragraphs = [{"context": "Ada, 1843.", "qas": [*asked, {"question": "Why?", "is_impossible": True}]}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "Ada", "paragraphs": paragraphs}]}))
    examples = [open_data(path).example(i) for i in range(2)]
    assert [(e.query, e.positives) for e in examples] == [("Who?", ("Ada, 1843.",)), ("When?", ("Ada, 1843.",))]
    assert examples[0].query_id != examples[1].query_id
    path.write_text(json.dumps({"data": [{"paragraphs": [{"qas": [{"question": "Who?"}]}]}]}))
    with pytest.raises(DataError, match="squad.json:1: not as SQuAD has it: .*'context'"):
        open_data(path)


def test_nli_groups_a_premise_wherever_its_pairs_stand(tmp_path: Path) -> None:
    lines = [
        ("A man plays.", "He plays.", "entailment"),
        ("Rain.", "Sun.", "contradiction"),
        ("Rain.", "It rains.", "-"),
    ]
    lines += [("A man plays.", "He sleeps.", "contradiction"), ("A man plays.", "He is tall.", "neutral")]
    for part, column in zip(("s1", "s2", "labels"), zip(*lines, strict=True), strict=True):
        (tmp_path / f"{part}.dev").write_text("".join(f"{text} \n" for text in column))
    expected = [("A man plays.", ["He plays."], ["He sleeps."])]
    for source in (tmp_path, tmp_path / "s1.dev"):
        table = open_data(source, split="dev")
        assert [(row["query"], row["pos_doc"], row["neg_doc"]) for row in values(table)] == expected
        assert table.where(0) == f"{tmp_path / 's1.dev'}:1"
    rows = [dict(zip(("premise", "hypothesis", "label"), (a, b, label), strict=True)) for a, b, label in lines]
    named = open_data(jsonl(tmp_path / "named.jsonl", rows))
    assert [(row["query"], row["pos_doc"], row["neg_doc"]) for row in values(named)] == expected
    with pytest.raises(DataError, match=r"named.jsonl:3: 'label' is 'maybe'"):
        open_data(jsonl(tmp_path / "named.jsonl", [*rows[:2], rows[2] | {"label": "maybe"}]))
    with pytest.raises(DataError, match="no split 'train'"):
        open_data(tmp_path)
    (tmp_path / "s2.dev").write_text("He plays.\n")
    with pytest.raises(DataError, match=r"s2.dev:2: the file ends here"):
        open_data(tmp_path, split="dev")


# --- The real files ---

REAL = {
    "scifact": ("retrieval", 809), "banking77": ("labelled", 10_003), "huffpost_news_10k": ("labelled", 9_999),
    "stsb": ("pairs", 5_749), "tydiqa_en": ("retrieval", 3_696), "exams_bg": ("texts", 2_113),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_data_opens_as_it_comes(shared_data: Path, name: str) -> None:
    table = open_data(shared_data / name)
    assert (table.kind, len(table)) == REAL[name]
    assert detect_kind(shared_data / name) == table.kind


def test_real_sts_pairs_are_what_splitting_at_tabs_gives(shared_data: Path) -> None:
    for split, rows in (("train", 5749), ("dev", 1500), ("test", 1379)):
        path = shared_data / "stsb" / f"sts-{split}.csv"
        cells = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
        pairs = open_pairs(path)
        assert len(pairs.scores) == rows == len(cells)
        assert list(pairs.first) == [row[5] for row in cells]
        assert list(pairs.second) == [row[6].rstrip("\r") for row in cells]
        assert list(pairs.scores) == [float(row[4]) for row in cells]


def test_real_nli_and_treebank(shared_data: Path) -> None:
    lines = {part: (shared_data / "snli" / f"{part}.dev").read_text().splitlines() for part in ("s1", "labels")}
    entailed = {s1.strip() for s1, label in zip(*lines.values(), strict=True) if label == "entailment"}
    table = open_data(shared_data / "snli", split="dev")
    assert len(table) == len({normalise(text) for text in entailed})
    assert len(open_data(shared_data / "ud_bulgarian_btb", split="dev")) == 1115
    columns = {"text": "0"}
    assert len(open_data(shared_data / "wikisplit" / "tune.tsv", columns=columns)) == 5000


def test_real_news_joins_headline_and_description(shared_data: Path) -> None:
    path = next((shared_data / "huffpost_news_10k").glob("*.json"))
    first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
    assert open_data(path).arrow.value("text", 0) == f"{first['headline']} {first['short_description']}"
