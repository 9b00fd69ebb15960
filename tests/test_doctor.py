"""The data doctor: what is planted is found, what is not there is not, and it says how much it looked at."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinvec.checks import keys_of
from kinvec.contracts import RecipeError
from kinvec.doctor import QUICK, Checked, check_source, examine, near, to_json
from kinvec.doctor.languages import languages
from kinvec.doctor.texts import texts_of
from kinvec.files import open_data
from kinvec.recipe import load_recipe
from kinvec.run_data import examined, open_run_data
from kinvec.verbs.check import check

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def words(draw: random.Random, count: int) -> list[str]:
    return ["".join(draw.choices(LETTERS, k=draw.randint(3, 9))) for _ in range(count)]


def fives(text: str) -> set[str]:
    """The shingles by their definition, for texts of letters, digits and single spaces."""
    text = f"{text.casefold()} "
    return {text[i : i + 5] for i in range(len(text) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(fives(a) & fives(b)) / len(fives(a) | fives(b))


def pairs_of(texts: list[str]) -> dict[tuple[int, int], float]:
    pairs, similar, _ = near.near_pairs(
        near.signatures([texts], len(texts)), lambda numbers: [texts[i] for i in numbers]
    )
    return dict(zip(map(tuple, pairs.tolist()), similar.tolist(), strict=True))


def by_rule(checked: Checked) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for finding in checked.findings:
        found.setdefault(finding.rule, []).append(finding)
    return found


# --- Near duplicates ---


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(8, 120), changed=st.floats(0, 0.5))
def test_planted_near_duplicates_are_found_and_nothing_else_is(seed: int, length: int, changed: float) -> None:
    draw = random.Random(seed)
    originals = [words(draw, length) for _ in range(40)]
    copies = [[word if draw.random() > changed else words(draw, 1)[0] for word in text] for text in originals]
    texts = [" ".join(text) for text in originals + copies]
    found = pairs_of(texts)
    for (a, b), similar in found.items():
        assert similar == pytest.approx(jaccard(texts[a], texts[b])) and similar >= near.NEAR and a < b
    wanted = {(i, i + 40) for i in range(40) if jaccard(texts[i], texts[i + 40]) >= 0.9}
    assert wanted <= found.keys()  # each is missed with a probability below 1e-5
    assert all(b - a == 40 for a, b in found)


def test_what_stands_between_letters_and_their_case_do_not_count() -> None:
    texts = [
        "How do I reset  my PIN?",
        "how do i reset – my pin",
        "Как да сменя своя ПИН?",
        "как да сменя: своя пин",
        "",
        "?",
    ]
    assert pairs_of(texts) == {(0, 1): 1.0, (2, 3): 1.0}


def test_of_many_alike_texts_pairs_grow_with_their_number_not_with_its_square() -> None:
    draw = random.Random(0)
    base = words(draw, 60)
    texts = [" ".join([*base[:at], "other", *base[at + 1 :]]) for at in range(60)] * 5
    texts = [f"{text} {number}" for number, text in enumerate(texts)]
    found = pairs_of(texts)
    assert len(found) < 64 * len(texts)
    (group,) = near.groups(np.array(list(found)), len(texts))
    assert group.tolist() == list(range(len(texts)))


def test_it_says_when_more_are_likely_than_are_counted_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = random.Random(13)
    texts = [" ".join(words(draw, 30)) for _ in range(40)]
    path = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in [*texts, *(f"{text} more" for text in texts)]])
    (all_counted,) = by_rule(check_source(path))["near duplicate"]
    monkeypatch.setattr(near, "PAIRS", 25)
    (some,) = by_rule(check_source(path))["near duplicate"]
    assert (all_counted.count, some.count) == (40, 25)
    assert "there may be more" in some.message and "there may be more" not in all_counted.message


def test_pairs_across_join_one_of_the_references_with_one_of_the_others() -> None:
    draw = random.Random(1)
    texts = [" ".join(words(draw, 30)) for _ in range(20)]
    both = texts + [f"{text} more" for text in texts[:5]] + texts[5:8] + texts[5:8]
    signed = near.signatures([both], len(both))
    pairs, *_ = near.near_pairs(signed, lambda numbers: [both[i] for i in numbers], references=20)
    assert {tuple(pair) for pair in pairs.tolist()} == {
        *((i, i + 20) for i in range(5)), *((i, i + 20) for i in range(5, 8)), *((i, i + 23) for i in range(5, 8))
    }  # fmt: skip


def test_signatures_do_not_depend_on_how_texts_are_cut_into_batches() -> None:
    draw = random.Random(2)
    texts = [" ".join(words(draw, draw.randint(0, 400))) for _ in range(200)]
    whole = near.signatures([texts], len(texts))
    assert np.array_equal(whole, near.signatures([texts[:7], texts[7:8], texts[8:]], len(texts)))
    agree = np.mean(whole[0] == near.signatures([[texts[0]]], 1)[0])
    assert agree == 1 and whole.shape == (200, 128)


@pytest.mark.parametrize("kept", [0.75, 0.9])
def test_signatures_estimate_the_similarity(kept: float) -> None:
    draw = random.Random(3)
    originals = [words(draw, 80) for _ in range(300)]
    copies = [[word if draw.random() < kept else words(draw, 1)[0] for word in text] for text in originals]
    texts = [" ".join(text) for text in originals + copies]
    signed = near.signatures([texts], len(texts))
    places = np.arange(300)
    estimates = near._estimate(signed, places, places + 300)
    true = np.array([jaccard(texts[i], texts[i + 300]) for i in range(300)])
    assert abs(float((estimates - true).mean())) < 3 * 0.5 / np.sqrt(128 * 300)
    assert float((estimates - true).std()) < 1.2 * float(np.sqrt(true * (1 - true) / 128).mean())


def test_near_duplicates_are_counted_by_side_with_texts_and_lines(tmp_path: Path) -> None:
    draw = random.Random(4)
    rows = [{"query": " ".join(words(draw, 8)), "pos_doc": " ".join(words(draw, 60))} for _ in range(80)]
    rows += [{"query": " ".join(words(draw, 8)), "pos_doc": f"{row['pos_doc']} again"} for row in rows[:2]]
    rows += [{"query": f"{rows[5]['query']}!", "pos_doc": rows[5]["pos_doc"]}]
    checked = check_source(jsonl(tmp_path / "rows.jsonl", rows))
    queries, documents = by_rule(checked)["near duplicate"]
    assert (queries.count, queries.line, documents.count, documents.line) == (1, 83, 2, 81)
    assert documents.share == pytest.approx(2 / 82, abs=1e-4) and documents.severity == "warning"
    texts = documents.examples[0]["texts"]
    assert [text["line"] for text in texts] == [1, 81] and texts[1]["text"].endswith("again")
    assert checked.looked["near duplicates, documents"] == "all 82 documents" and not checked.wrong


def test_a_sample_is_looked_at_where_texts_are_many_and_it_says_so(tmp_path: Path) -> None:
    draw = random.Random(5)
    path = jsonl(tmp_path / "rows.jsonl", [{"text": " ".join(words(draw, 20))} for _ in range(400)])
    table = open_data(path)
    few = type(QUICK)(rows=200, characters=5000, languages=10)
    checked = examine(table, effort=few)
    assert checked.looked["rows"] == "200 of 400 rows"
    some, of = checked.looked["near duplicates, texts"].split(" texts")[0].split(" of ")
    assert 20 < int(some) < 60 and of == "200"
    assert checked.looked["languages, texts"] == "10 of 200 texts, evenly spread"
    assert sum(checked.languages["texts"].values()) == 10


# --- Leakage ---


def test_questions_that_nearly_repeat_one_of_the_evaluation_are_a_warning(tmp_path: Path) -> None:
    draw = random.Random(6)
    rows = [{"query": " ".join(words(draw, 9)), "pos_doc": " ".join(words(draw, 40))} for _ in range(60)]
    test = [{"query": f"{rows[i]['query']}?", "pos_doc": f"{rows[i]['pos_doc']} indeed"} for i in (3, 7)]
    test += [{"query": rows[9]["query"], "pos_doc": rows[9]["pos_doc"]}, {"query": "something else", "pos_doc": "new"}]
    train = jsonl(tmp_path / "train.jsonl", rows)
    checked = check_source(train, evaluation=jsonl(tmp_path / "test.jsonl", test))
    found = by_rule(checked)
    queries, documents = found["near leakage"]
    assert [finding.line for finding in found["leakage"] + found["shared documents"]] == [10, 10]
    assert (queries.count, queries.line, queries.severity) == (2, 4, "warning")
    assert (documents.count, documents.line) == (2, 4)
    assert queries.examples[0]["texts"][1]["text"] == test[0]["query"]
    assert "near leakage" not in by_rule(check_source(train, evaluation=train))


def test_real_scifact_asks_nearly_the_same_in_training_and_test(shared_data: Path) -> None:
    checked = check_source(shared_data / "scifact")
    (leak,) = by_rule(checked)["near leakage"]
    test = open_data(shared_data / "scifact", split="test").rows["query"].to_pylist()
    train = dict.fromkeys(open_data(shared_data / "scifact").rows["query"].to_pylist())
    asked, judged = ({text: fives(_plain(text)) for text in texts} for texts in (train, test))
    plain = [text for text in train if text not in judged and _plainly_near(asked[text], judged.values())]
    assert leak.count == len(plain) > 20


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def _plainly_near(one: set[str], others: Iterable[set[str]]) -> bool:
    return any(len(one & other) / len(one | other) >= near.NEAR for other in others)


# --- Lengths and languages ---


def test_texts_of_odd_length_are_found_and_ordinary_variety_is_not(tmp_path: Path) -> None:
    draw = random.Random(7)
    rows = [{"text": " ".join(words(draw, int(draw.lognormvariate(3, 0.4)) + 1))} for _ in range(500)]
    ordinary = check_source(jsonl(tmp_path / "ordinary.jsonl", rows))
    assert not {"long", "short"} & by_rule(ordinary).keys()
    counts, edges = ordinary.lengths["texts"]["counts"], ordinary.lengths["texts"]["edges"]
    assert sum(counts) == 500 and len(edges) == len(counts) + 1 and edges == sorted(edges)
    rows[100], rows[200] = {"text": "n/a"}, {"text": " ".join(words(draw, 3000))}
    found = by_rule(check_source(jsonl(tmp_path / "odd.jsonl", rows)))
    assert [(found[rule][0].count, found[rule][0].line) for rule in ("long", "short")] == [(1, 201), (1, 101)]


BULGARIAN = "Планината е покрита със сняг и пътеките към върха са затворени до пролетта."
FRENCH = "La montagne est couverte de neige et les sentiers vers le sommet sont fermés jusqu'au printemps."
ENGLISH = [
    "The mountain is covered with snow and the paths to the summit are closed until spring.",
    "How do I get a new card if the old one was stolen while I was travelling abroad?",
    "Researchers have found that sleep is more important for memory than had been thought.",
    "top up failed", "Paris", "ok", "PIN?",
]  # fmt: skip


def test_languages_that_few_texts_are_in_are_found(tmp_path: Path) -> None:
    texts = [f"{ENGLISH[i % len(ENGLISH)]} {i}" for i in range(200)]
    texts[50], texts[60], texts[70] = BULGARIAN, FRENCH, "Помощ"
    checked = check_source(jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts]))
    (finding,) = by_rule(checked)["language"]
    assert (finding.count, finding.line) == (3, 51) and "not in en" in finding.message
    assert checked.languages["texts"]["en"] == 197
    assert [example["texts"][0]["line"] for example in finding.examples] == [51, 61, 71]


def test_two_languages_of_the_data_are_both_its_own() -> None:
    told = languages([*[BULGARIAN, ENGLISH[0]] * 20, FRENCH, "ok", "да"])
    assert told[:40] == ["bg", "en"] * 20 and told[40:] == ["fr", "en", "bg"]


# --- Labels ---


def test_labels_that_few_texts_have_are_named_and_imbalance_is_measured(tmp_path: Path) -> None:
    draw = random.Random(8)
    counts = {"many": 90, "some": 12, "few": 3, "one": 1}
    rows = [{"text": " ".join(words(draw, 12)), "label": label} for label, n in counts.items() for _ in range(n)]
    checked = check_source(jsonl(tmp_path / "labels.jsonl", rows))
    few, balance = by_rule(checked)["labels"]
    assert checked.labels == counts
    assert (few.count, few.severity) == (2, "warning") and "one 1, few 3" in few.message
    shares = np.array(list(counts.values())) / 106
    effective = np.exp(-(shares * np.log(shares)).sum())
    assert f"{effective:.1f} equally common ones of 4" in balance.message and balance.severity == "note"
    even = [{"text": " ".join(words(draw, 12)), "label": label} for label in "abc" for _ in range(20)]
    assert "labels" not in by_rule(check_source(jsonl(tmp_path / "even.jsonl", even)))


def test_nearly_the_same_text_under_another_label_is_a_contradiction(tmp_path: Path) -> None:
    draw = random.Random(10)
    rows = [{"text": " ".join(words(draw, 12)), "label": "ab"[i % 2]} for i in range(60)]
    rows += [{"text": f"{rows[4]['text']}?", "label": "b"}, {"text": f"{rows[5]['text']}?", "label": "b"}]
    checked = check_source(jsonl(tmp_path / "rows.jsonl", rows))
    (torn,), (near_duplicate,) = (by_rule(checked)[rule] for rule in ("near contradiction", "near duplicate"))
    assert (torn.count, torn.line, torn.examples[0]["note"]) == (1, 5, "a and b")
    assert near_duplicate.count == 2 and checked.drop.tolist() == [61]


# --- Suspects ---


class Told:
    """An encoder of texts that say their own vector: the angle in degrees."""

    name = "told"

    def encode_queries(self, texts: Any) -> np.ndarray:
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_documents = encode_queries


def test_negatives_that_score_near_the_positive_are_suspected(tmp_path: Path) -> None:
    rows = [
        {"query": "a 0", "pos_doc": "a 10", "neg_doc": ["x 5", "x 50"]},  # one above the positive
        {"query": "b 170", "pos_doc": "b 160", "neg_doc": ["x 120"]},
        {"query": "c 90", "pos_doc": "c 90", "neg_doc": ["x 70"]},  # the cosine is 0.94, below 0.95
    ]
    found = by_rule(check_source(jsonl(tmp_path / "rows.jsonl", rows), encoder=Told()))
    (own,) = found["false negative"]
    assert (own.count, own.line, own.share) == (1, 1, pytest.approx(1 / 3, abs=1e-4))
    assert [text["text"] for text in own.examples[0]["texts"]] == ["a 0", "x 5", "a 10"]
    assert "batch negative" not in found
    rows[2]["neg_doc"] = ["x 165"]  # of another row than b's
    (batch,) = by_rule(check_source(jsonl(tmp_path / "rows.jsonl", rows), encoder=Told()))["batch negative"]
    assert (batch.count, batch.line) == (1, 2) and "objective.guide=told" in batch.remedy


# --- The whole ---


def test_the_verdict_is_of_all_sources_and_json_holds_everything(tmp_path: Path) -> None:
    draw = random.Random(9)
    rows = [{"text": " ".join(words(draw, 20))} for _ in range(60)]
    path = jsonl(tmp_path / "rows.jsonl", [*rows, {"text": f"{rows[0]['text']} a"}])
    told = to_json(check(path, jsonl(tmp_path / "clean.jsonl", rows)))
    assert json.loads(json.dumps(told)) == told
    assert [one["verdict"] for one in told["sources"]] == [
        "fit to train on, with 1 thing to look at (1 warning)", "fit to train on; nothing found",
    ]  # fmt: skip
    assert told["verdict"].count("fit to train on") == 2
    keys = {
        "source",
        "wrong",
        "verdict",
        "summary",
        "findings",
        "looked",
        "not_looked",
        "lengths",
        "languages",
        "labels",
    }
    assert set(told["sources"][0]) == keys
    finding = told["sources"][0]["findings"][0]
    assert set(finding) == {
        "severity", "rule", "file", "line", "message", "remedy", "count", "share", "examples"
    }  # fmt: skip


def test_what_is_written_is_read_as_it_was_without_the_rows_that_are_better_left_out(tmp_path: Path) -> None:
    draw = random.Random(11)
    rows: list[dict[str, Any]] = [
        {
            "query": " ".join(words(draw, 9)), "query_id": f"q{i}", "pos_doc": [" ".join(words(draw, 30))],
            "pos_id": [f"d{i}"], "neg_doc": [" ".join(words(draw, 30))], "neg_score": [0.5],
        }
        for i in range(60)
    ]  # fmt: skip
    test = [{"query": rows[7]["query"], "pos_doc": "x"}, {"query": f"{rows[8]['query']}!", "pos_doc": "y"}]
    near_copy = rows[3] | {"query": f"{rows[3]['query']}?", "query_id": "q90"}
    paraphrase = rows[4] | {"query": f"{rows[4]['query']}?", "query_id": "q91", "pos_id": ["d91"]}
    paraphrase["pos_doc"] = [" ".join(words(draw, 30))]
    path = jsonl(tmp_path / "rows.jsonl", [*rows, rows[2], near_copy, paraphrase])
    evaluation, out = jsonl(tmp_path / "test.jsonl", test), tmp_path / "clean.jsonl"
    (checked,) = check(path, evaluation=evaluation, write=out)
    assert checked.wrong and checked.drop.tolist() == [7, 8, 60, 61]
    before, after = (open_data(source).rows.drop_columns(["file", "line"]) for source in (path, out))
    assert after.equals(before.take([row for row in range(63) if row not in (7, 8, 60, 61)]))
    assert not check(out, evaluation=evaluation)[0].wrong
    with pytest.raises(RecipeError, match="there already"):
        check(path, write=out)
    with pytest.raises(RecipeError, match="one source"):
        check(path, path, write=tmp_path / "other.jsonl")


def test_a_run_keeps_what_the_doctor_says_of_the_rows_it_trains_on(tmp_path: Path) -> None:
    draw = random.Random(12)
    rows = [{"query": " ".join(words(draw, 9)), "pos_doc": " ".join(words(draw, 30))} for _ in range(100)]
    rows += [{"query": f"{row['query']}?", "pos_doc": " ".join(words(draw, 30))} for row in rows]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    recipe = load_recipe("scifact", ["model=none", f"data.train={path}", f"out={tmp_path / 'run'}"])
    data = open_run_data(recipe)
    (told,) = examined(data)["sources"]
    (trained,) = (one.examples for one in data.sets)
    assert told["looked"]["rows"] == f"{len(trained)} of 200 rows" and len(trained) < 200
    asked = {text.rstrip("?") for text in data.sets[0].test.queries.values()}
    leaked = [row for row in trained.tolist() if rows[row]["query"].rstrip("?") in asked]
    (finding,) = [finding for finding in told["findings"] if finding["rule"] == "near leakage"]
    assert finding["count"] == len(leaked) > 0 and finding["message"].endswith(f"(all {len(trained)} queries)")
    assert "leakage" in told["looked"] and set(told["languages"]) == {"queries", "documents"}


def test_texts_are_read_again_after_their_pages_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"query": f"query {i}", "pos_doc": [f"first {i}", f"second {i}"], "neg_doc": [f"other {i}"]} for i in range(9)
    ]
    table = open_data(jsonl(tmp_path / "rows.jsonl", rows))
    queries, documents = texts_of(table, keys_of(table))
    assert queries.read(np.array([8, 0])) == ["query 8", "query 0"] and "_mapped" in vars(table.arrow)
    monkeypatch.setattr("kinvec.doctor.texts.MAPPED", 1)
    for _ in range(2):
        assert documents.read(np.array([0, 1, 2, 26])) == ["first 0", "second 0", "other 0", "other 8"]
        assert "_mapped" not in vars(table.arrow)
    assert [text for batch in documents.batches(np.array([1, 2, 25])) for text in batch] == [
        "second 0", "other 0", "second 8",
    ]  # fmt: skip
