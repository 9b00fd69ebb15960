"""Tasks: rankings against pytrec_eval, BM25 at its published figure, a real model against sentence-transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from conftest import MINILM
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance
from test_metrics import PYTREC

from kinvec import files, tasks
from kinvec.contracts import Corpus, KinvecError, PairData, Qrels, RecipeError, Result, RetrievalData
from kinvec.tasks import evaluation, picture, triplets


class Words:
    """An encoder without a model: a bag of words, each word a fixed random direction. Equal bags give equal vectors."""

    name, prompts, precision = "words", {"query": "find: "}, "fp32"

    def __init__(self, dimension: int = 64) -> None:
        self.dimension = dimension
        self.calls: list[int] = []

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:4], "little")
        return np.random.default_rng(seed).normal(size=self.dimension)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(len(texts))
        vectors = [sum((self._word(w) for w in sorted(t.split())), np.zeros(self.dimension)) for t in texts]
        return np.array(vectors, dtype=np.float32).reshape(len(texts), self.dimension)

    encode_queries = encode_documents


def problem(qrels: Qrels | None = None, fingerprint: str = "tiny") -> RetrievalData:
    documents = {
        "d1": "the cat sat on the mat",
        "d2": "dogs chase cats",
        "d3": "stock markets fell today",
        "d4": "cat",
        "d5": "cat",
        "q1": "cat",
    }
    qrels = qrels or {"q1": {"d4": 2, "d1": 1}, "q2": {"d3": 1, "d2": 0}, "q3": {"d9": 1}}
    queries = {"q1": "cat", "q2": "markets today", "q3": "zebra", "q4": "never judged"}
    return RetrievalData(Corpus(list(documents), list(documents.values())), queries, qrels, fingerprint, "tiny", "test")


def test_every_judged_query_has_its_row_and_ties_come_by_id_descending() -> None:
    result = tasks.retrieval(problem(), Words(), ["nDCG@3", "RR@10", "R@1"])
    rows = result.per_query
    assert rows["id"] == ["q1", "q2", "q3"] and rows["query"] == ["cat", "markets today", "zebra"]
    assert rows["top_ids"][0][:3] == ["q1", "d5", "d4"], (
        "three equal texts; the query's own id is a result like any other"
    )
    assert rows["RR@10"] == [1 / 3, 1.0, 0.0]
    assert rows["first_relevant"] == [3, 1, None]
    assert rows["top_text"][1] == "stock markets fell today"
    assert rows["judged_ids"][0] == ["d4", "d1"] and rows["judged_scores"][0] == [2, 1]
    assert rows["top_scores"][0][:3] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert result.metrics["RR@10"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert (result.model, result.precision, result.prompts) == ("words", "fp32", {"query": "find: "})
    assert set(result.metrics) == {"nDCG@3", "RR@10", "R@1"} == set(result.baselines["BM25"])
    assert result.timing["encode_documents"] > 0 and "torch" in result.versions


def test_a_reader_finds_the_texts_and_the_similarities_of_what_a_ranking_names() -> None:
    data, words = problem(), Words()
    result = tasks.retrieval(data, words)
    rows, text = result.per_query, dict(zip(result.documents["id"], result.documents["text"], strict=True))
    met = {document for top in rows["top_ids"] for document in top}
    assert met <= set(text) and all(text[key] == data.corpus.texts[data.corpus.ids.index(key)] for key in text)
    assert rows["judged_ids"][1] == ["d3", "d2"] and rows["judged_similarities"][2] == [None], "d9 is not there"
    asked = evaluation.unit(words.encode_documents(["markets today"]))
    found = evaluation.unit(words.encode_documents(["stock markets fell today", "dogs chase cats"]))
    assert rows["judged_similarities"][1] == pytest.approx((found @ asked[0]).tolist(), abs=1e-6)


def test_queries_and_documents_have_places_in_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"w{number}" for number in range(40)]
    data = RetrievalData(
        Corpus(names, [f"{name} and more" for name in names]), {f"q{i}": names[i] for i in range(20)},
        {f"q{i}": {names[2 * i]: 1} for i in range(20)}, "places", "places", "test",
    )  # fmt: skip
    whole = tasks.retrieval(data, Words())
    monkeypatch.setattr(evaluation, "ENCODE_ROWS", 7)
    windows = tasks.retrieval(data, Words())
    assert windows.per_query["pca_x"] == pytest.approx(whole.per_query["pca_x"], abs=1e-4)
    assert None not in whole.documents["pca_y"] and len(whole.documents["pca_y"]) == 40
    spread = np.var(whole.per_query["pca_x"] + whole.documents["pca_x"])
    assert spread > np.var(whole.per_query["pca_y"] + whole.documents["pca_y"])
    monkeypatch.setattr(picture, "PICTURED", 30)
    monkeypatch.setattr(picture, "QUERIES", 4)
    few = tasks.retrieval(data, Words())
    drawn = [place for place, x in zip(few.documents["id"], few.documents["pca_x"], strict=True) if x is not None]
    assert sum(x is not None for x in few.per_query["pca_x"]) == 4 and len(drawn) <= 30
    chosen = [grades for grades, x in zip(few.per_query["judged_ids"], few.per_query["pca_x"], strict=True) if x]
    assert {grades[0] for grades in chosen} <= set(drawn), "a query is drawn with its relevant document"


def test_equal_to_pytrec_eval_on_the_raw_cosines() -> None:
    data, words = problem(), Words()
    asked, found = (words.encode_documents(t) for t in ([data.queries[q] for q in data.qrels], data.corpus.texts))
    scores = asked @ found.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(found, axis=1)
    run = {q: dict(zip(data.corpus.ids, map(float, scores[i]), strict=True)) for i, q in enumerate(data.qrels)}
    theirs = pytrec_eval.RelevanceEvaluator(data.qrels, {"ndcg_cut_3", "map_cut_3", "recall_5"}).evaluate(run)
    ours = tasks.retrieval(data, words, ["nDCG@3", "AP@3", "R@5"]).per_query
    for name, key in {"nDCG@3": "ndcg_cut_3", "AP@3": "map_cut_3", "R@5": "recall_5"}.items():
        assert ours[name] == pytest.approx([theirs[q][key] for q in data.qrels], abs=1e-7)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["cat", "cat sat", "dog", "the dog", "rain falls", "a", "zebra"]), min_size=1, max_size=9),
    st.dictionaries(
        st.sampled_from(["q1", "q2", "q3"]),
        st.dictionaries(st.sampled_from([f"d{i}" for i in range(10)]), st.integers(0, 3), min_size=1), min_size=1,
    ),
)  # fmt: skip
def test_equal_to_pytrec_eval_with_equal_texts_graded_and_missing_documents(texts: list[str], qrels: Qrels) -> None:
    ids = [f"d{i}" for i in range(len(texts))]
    queries = {"q1": "cat", "q2": "the dog", "q3": "rain"}
    found = tasks.retrieval(
        RetrievalData(Corpus(ids, texts), queries, qrels, "f"), Words(), list(PYTREC), baseline=False
    )
    asked, vectors = (Words().encode_documents(t).astype(float) for t in ([queries[q] for q in qrels], texts))
    cosine = asked @ vectors.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    run = {q: dict(zip(ids, cosine[i].round(5).tolist(), strict=True)) for i, q in enumerate(qrels)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(PYTREC.values())).evaluate(run)
    for name, key in PYTREC.items():
        assert found.per_query[name] == pytest.approx([theirs[q][key] for q in qrels], abs=1e-6), name


def test_a_corpus_in_windows_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tasks.retrieval(problem(), Words())
    monkeypatch.setattr(evaluation, "ENCODE_ROWS", 2)
    words = Words()
    assert tasks.retrieval(problem(), words).per_query == whole.per_query
    assert words.calls == [3, 2, 2, 2]


def test_a_grade_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(KinvecError, match=r"query 'q1' judges document 'd4' as 3000000000; a grade is small"):
        tasks.retrieval(problem({"q1": {"d1": 1, "d4": 3_000_000_000}}), Words())


def test_vectors_made_elsewhere_are_joined_by_id_and_give_the_same_result() -> None:
    data, words = problem(), Words()
    order = [4, 0, 5, 2, 1, 3]
    ids, vectors = [data.corpus.ids[i] for i in order], words.encode_documents(data.corpus.texts)[order]
    asked = words.encode_queries(list(data.queries.values())[::-1])
    queries, documents = (list(data.queries)[::-1], [asked]), (ids, [vectors[:4], vectors[4:]])
    assert tasks.from_vectors(data, queries, documents, similarity="cosine").per_query == (
        tasks.retrieval(data, words).per_query
    )
    with pytest.raises(KinvecError, match="query 'q1'"):
        tasks.from_vectors(data, (queries[0][:-1], [asked[:-1]]), documents)
    with pytest.raises(KinvecError, match="the document 'd4'"):
        tasks.from_vectors(data, queries, (ids[:-1], [vectors[:-1]]))


def test_a_dot_product_model_is_scored_by_dot_products() -> None:
    texts = Corpus(["short", "long"], ["cat", "cat cat cat sat"])
    data = RetrievalData(texts, {"q": "cat"}, {"q": {"short": 1}}, "lengths", "lengths", "test")
    words = Words()
    assert tasks.retrieval(data, words).per_query["top_ids"] == [["short", "long"]], "by cosine where nothing is said"
    words.similarity = "dot"  # type: ignore[attr-defined]
    assert tasks.retrieval(data, words).per_query["top_ids"] == [["long", "short"]]
    words.similarity = "manhattan"  # type: ignore[attr-defined]
    with pytest.raises(KinvecError, match="'manhattan'"):
        tasks.retrieval(data, words)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 2)), min_size=1, max_size=6), min_size=1, max_size=5)
)
def test_margins_are_those_of_all_triplets_counted_one_by_one(judged: list[list[tuple[int, int]]]) -> None:
    """Pair by pair, with documents in blocks of two and not in the judgements' order; None without a triplet."""
    qrels = {f"q{i}": {f"d{document}": grade for document, grade in grades} for i, grades in enumerate(judged)}
    draw = np.random.default_rng(0)
    documents, queries = draw.normal(size=(6, 3)), draw.normal(size=(len(qrels), 3))
    mixed = [{grade > 0 for grade in grades.values()} == {True, False} for grades in qrels.values()]
    assert triplets.have_triplets(qrels) == any(mixed)
    pairs = triplets.Pairs(qrels, [f"d{i}" for i in range(6)])
    blocks = list(pairs.passing(queries, (documents[i : i + 2] for i in range(0, 6, 2))))
    assert (np.concatenate(blocks) == documents).all()
    found = pairs.columns(triplets.TRIPLETS)
    for query, grades in enumerate(qrels.values()):
        cosine = {d: 1 - distance.cosine(queries[query], documents[int(d[1:])]) for d in grades}
        margins = [cosine[p] - cosine[n] for p in grades for n in grades if grades[p] > 0 >= grades[n]]
        if not margins:
            assert found["margin"][query] is None and found["triplet_accuracy"][query] is None
            continue
        assert found["margin"][query] == pytest.approx(np.mean(margins))
        assert found["triplet_accuracy"][query] == np.mean(np.array(margins) > 0)


def test_a_query_without_a_triplet_counts_in_no_mean_of_margins(tmp_path: Path) -> None:
    qrels: Qrels = {"q1": {"d4": 2, "d3": 0}, "q2": {"d3": 1, "d2": 0, "d1": 0}, "q3": {"d3": 1}}
    a, b = (tasks.retrieval(problem(qrels), Words(size), baseline=False) for size in (64, 8))
    assert list(a.metrics)[-2:] == ["margin", "triplet_accuracy"] and a.per_query["margin"][2] is None
    assert a.metrics["margin"] == pytest.approx(np.mean(a.per_query["margin"][:2]))
    tasks.save_result(a, tmp_path / "a")
    assert tasks.load_result(tmp_path / "a") == a
    found = {d.metric: d for d in tasks.compare(a, b, by="margin").metrics}["margin"]
    assert (found.won + found.tied + found.lost, found.low <= found.difference <= found.high) == (2, True)
    assert {change.id for change in tasks.compare(a, b, by="margin").losses} <= {"q1", "q2"}
    alone = tasks.retrieval(problem(qrels), Words(), ["margin"])
    assert alone.metrics == {"margin": a.metrics["margin"]} and not alone.baselines
    assert list(tasks.retrieval(problem(qrels), Words(), ["RR@10"], baseline=False).metrics) == ["RR@10"]
    assert "margin" not in tasks.retrieval(problem({"q1": {"d4": 2}}), Words(), baseline=False).metrics
    with pytest.raises(RecipeError, match="margin needs negatives"):
        tasks.retrieval(problem({"q1": {"d4": 2}}), Words(), ["RR@10", "margin"])


def test_nli_gives_margins_that_sentence_transformers_confirms(
    shared_data: Path, minilm_folder: Path, tmp_path: Path, main: Callable[..., tuple[int, str]]
) -> None:
    from sentence_transformers import SentenceTransformer

    for part in ("s1", "s2", "labels"):
        lines = (shared_data / "snli" / f"{part}.test").read_text("utf-8").splitlines()[:90]
        (tmp_path / f"{part}.test").write_text("\n".join(lines) + "\n")
    code, said = main(
        "evaluate", "--model", MINILM, "--data", str(tmp_path), "--precision", "fp32", "--out", str(tmp_path / "out")
    )
    assert code == 0 and "triplet_accuracy" in said
    result, table = tasks.load_result(tmp_path / "out"), files.open_data(tmp_path, split="test")
    model = SentenceTransformer(str(minilm_folder), device="cpu")
    expected = []
    for example in (table.example(row) for row in range(len(table))):
        if example.negatives:
            query = model.encode(example.query)
            sides = (list(example.positives), list(example.negatives))
            near, far = (model.similarity(query, model.encode(side))[0] for side in sides)
            expected.append(float((near[:, None] - far).mean()))
    assert len(expected) > 15 and result.metrics["margin"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_nothing_to_search_is_an_error_and_so_is_an_unknown_measure() -> None:
    with pytest.raises(RecipeError, match="unknown measure 'ndcg'"):
        tasks.retrieval(problem(), Words(), ["ndcg"])
    none = RetrievalData(Corpus([], []), {"q": "x"}, {"q": {"d": 1}}, "f", "none", "test")
    with pytest.raises(KinvecError, match="no documents"):
        tasks.retrieval(none, Words())
    with pytest.raises(KinvecError, match="the query 'q7' is judged but has no text"):
        tasks.retrieval(problem({"q7": {"d1": 1}}), Words())
    with pytest.raises(KinvecError, match="split 'test' is judged"):
        tasks.bm25(RetrievalData(Corpus(["d"], ["x"]), {}, {}, "unjudged", "none", "test"))


def test_a_model_that_gives_nan_is_named() -> None:
    class Broken(Words):
        def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
            return np.full((len(texts), 64), np.nan, np.float32)

    with pytest.raises(KinvecError, match="NaN"):
        tasks.retrieval(problem(), Broken())
    with pytest.raises(KinvecError, match="words gave NaN"):
        tasks.similarity(PairData(["a"], ["b"], [1.0], "f", "p"), Broken())


def test_bm25_finds_words_by_their_stem_and_nothing_without_one_in_common() -> None:
    rows = tasks.bm25(problem(fingerprint="stems")).per_query
    assert rows["top_ids"][0] == ["q1", "d5", "d4", "d2", "d1"], "'cat' finds 'cats'; equal texts by id descending"
    assert rows["top_ids"][2] == [] and rows["top_text"][2] == "" and rows["nDCG@10"][2] == 0.0
    wordless = RetrievalData(Corpus(["a", "b"], ["!!", ""]), {"q": "x"}, {"q": {"a": 1}}, "wordless", "w", "test")
    assert tasks.bm25(wordless).metrics["R@10"] == 0.0


def test_bm25_is_made_once_for_the_same_data() -> None:
    data = problem(fingerprint="once")
    assert tasks.bm25(data) is tasks.bm25(data)
    assert tasks.bm25(data, ["P@1"]) is not tasks.bm25(data)


def test_similarity_keeps_every_pair() -> None:
    first = ["a cat", "a dog", "a bird sings", "a fish"]
    data = PairData(first, ["cat a", "the dog", "stones fall", "one fish"], [5.0, 3.0, 0.0, 3.0], "f", "pairs", "test")
    result = tasks.similarity(data, Words())
    rows = result.per_query
    assert rows["cosine"][0] == pytest.approx(1.0) and rows["score"] == [5.0, 3.0, 0.0, 3.0]
    assert result.metrics["spearman_cosine"] == pytest.approx(stats.spearmanr(rows["cosine"], rows["score"]).statistic)
    assert result.metrics["pearson_cosine"] == pytest.approx(stats.pearsonr(rows["cosine"], rows["score"]).statistic)
    with pytest.raises(KinvecError, match="no pairs"):
        tasks.similarity(PairData([], [], [], "f", "none"), Words())


def test_evaluation_leaves_random_states_alone() -> None:
    """Of NumPy and torch, which training draws from. (The shape checker of the tests itself draws from `random`.)"""
    import torch

    np.random.seed(1)
    torch.manual_seed(1)
    expected = float(np.random.rand()), float(torch.rand(1))
    np.random.seed(1)
    torch.manual_seed(1)
    data = problem(fingerprint="state")
    tasks.compare(tasks.retrieval(data, Words()), tasks.retrieval(data, Words(8)))
    assert (float(np.random.rand()), float(torch.rand(1))) == expected


# --- On disk --------------------------------------------------------------------------------------------------------


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    result = tasks.retrieval(problem(), Words())
    folder = tasks.save_result(result, tmp_path / "out" / "base")
    assert tasks.load_result(folder) == result
    head = json.loads((folder / "results.json").read_text())
    assert head["metrics"] == result.metrics and head["queries"] == 3 and head["baselines"]["BM25"]
    assert sorted(p.name for p in folder.iterdir()) == ["documents.parquet", "per_query.parquet", "results.json"]
    pairs = tasks.similarity(PairData(["a", "b"], ["a", "c"], [1.0, 0.0], "f", "p"), Words())
    assert tasks.load_result(tasks.save_result(pairs, folder)) == pairs, "a result may be replaced by another"


def test_a_half_written_result_is_none(tmp_path: Path) -> None:
    result = tasks.retrieval(problem(), Words())
    tasks.save_result(result, tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(KinvecError, match="no finished result"):
        tasks.load_result(tmp_path)
    tasks.save_result(result, tmp_path)
    (tmp_path / "per_query.parquet").write_bytes(b"PAR1 and then the disk was full")
    with pytest.raises(KinvecError, match="does not read"):
        tasks.load_result(tmp_path)


def test_a_crash_between_the_two_files_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tasks.retrieval(problem(), Words()), tasks.retrieval(problem(), Words(8))
    tasks.save_result(old, tmp_path)
    monkeypatch.setattr("kinvec.tasks.stored.write_json", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        tasks.save_result(new, tmp_path)
    with pytest.raises(KinvecError, match="no finished result"):
        tasks.load_result(tmp_path)


def test_a_folder_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(KinvecError, match=r"thesis\.tex"):
        tasks.save_result(tasks.retrieval(problem(), Words()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_results_of_a_run_are_found_by_task(tmp_path: Path) -> None:
    result = tasks.retrieval(problem(), Words())
    tasks.save_result(result, tmp_path / "base" / "tiny")
    assert tasks.load_results(tmp_path / "base") == tasks.load_results(tmp_path / "base" / "tiny") == {"tiny": result}
    with pytest.raises(KinvecError, match="no result"):
        tasks.load_results(tmp_path)


# --- Real data and a real model -------------------------------------------------------------------------------------


def test_bm25_reaches_its_published_figure_on_scifact(shared_data: Path) -> None:
    from kinvec.files import open_retrieval

    assert tasks.bm25(open_retrieval(shared_data / "scifact", split="test")).metrics["nDCG@10"] == pytest.approx(
        0.686, abs=0.002
    )


def test_a_real_model_agrees_with_sentence_transformers(shared_data: Path, minilm_folder: Path) -> None:
    """12 queries of SciFact over its shortest documents and their own: our figures are those of the peer's vectors."""
    from sentence_transformers import SentenceTransformer

    from kinvec import Embedder
    from kinvec.files import open_retrieval

    whole = open_retrieval(shared_data / "scifact", split="test")
    qrels = dict(list(whole.qrels.items())[:12])
    text = dict(zip(whole.corpus.ids, whole.corpus.texts, strict=True))
    kept = list(
        dict.fromkeys([*sorted(text, key=lambda d: len(text[d]))[:40], *(d for j in qrels.values() for d in j)])
    )
    data = RetrievalData(Corpus(kept, [text[d] for d in kept]), whole.queries, qrels, "slice", "slice", "test")
    ours: Result = tasks.retrieval(data, Embedder.load(MINILM, precision="fp32", device="cpu"))
    peer = SentenceTransformer(str(minilm_folder), device="cpu")
    scores = peer.encode([data.queries[q] for q in qrels]) @ peer.encode(data.corpus.texts).T
    run = {q: dict(zip(kept, map(float, scores[i]), strict=True)) for i, q in enumerate(qrels)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_10"}).evaluate(run)
    assert ours.per_query["nDCG@10"] == pytest.approx([theirs[q]["ndcg_cut_10"] for q in qrels], abs=1e-6)
    assert ours.per_query["R@10"] == pytest.approx([theirs[q]["recall_10"] for q in qrels], abs=1e-6)
    assert ours.precision == "fp32"
