"""Cheaper vectors: codes against sentence-transformers', every row against a naive search, and what a user sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings
from test_tasks import Words, problem
from tiny_models import WORDS

import kinvec
from kinvec import Embedder, metrics, quantising, tasks
from kinvec.contracts import Corpus, PairData, Qrels
from kinvec.quantising import PRECISIONS, from_bits, from_int8, ranges_of, to_bits, to_int8
from kinvec.tasks import compression
from kinvec.tasks.compression import cheaper, small_enough, trained_dimensions
from kinvec.verbs.embed import embed
from kinvec.verbs.evaluate import evaluate

Q, N, D = 12, 200, 40


@pytest.fixture(scope="module")
def space() -> tuple[np.ndarray, np.ndarray, list[str], Qrels]:
    """Documents around queries, some of them twice; ids in another order than rows; graded judgements."""
    draw = np.random.default_rng(0)
    queries = draw.normal(size=(Q, D)).astype(np.float32)
    documents = (queries[draw.integers(0, Q, N)] + 2.5 * draw.normal(size=(N, D))).astype(np.float32)
    documents[150:] = documents[:50]
    ids = [f"d{i}" for i in draw.permutation(N)]
    qrels = {f"q{i}": {str(d): int(draw.integers(0, 3)) for d in draw.choice(ids, 30)} for i in range(Q)}
    return queries, documents, ids, qrels


# --- Codes ------------------------------------------------------------------------------------------------------------


def test_int8_codes_are_within_half_a_step_and_within_one_of_sentence_transformers() -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 24)).astype(np.float32)
    vectors[:, 3] = 0.25  # a dimension that is always the same
    ranges = ranges_of([vectors[:20], vectors[20:20], vectors[20:]])
    codes = to_int8(vectors, ranges)
    step = (ranges[1] - ranges[0]) / 255
    assert (np.abs(from_int8(codes, ranges) - vectors) <= step / 2 + 1e-6).all()
    assert codes.min() == -128 and codes.max() == 127 and (from_int8(codes, ranges)[:, 3] == 0.25).all()
    theirs = quantize_embeddings(vectors, "int8", ranges=ranges)
    assert np.abs(codes.astype(int) - theirs.astype(int)).max() == 1
    assert to_int8(vectors * 100, ranges).max() == 127, "beyond the ranges a value is at their end, not around it"


def test_bits_are_those_of_sentence_transformers_and_count_the_hamming_distance() -> None:
    vectors = np.random.default_rng(2).normal(size=(30, 21)).astype(np.float32)
    bits = to_bits(vectors)
    np.testing.assert_array_equal(bits, quantize_embeddings(vectors, "ubinary"))
    hamming = np.bitwise_count(bits[:, None] ^ bits[None]).sum(axis=2)
    signs = from_bits(bits, 21)
    np.testing.assert_array_equal(signs @ signs.T, 21 - 2 * hamming.astype(int))


# --- Every row against a naive search ---------------------------------------------------------------------------------


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _order(scores: np.ndarray, ids: list[str]) -> list[str]:
    """Ids by falling score, equal ones by falling id; scores as float32, as trec_eval compares them."""
    return [i for _, i in sorted(zip(scores.astype(np.float32).tolist(), ids, strict=True), reverse=True)]


def _naive(row: dict[str, Any], queries: np.ndarray, documents: np.ndarray, ids: list[str], k: int) -> list[list[str]]:
    """The k best of every query as a plain program over packed codes has it."""
    m = row["dimensions"]
    q, d = _unit(queries[:, :m]), _unit(documents[:, :m])
    exact, found = q.astype(np.float64), []
    low, high = d.min(axis=0), d.max(axis=0)
    ends = np.stack([low, high])
    for i in range(len(q)):
        if row["precision"] == "binary":
            stored = from_bits(to_bits(d), m)
            first = -np.bitwise_count(to_bits(d) ^ to_bits(q[i : i + 1])).sum(axis=1, dtype=np.int64)
        elif row["precision"] == "int8":
            stored = from_int8(to_int8(d, ends), ends)
            first = stored.astype(np.float64) @ from_int8(to_int8(q[i : i + 1], ends), ends)[0].astype(np.float64)
        else:
            kind = row["precision"]
            stored = d.astype(kind)
            first = stored.astype(np.float64) @ q[i].astype(kind).astype(np.float64)
        order = _order(np.asarray(first, dtype=np.float64), ids)
        if row["rescored"]:
            place = {identity: r for r, identity in enumerate(ids)}
            candidates = order[: 4 * k]
            again = np.array([stored[place[c]].astype(np.float64) @ exact[i] for c in candidates])
            order = _order(again, candidates)
        found.append(order[:k])
    return found


def test_every_row_equals_a_naive_search(space: tuple[np.ndarray, np.ndarray, list[str], Qrels]) -> None:
    queries, documents, ids, qrels = space
    found = cheaper(qrels, (list(qrels), [queries]), (ids, [documents]), ["nDCG@10", "P@3"], similarity="cosine")
    assert (found["measure"], found["oversampling"]) == ("nDCG@10", 4)
    names = [(row["dimensions"], row["precision"], row["rescored"]) for row in found["rows"]]
    stored = [(precision, False) for precision in ("float32", "float16", "int8", "binary")]
    stored[3:3], stored[5:] = [("int8", True)], [("binary", True)]
    assert names == [(m, *kind) for m in (40, 20, 10) for kind in stored]
    for row in found["rows"]:
        naive = _naive(row, queries, documents, ids, 10)
        values = metrics.retrieval(["nDCG@10", "P@3"], qrels, dict(zip(qrels, naive, strict=True)))
        assert row["metrics"] == {name: pytest.approx(column.mean()) for name, column in values.items()}, row
    bytes_of = {(row["dimensions"], row["precision"]): row["bytes"] for row in found["rows"]}
    assert bytes_of[40, "float32"] == 160 and bytes_of[20, "float16"] == 40 and bytes_of[10, "int8"] == 10
    assert [bytes_of[m, "binary"] for m in (40, 20, 10)] == [5, 3, 2]
    assert len({row["metrics"]["nDCG@10"] for row in found["rows"]}) > 10, "the choices do differ on these vectors"


def test_shards_and_the_order_of_queries_change_nothing(
    space: tuple[np.ndarray, np.ndarray, list[str], Qrels], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queries, documents, ids, qrels = space
    whole = cheaper(qrels, (list(qrels), [queries]), (ids, [documents]), ["nDCG@10"], dimensions=[16])
    np.save(tmp_path / "doc.npy", documents[:70])
    shards = [np.load(tmp_path / "doc.npy", mmap_mode="r"), documents[70:70], documents[70:]]
    monkeypatch.setattr(compression, "ENCODE_ROWS", 32)
    back = list(reversed(qrels))
    parts = [queries[::-1][:5], queries[::-1][5:]]
    assert cheaper(qrels, (back, parts), (ids, shards), ["nDCG@10"], dimensions=[16, 40]) == whole
    assert [row["dimensions"] for row in whole["rows"]] == [40] * 6 + [16] * 6


def test_the_figures_of_a_row_are_those_of_its_queries(space: tuple[np.ndarray, np.ndarray, list[str], Qrels]) -> None:
    queries, documents, ids, qrels = space
    rows = cheaper(qrels, (list(qrels), [queries]), (ids, [documents]), ["nDCG@10"], similarity="cosine")["rows"]
    full, last = rows[0], rows[-1]
    assert full["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and full["kept"] == 1.0
    rankings = (_naive(row, queries, documents, ids, 10) for row in (full, last))
    values = [metrics.retrieval(["nDCG@10"], qrels, dict(zip(qrels, r, strict=True)))["nDCG@10"] for r in rankings]
    assert last["difference"]["value"] == pytest.approx(values[1].mean() - values[0].mean())
    assert last["kept"] == pytest.approx(values[1].mean() / values[0].mean())
    for told, column in ((last["interval"], values[1]), (full["interval"], values[0])):
        assert told == pytest.approx(metrics.mean_interval(column))
    paired = last["difference"]["low"], last["difference"]["high"]
    assert paired == pytest.approx(metrics.mean_interval(values[1] - values[0]))


def test_inner_products_are_not_scaled_after_the_cut() -> None:
    documents = np.array([[3.0, 0], [1, 5], [2, 0]], dtype=np.float32)
    sides = (["q"], [np.ones((1, 2), dtype=np.float32)]), (["a", "b", "c"], [documents])
    for similarity, first in (("dot", "a"), ("cosine", "c")):  # cut and scaled all are equal, and c is the last id
        cut = cheaper({"q": {first: 1}}, *sides, ["RR@3"], similarity=similarity, dimensions=[1])["rows"][6]
        assert cut["dimensions"] == 1 and cut["metrics"]["RR@3"] == 1.0


# --- What a user sees -------------------------------------------------------------------------------------------------


def test_nothing_is_encoded_twice_and_the_result_is_the_same() -> None:
    plain, words = Words(), Words()
    expected, result = tasks.retrieval(problem(), plain), tasks.with_cheaper(problem(), words)
    assert words.calls == plain.calls
    assert result.metrics == expected.metrics and result.per_query == expected.per_query
    assert result.cheaper["rows"][0]["metrics"].items() <= expected.metrics.items()


def test_the_command_shows_a_table_and_writes_the_file(
    main: Callable[..., tuple[int, str]], tiny_folder: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    asked = ["evaluate", "--model", str(tiny_folder), "--data", str(tiny_pairs), "--precision", "fp32", "--cheaper"]
    code, told = main(*asked, "--dimension", "8", "--out", str(tmp_path / "out"))
    assert code == 0, told
    assert "cheaper vectors; rescored: 4 candidates" in told and "binary, rescored" in told
    found = json.loads((tmp_path / "out" / "cheaper.json").read_text())
    assert tasks.load_result(tmp_path / "out").cheaper == found
    assert "cheaper" not in json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["dimensions"] for row in found["rows"]} == {32, 8}
    fewest = min(row["bytes"] for row in found["rows"] if row["kept"] >= 0.95)
    assert f"95% kept in {fewest} bytes instead of 128" in told
    code, told = main(*asked, "--dimension", "8", "--json")
    shown, _ = json.JSONDecoder().raw_decode(told[told.index("{") :])
    assert shown["cheaper"] == found
    evaluate(tiny_folder, tiny_pairs, precision="fp32", out=tmp_path / "out")
    assert not (tmp_path / "out" / "cheaper.json").exists(), "it was of the result before"


def test_vectors_on_disk_give_the_same_figures(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [f"d{i}\tthe cell and the gene number {i}" for i in range(9)]
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", rows), ("queries", rows[:3])):
        said = (dict(zip(("_id", "text"), line.split("\t"), strict=True)) for line in lines)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td0\t1\nd2\td5\t1\n")
    sources = {"queries": folder / "queries.jsonl", "docs": folder / "corpus.jsonl"}
    embed(tiny_folder, tmp_path / "vectors", **sources, precision="fp32")
    on_disk = evaluate(embeddings=tmp_path / "vectors", data=folder, cheaper=True)
    encoded = evaluate(tiny_folder, folder, precision="fp32", cheaper=True)
    assert on_disk.cheaper == encoded.cheaper and len(encoded.cheaper["rows"]) == 18


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Path]:
    """A search over 30 documents, as a folder, and what `kinvec embed` takes of it."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    texts = {f"d{i}": " ".join(WORDS[i : i + 4]) for i in range(30)}
    for name, ids in (("corpus", list(texts)), ("queries", ["d1", "d5", "d9"])):
        rows = (json.dumps({"_id": one, "text": texts[one]}) + "\n" for one in ids)
        (folder / f"{name}.jsonl").write_text("".join(rows))
    judged = "".join(f"d{i}\td{i + 1}\t1\n" for i in (1, 5, 9))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return {"data": folder, "queries": folder / "queries.jsonl", "docs": folder / "corpus.jsonl"}


@pytest.mark.parametrize(("stored", "m"), [("int8", 32), ("binary", 20), ("float16", 20), ("float32", 12)])
def test_documents_are_stored_small_and_score_as_they_are_stored(
    stored: str, m: int, small: dict[str, Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {side: small[side] for side in ("queries", "docs")}
    embed(tiny_folder, tmp_path / "full", **sources, precision="fp32")
    full, queries = (np.load(tmp_path / "full" / f"{side}.npy") for side in ("doc", "query"))
    ask = partial(embed, tiny_folder, tmp_path / "small", **sources, precision="fp32", stored=stored, dimensions=m)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kinvec.files.vectors.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ask()
    manifest = ask()
    assert (manifest["dimension"], manifest["stored"], manifest["similarity"]) == (m, stored, "dot")
    shard = np.load(tmp_path / "small" / "doc.npy")
    assert shard.nbytes == 30 * PRECISIONS[stored].bytes(m)
    cut, ends = _unit(full[:, :m]), np.load(tmp_path / "small" / "ranges.npy")
    np.testing.assert_array_equal(shard, PRECISIONS[stored].store(cut, ends))
    np.testing.assert_allclose(np.load(tmp_path / "small" / "query.npy"), _unit(queries[:, :m]), atol=1e-6)
    result = evaluate(embeddings=tmp_path / "small", data=small["data"], measures=["nDCG@10"])
    scores = _unit(queries[:, :m]).astype(np.float64) @ PRECISIONS[stored].restore(shard, ends).T.astype(np.float64)
    ids = [f"d{i}" for i in range(30)]
    for row, found in zip(scores, result.per_query["top_ids"], strict=True):
        assert found == _order(row, ids)[:10]


def test_storing_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(3)
    shards = [draw.normal(size=(n, 16)).astype(np.float32) for n in (20, 7)]
    paths = [tmp_path / f"doc-{i}.npy" for i in range(2)]
    for path, shard in zip(paths, shards, strict=True):
        np.save(path, shard)
    done: list[Path] = []

    def dying(path: Path, array: np.ndarray) -> None:
        if path == paths[1] and len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        np.save(path, array)

    ask = partial(quantising.store, paths, tmp_path / "ranges.npy", "int8", 12, _unit)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantising, "write_array", dying)
        ask()
    ask()
    ends = ranges_of(_unit(shard[:, :12]) for shard in shards)
    for path, shard in zip(paths, shards, strict=True):
        np.testing.assert_array_equal(np.load(path), to_int8(_unit(shard[:, :12]), ends))


def test_what_cannot_be_stored_is_said(
    main: Callable[..., tuple[int, str]], small: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    asked = ["embed", "--model", str(tiny_folder), "--out", str(tmp_path / "v"), "--queries", str(small["queries"])]
    docs = ["--docs", str(small["docs"])]
    for given, said in (
        ([*docs, "--stored", "int4"], "known are float32, float16, int8, binary"),
        (["--stored", "int8"], "add --docs"),
        ([*docs, "--dimensions", "64"], "gives vectors of 32 dimensions"),
        ([*docs, "--dimensions", "8", "--layout", "nemo"], "drop --layout"),
    ):
        code, told = main(*asked, *given)
        assert code == 2 and said in told, told
    assert main(*asked, *docs, "--stored", "int8")[0] == 0
    code, told = main(*asked, *docs, "--stored", "binary")
    assert code == 1 and "other settings" in told
    code, told = main("evaluate", "--embeddings", str(tmp_path / "v"), "--data", str(small["data"]), "--cheaper")
    assert code == 2 and "starts from float32" in told


def test_what_cannot_be_measured_is_said(
    main: Callable[..., tuple[int, str]], tiny_folder: Path, tiny_pairs: Path
) -> None:
    for given, said in (
        (["--cheaper", "--model", "bm25"], "leave it out here"),
        (["--dimension", "8", "--model", str(tiny_folder)], "add --cheaper"),
        (["--cheaper", "--dimension", "64", "--model", str(tiny_folder)], "have 32 dimensions; their first 64"),
        (["--cheaper", "--measure", "margin", "--model", str(tiny_folder)], "name a measure such as nDCG@10"),
    ):
        code, told = main("evaluate", "--data", str(tiny_pairs), *given)
        assert code == 2 and said in told, told


def test_a_run_measures_the_dimensions_it_trains_before_and_after(
    tiny_folder: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    settings = {"trainer.max_steps": 1, "trainer.batch_size": 8, "objective.dimensions": "[32,20]", "precision": "fp32"}
    given = settings | {
        "model": tiny_folder,
        "data.train": tiny_pairs,
        "data.test": tiny_pairs,
        "out": tmp_path / "run",
    }
    kinvec.train("scifact", [f"{key}={value}" for key, value in given.items()])
    for side in ("base", "tuned"):
        (result,) = tasks.load_results(tmp_path / "run" / "results" / side).values()
        rows = result.cheaper["rows"]
        assert {row["dimensions"] for row in rows} == {32, 20}
        assert rows[0]["metrics"]["nDCG@10"] == pytest.approx(result.metrics["nDCG@10"])


def test_the_dimensions_trained_are_tried_and_large_searches_wait_to_be_asked(tiny_folder: Path) -> None:
    model = Embedder.load(tiny_folder)
    assert trained_dimensions(model) == []
    model.lineage = [{"recipe": {"objective": {"dimensions": [32, 12]}}}]
    assert trained_dimensions(model) == [32, 12] and trained_dimensions(Words()) == []
    result = tasks.with_cheaper(problem(), Words(), dimensions=[64, 12])
    assert sorted({row["dimensions"] for row in result.cheaper["rows"]}) == [12, 64]
    assert small_enough(problem())
    many = replace(problem(), corpus=Corpus([""] * 100_001, [""] * 100_001))
    assert (
        not small_enough(many)
        and not small_enough(problem(), ["margin"])
        and not small_enough(PairData(["a"], ["b"], [1.0], ""))
    )
