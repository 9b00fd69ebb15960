"""Batches: no known positive is ever a negative, every pair comes once an epoch, batch k hangs on nothing else."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinvec.contracts import KinvecError
from kinvec.files import Table, open_data
from kinvec.losses import dense
from kinvec.sampling import DataSettings, PairBatch, PairSource, as_retrieval, hold_out, pair_source

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]


def table_of(rows: Rows, folder: Path, name: str = "data.jsonl") -> Table:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_data(folder / name)


def closed_of(batch: PairBatch) -> torch.Tensor:
    """What the batch excludes, as a table: queries by documents."""
    return dense(batch.excluded, slice(0, len(batch.queries)), len(batch.documents))


def source_of(table: Table, seed: int = 0, **changes: Any) -> PairSource:
    return pair_source(table, np.arange(len(table)), DataSettings(**changes), seed)


def epoch(source: PairSource, size: int, number: int = 0) -> list[PairBatch]:
    steps = source.steps_per_epoch(size)
    return [source.batch(step, size) for step in range(number * steps, (number + 1) * steps)]


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


QUERIES = ["what is red", "What  is RED", "who", "blue sky", "a document"]
DOCUMENTS = ["a document", "A  Document", "red is a colour", "the sky", "who", "grey", "Grey ", "green"]
DOCUMENT_IDS = ["d1", "D1", "d2", "d3"]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Few texts and ids, so that they meet: equal but for case and space, one id for two texts, two ids for one."""
    made = []
    for number in range(draw(st.integers(2, 6))):
        row: dict[str, Any] = {"query": draw(st.sampled_from(QUERIES))}
        for side, least in (("pos", 1), ("neg", 0)):
            row[f"{side}_doc"] = draw(st.lists(st.sampled_from(DOCUMENTS), min_size=least, max_size=3))
        if draw(st.booleans()):
            row["query_id"] = draw(st.sampled_from(["q1", "q2", f"own{number}"]))
        for side in ("pos", "neg"):
            if draw(st.booleans()):
                row[f"{side}_id"] = [draw(st.sampled_from(DOCUMENT_IDS)) for _ in row[f"{side}_doc"]]
        made.append(row)
    return made


def forbidden(table: Table, query: tuple[str, str], document: tuple[str, str]) -> bool:
    """Whether this document must not be a negative of this query: (id, text) of each, by the rule's own words."""
    if plain(query[1]) == plain(document[1]):
        return True
    for example in map(table.example, range(len(table))):
        if example.query_id == query[0] or plain(example.query) == plain(query[1]):
            for positive in zip(example.positive_ids, example.positives, strict=True):
                if positive[0] == document[0] or plain(positive[1]) == plain(document[1]):
                    return True
    return False


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows(), st.integers(1, 5), st.sampled_from(["first", "random"]), st.integers(0, 3))
def test_exactly_the_known_positives_and_their_duplicates_are_excluded(
    tmp_path: Path, rows: Rows, size: int, negatives: str, most: int
) -> None:
    """By id and by text, from other rows too, of the same query under another id; and nothing else is."""
    table = table_of(rows, tmp_path)
    source = source_of(table, negatives=negatives, negatives_per_query=most)
    for step, batch in enumerate(epoch(source, size)):
        order = np.random.default_rng([0, 0]).permutation(len(source))[step * size : (step + 1) * size]
        count = len(batch.queries)
        closed = closed_of(batch)
        assert torch.equal(batch.targets, torch.arange(count))
        for i in range(count):
            example, place = table.example(int(source.rows[order[i]])), int(source.places[order[i]])
            assert batch.queries[i] == example.query and batch.query_ids[i] == example.query_id
            assert batch.documents[i] == example.positives[place]
            assert batch.scores[i] == example.positive_scores[place]
            for j, text in enumerate(batch.documents):
                owner = int(batch.owner[j])
                brought = table.example(int(source.rows[order[owner]]))
                if j < count:
                    identity: str | None = brought.positive_ids[int(source.places[order[owner]])]
                    assert owner == j
                else:
                    nth = j - int((batch.owner[count:] < owner).sum()) - count
                    assert owner < count and text in brought.negatives
                    identity = brought.negative_ids[nth] if negatives == "first" else None
                if identity is None:  # a random draw: any of the row's negatives of this text
                    same = zip(brought.negative_ids, brought.negatives, strict=True)
                    possible = {forbidden(table, (example.query_id, example.query), d) for d in same if d[1] == text}
                    assert bool(closed[i, j]) in possible
                else:
                    must = forbidden(table, (example.query_id, example.query), (identity, text)) and j != i
                    assert bool(closed[i, j]) == must, (example.query, text)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows(), st.integers(1, 7), st.integers(0, 3))
def test_every_pair_comes_once_an_epoch_and_every_query_weighs_the_same(
    tmp_path: Path, rows: Rows, size: int, number: int
) -> None:
    table = table_of(rows, tmp_path)
    batches = epoch(source_of(table), size, number)
    pairs = Counter((b.query_ids[i], b.queries[i], b.documents[i]) for b in batches for i in range(len(b.queries)))
    examples = [table.example(row) for row in range(len(table))]
    assert pairs == Counter((e.query_id, e.query, text) for e in examples for text in e.positives)
    assert all(len(b.queries) == size for b in batches[:-1])
    weights: dict[str, float] = defaultdict(float)
    for batch in batches:
        for query, weight in zip(batch.queries, batch.weights.tolist(), strict=True):
            weights[plain(query)] += weight
    assert all(total == pytest.approx(1.0, abs=1e-5) for total in weights.values())


def many(count: int) -> Rows:
    return [
        {"query": f"question {i}", "pos_doc": f"answer {i}", "neg_doc": [f"wrong {i} {j}" for j in range(6)]}
        for i in range(count)
    ]


def same_batch(a: PairBatch, b: PairBatch) -> bool:
    plain = a.queries == b.queries and a.documents == b.documents and a.query_ids == b.query_ids
    return plain and all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("excluded", "owner", "weights"))


def test_batch_k_is_a_function_of_data_seed_and_k(tmp_path: Path) -> None:
    table = table_of(many(50), tmp_path)
    first, again = (source_of(table, seed=3, negatives="random", negatives_per_query=2) for _ in range(2))
    walked = [first.batch(step, 8) for step in range(20)]
    np.random.rand(5), torch.rand(5)  # whatever else draws numbers
    assert all(same_batch(again.batch(step, 8), walked[step]) for step in (19, 0, 7, 12, 7))
    other = source_of(table, seed=4, negatives="random", negatives_per_query=2)
    assert not same_batch(other.batch(0, 8), walked[0])
    assert walked[0].queries != walked[7].queries  # the second epoch begins at step 7, in another order


def test_negatives_are_the_first_or_drawn_anew_each_epoch(tmp_path: Path) -> None:
    table = table_of(many(30), tmp_path)

    def negatives(choice: str, number: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for batch in epoch(source_of(table, negatives=choice, negatives_per_query=3), 7, number):
            for j in range(len(batch.queries), len(batch.documents)):
                found.setdefault(batch.queries[int(batch.owner[j])], []).append(batch.documents[j])
        return found

    assert all(texts == [f"wrong {q.split()[1]} {j}" for j in range(3)] for q, texts in negatives("first", 0).items())
    drawn = [negatives("random", number) for number in range(3)]
    assert all(len(set(texts)) == 3 for texts in drawn[0].values()) and len(drawn[0]) == 30
    assert drawn[0] != drawn[1] != drawn[2]
    used = Counter(text[-1] for epoch_texts in drawn for texts in epoch_texts.values() for text in texts)
    assert set(used) == set("012345")


def test_what_becomes_of_queries_with_too_few_negatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"query": f"q{n}", "pos_doc": f"right {n}", "neg_doc": [f"wrong {n} {j}" for j in range(n)]} for n in range(5)
    ]
    table = table_of(rows, tmp_path)

    def negatives(rule: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for batch in epoch(source_of(table, negatives_per_query=3, fewer_negatives=rule), 5):
            found |= {query: [] for query in batch.queries}
            for j in range(len(batch.queries), len(batch.documents)):
                found[batch.queries[int(batch.owner[j])]].append(batch.documents[j][-1])
        return found

    kept = {"q0": [], "q1": ["0"], "q2": ["0", "1"], "q3": ["0", "1", "2"], "q4": ["0", "1", "2"]}
    assert negatives("keep") == kept
    assert negatives("repeat") == kept | {"q1": ["0", "0", "0"], "q2": ["0", "1", "0"]}
    assert negatives("drop") == {query: kept[query] for query in ("q3", "q4")}
    assert "3 queries with fewer than 3 hard negatives are left out" in capsys.readouterr().err
    with pytest.raises(KinvecError, match=r"data.jsonl:1: the row has 0 hard negatives.*fewer_negatives=repeat"):
        negatives("error")
    with pytest.raises(KinvecError, match="no row has 9 hard negatives"):
        source_of(table, negatives_per_query=9, fewer_negatives="drop")


def test_graded_scores_are_kept_and_score_0_is_a_judged_negative(tmp_path: Path) -> None:
    rows: Rows = [
        {
            "query": "q one",
            "pos_doc": ["best", "good", "bad"],
            "pos_score": [3, 1.5, 0],
            "neg_doc": ["mined"],
            "neg_score": [0.4],
        },
        {"query": "q two", "pos_doc": "fine"},
    ]
    table = table_of(rows, tmp_path)
    batches = epoch(source_of(table), 4)
    found = {(q, d): s for b in batches for q, d, s in zip(b.queries, b.documents, b.scores.tolist(), strict=False)}
    assert found == {("q one", "best"): 3.0, ("q one", "good"): 1.5, ("q two", "fine"): 1.0}
    assert set(batches[0].documents[3:]) == {"bad", "mined"}
    data = as_retrieval(table, np.arange(2), 0, "dev")
    by_text = dict(zip(data.corpus.ids, data.corpus.texts, strict=True))
    judged = {by_text[doc]: grade for doc, grade in data.qrels[table.example(0).query_id].items()}
    assert judged == {"best": 3, "good": 2, "bad": 0, "mined": 0}


# ---- holding out ----


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 60), min_size=1, max_size=80), st.sampled_from([0.0, 0.1, 0.5]), st.randoms())
def test_held_out_queries_are_disjoint_and_stable_under_reordering(
    tmp_path: Path, numbers: list[int], share: float, random: Any
) -> None:
    rows = [
        {"query": f"Question {n}" if i % 2 else f"question  {n}", "pos_doc": f"answer {i}"}
        for i, n in enumerate(numbers)
    ]
    table = table_of(rows, tmp_path)
    kept, held = hold_out(table, share, "dev")
    assert sorted([*kept, *held]) == list(range(len(rows)))
    queries = {part: {plain(rows[i]["query"]) for i in rows_of} for part, rows_of in (("kept", kept), ("held", held))}
    assert not queries["kept"] & queries["held"]
    distinct = len(set(numbers))
    expected = max(round(distinct * share), 1) if share and distinct > 1 else 0
    assert len(queries["held"]) == expected
    shuffled = random.sample(rows, len(rows))
    other = table_of(shuffled, tmp_path, "shuffled.jsonl")
    assert {plain(shuffled[i]["query"]) for i in hold_out(other, share, "dev")[1]} == queries["held"]


def test_dev_and_test_are_drawn_apart(tmp_path: Path) -> None:
    table = table_of(many(400), tmp_path)
    dev, test = (set(hold_out(table, 0.25, name)[1].tolist()) for name in ("dev", "test"))
    assert len(dev) == len(test) == 100 and 5 < len(dev & test) < 60


def test_a_held_out_search_problem_has_its_documents_and_distractors(tmp_path: Path) -> None:
    table = table_of(many(40), tmp_path)
    kept, held = hold_out(table, 0.2, "test")
    data = as_retrieval(table, held, 50, "test")
    texts = set(data.corpus.texts)
    assert set(data.queries.values()) == {f"question {i}" for i in held}
    assert {f"answer {i}" for i in held} <= texts and {f"wrong {i} {j}" for i in held for j in range(6)} <= texts
    assert len(data.corpus) == len(texts) == 8 * 7 + 50
    again = as_retrieval(table, held, 50, "test")
    assert list(again.corpus.texts) == list(data.corpus.texts) and again.fingerprint == data.fingerprint
    assert data.fingerprint != as_retrieval(table, held, 49, "test").fingerprint
    assert {doc for judged in data.qrels.values() for doc in judged} <= set(data.corpus.ids)


def test_rows_held_out_are_never_looked_at_in_training(tmp_path: Path) -> None:
    """A judgement of a held-out row must not even mask a training negative."""
    rows: Rows = [
        {"query_id": "q1", "query": "red", "pos_doc": "crimson", "neg_doc": ["scarlet"]},
        {"query_id": "q1", "query": "red things", "pos_doc": "scarlet"},
    ]
    table = table_of(rows, tmp_path)
    assert len(source_of(table).batch(0, 2).excluded)
    alone = pair_source(table, np.array([0]), DataSettings(), 0).batch(0, 2)
    assert alone.documents == ["crimson", "scarlet"] and not len(alone.excluded)
