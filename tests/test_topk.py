"""Exact top-k: equal to a full sort in trec_eval's order, whatever the blocks, the shards and the ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinvec import topk
from kinvec.contracts import KinvecError
from kinvec.topk import empty_best, keep_best, rank_ids, top_k


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """float16, and nothing by NumPy that a GPU holds; on the processor, so only that the numbers are right."""
    patch.setattr(topk, "_read", lambda tensor: tensor)
    patch.setattr(topk, "_product_type", lambda queries, rough, device: torch.float16 if rough else torch.float32)


def full_sort(queries: np.ndarray, documents: np.ndarray, ids: list[str], k: int) -> np.ndarray:
    scores = queries @ documents.T
    by_id = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
    return np.array([sorted(by_id, key=lambda j: -row[j])[:k] for row in scores], dtype=np.int64)


@settings(max_examples=150, deadline=None)
@given(
    q=st.integers(1, 9), n=st.integers(1, 60), k=st.integers(1, 12), rows=st.integers(1, 20), chunk=st.integers(1, 5),
    values=st.sampled_from([1, 2, 5]), cuts=st.lists(st.integers(0, 60), max_size=3), gpu=st.booleans(),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_equals_a_full_sort_with_ties_across_blocks_and_shards(
    q: int, n: int, k: int, rows: int, chunk: int, values: int, cuts: list[int], gpu: bool, seed: int
) -> None:
    """Small integers make products exact in any order, and ties everywhere, at rank k and across block boundaries."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-values, values + 1, (q, 3)).astype(np.float32)
    documents = rng.integers(-values, values + 1, (n, 3)).astype(np.float32)
    ids = [str(i) for i in rng.permutation(10 * n)[:n]]
    shards = np.split(documents, sorted(min(c, n) for c in cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "DOCUMENT_ROWS", rows)
        patch.setattr(topk, "QUERY_ROWS", chunk)
        if gpu:
            as_on_a_gpu(patch)
        scores, found = top_k(queries, iter(shards), ids, k)
    assert (found == full_sort(queries, documents, ids, k)).all()
    assert (scores == np.take_along_axis(queries @ documents.T, found, axis=1)).all()
    assert scores.dtype == np.float32 and scores.shape == (q, min(k, n))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(20, 200), d=st.integers(1, 400), rows=st.integers(1, 90), gpu=st.booleans(),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_equals_float64_to_the_last_bit_and_equal_documents_tie(
    n: int, d: int, rows: int, gpu: bool, seed: int
) -> None:
    """Whatever the blocks: a product's last bits would order copies of a document by where they stand."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(5, d)).astype(np.float32)
    documents = rng.normal(size=(n, d)).astype(np.float32)[rng.integers(0, n // 3, n)]
    ids = [str(i) for i in rng.permutation(n)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "DOCUMENT_ROWS", rows)
        patch.setattr(topk, "PAIR_ROWS", 7)
        if gpu:
            as_on_a_gpu(patch)
        scores, found = top_k(queries, [documents], ids, 10)
    exact = np.array([[np.dot(a.astype(np.float64), b.astype(np.float64)) for b in documents] for a in queries])
    by_id = sorted(range(n), key=ids.__getitem__, reverse=True)
    expected = np.array([sorted(by_id, key=lambda j: -np.float32(row[j]))[:10] for row in exact])
    assert (found == expected).all()
    assert (scores == np.take_along_axis(exact, expected, axis=1).astype(np.float32)).all()


@settings(max_examples=100, deadline=None)
@given(
    q=st.integers(1, 5), n=st.integers(1, 60), k=st.integers(1, 12), rows=st.integers(1, 30), chunk=st.integers(1, 5),
    values=st.sampled_from([1, 2, 5]), gpu=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_below_a_ceiling_it_equals_a_sort_of_what_is_below(
    q: int, n: int, k: int, rows: int, chunk: int, values: int, gpu: bool, seed: int
) -> None:
    """A score equal to the ceiling is within it; where fewer are left, places stay empty."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-values, values + 1, (q, 3)).astype(np.float32)
    documents = rng.integers(-values, values + 1, (n, 3)).astype(np.float32)
    ids = [str(i) for i in rng.permutation(10 * n)[:n]]
    ceilings = rng.integers(-values, values + 1, q).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "DOCUMENT_ROWS", rows)
        patch.setattr(topk, "QUERY_ROWS", chunk)
        if gpu:
            as_on_a_gpu(patch)
        scores, found = top_k(queries, [documents], ids, k, ceilings)
    every = full_sort(queries, documents, ids, n)
    for row in range(q):
        below = [j for j in every[row].tolist() if queries[row] @ documents[j] <= ceilings[row]][:k]
        empty = [-1] * (min(k, n) - len(below))
        assert found[row].tolist() == below + empty
        assert scores[row].tolist() == [*(queries[row] @ documents[j] for j in below), *(-np.inf for _ in empty)]


@pytest.mark.parametrize("product", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_documents_that_products_cannot_tell_apart_are_ordered_by_float64(product: str, shift: float) -> None:
    """Scores differ in the fifth digit, those of `shift` are all negative; ceilings fall between them."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 64))
    queries = (base + 0.01 * rng.normal(size=(40, 64))).astype(np.float32)
    documents = (base + 1e-4 * rng.normal(size=(3000, 64))).astype(np.float32)
    queries, documents = (np.c_[m, np.full(len(m), x, np.float32)] for m, x in ((queries, 8.0), (documents, shift)))
    exact = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    ceilings = np.quantile(exact, 0.9, axis=1).astype(np.float32)
    ids = [f"{i:04d}" for i in range(3000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "multiplies_bf16", lambda device: product == "bf16")
        if product == "fp16":
            as_on_a_gpu(patch)
        patch.setattr(topk, "DOCUMENT_ROWS", 512)
        patch.setattr(topk, "QUERY_ROWS", 16)
        open_top = top_k(queries, np.split(documents, 3), ids, 20)
        below = top_k(queries, np.split(documents, 3), ids, 20, ceilings)
    for (scores, found), limit in ((open_top, np.inf), (below, ceilings[:, None])):
        allowed = np.where(exact <= limit, exact, -np.inf)
        expected = np.array([np.lexsort((-np.arange(3000), -row))[:20] for row in allowed])
        assert (found == expected).all() and (scores == np.take_along_axis(exact, expected, axis=1)).all()


@settings(max_examples=60, deadline=None)
@given(
    q=st.integers(1, 30), b=st.integers(1, 50), d=st.integers(1, 400),
    product=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_no_product_is_off_by_more_than_its_bound(
    q: int, b: int, d: int, product: torch.dtype, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    queries, block = ((rng.standard_cauchy((rows, d)) * size).astype(np.float32) for rows in (q, b))
    if product == torch.float16:  # queries of length 1, documents up to LONGEST
        queries /= np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
        block *= min(1.0, topk.LONGEST / np.linalg.norm(block.astype(np.float64), axis=1).max())
    group = topk._group(queries, np.full(q, np.inf, np.float32), (product, topk.CPU))
    reduced, lengths, lost = topk._reduced(block, (product, topk.CPU))
    bound = topk._bound(group, float(lengths.max()), float(lost.max()), d)
    scores = torch.mm(group.reduced, reduced.T)
    off = np.abs(scores.double().numpy() - queries.astype(np.float64) @ block.astype(np.float64).T)
    assert (off <= bound[:, None] + topk._slack(scores.float().numpy(), scores.dtype)).all()


def test_float16_is_for_queries_of_length_one_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "multiplies_bf16", lambda device: True)
    unit, long = np.eye(3, dtype=np.float32), 5 * np.eye(3, dtype=np.float32)
    gpu = torch.device("cuda")
    assert (
        topk._product_type(unit, True, gpu) == torch.float16 and topk._product_type(long, True, gpu) == torch.bfloat16
    )
    assert topk._product_type(unit, True, topk.CPU) == torch.bfloat16
    assert topk._product_type(unit, False, gpu) == torch.float32
    as_on_a_gpu(monkeypatch)
    with pytest.raises(KinvecError, match="a document vector is 40,000 long, too long for float16; --device cpu"):
        top_k(unit, [40_000 * unit], list("abc"), 2)


@given(
    values=st.lists(st.tuples(st.integers(0, 4), st.floats(width=32, allow_nan=False)), max_size=40),
    k=st.integers(1, 5),
)
def test_the_kth_best_of_each_row(values: list[tuple[int, float]], k: int) -> None:
    rows, numbers = np.array([row for row, _ in values], np.int64), np.array([x for _, x in values], np.float32)
    found = topk._kth_best(rows, numbers, k, 5)
    for row in range(5):
        own = sorted((x for r, x in zip(rows, numbers, strict=True) if r == row), reverse=True)
        assert found[row] == (own[k - 1] if len(own) >= k else -np.inf)


def test_all_documents_equal_come_by_id_descending() -> None:
    ids = [f"d{i}" for i in range(1000)]
    _, found = top_k(np.ones((3, 4), np.float32), [np.ones((1000, 4), np.float32)], ids, 5)
    assert [ids[j] for j in found[0]] == ["d999", "d998", "d997", "d996", "d995"]
    assert (found == found[0]).all()


def test_documents_sorted_towards_the_query_all_displace_each_other() -> None:
    documents = np.arange(50_000, dtype=np.float32)[:, None]
    scores, found = top_k(np.ones((2, 1), np.float32), [documents], [str(i) for i in range(50_000)], 10)
    assert found[1].tolist() == list(range(49_999, 49_989, -1))
    assert scores[0, 0] == 49_999


def test_documents_that_cannot_be_told_apart_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of copies tie at the last place, or lie at a ceiling: no more are held than there is room for."""
    rng = np.random.default_rng(0)
    documents = np.repeat(rng.normal(size=(5, 16)).astype(np.float32), 2000, axis=0)[rng.permutation(10_000)]
    queries = rng.normal(size=(8, 16)).astype(np.float32)
    exact = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    ids, held = [f"{i:05d}" for i in range(10_000)], []
    add = topk._add
    monkeypatch.setattr(topk, "DOCUMENT_ROWS", 500)
    monkeypatch.setattr(topk, "_add", lambda group, *given: (held.append(topk._held(group)), add(group, *given))[1])
    for ceilings in (None, exact[:, 0].copy()):
        found = top_k(queries, [documents], ids, 10, ceilings)[1]
        allowed = exact if ceilings is None else np.where(exact <= ceilings[:, None], exact, -np.inf)
        assert (found == np.array([np.lexsort((-np.arange(10_000), -row))[:10] for row in allowed])).all()
    assert len(held) == 40 and max(held) <= 8 * topk.CROWD * topk.FEW < 8 * 2000


def test_ids_are_ordered_as_their_utf8_bytes() -> None:
    """trec_eval compares bytes with strcmp; code points, which Python compares, sort the same way in UTF-8."""
    ids = ["a", "ä", "z", "Z", "10", "9", "日", "😀", "ﬀ"]
    by_bytes = sorted(ids, key=str.encode, reverse=True)
    assert [ids[i] for i in np.argsort(rank_ids(ids))] == by_bytes


def test_memory_mapped_half_precision_shards_are_scored_in_float32(tmp_path: Path) -> None:
    documents = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float16)
    np.save(tmp_path / "doc.npy", documents)
    mapped = np.load(tmp_path / "doc.npy", mmap_mode="r")
    queries = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    scores, found = top_k(queries, [mapped[:100], mapped[100:]], [str(i) for i in range(300)], 7)
    exact = queries.astype(np.float64) @ documents.astype(np.float64).T
    assert np.allclose(scores, -np.sort(-exact, axis=1)[:, :7], atol=1e-5)
    assert np.allclose(np.take_along_axis(exact, found, axis=1), scores, atol=1e-5)


def test_scores_in_blocks_of_any_width_give_the_same_best() -> None:
    scores = np.random.default_rng(0).integers(0, 4, (5, 40)).astype(np.float32)
    rank = rank_ids([str(i) for i in range(40)])
    whole = keep_best(empty_best(5, 6), scores, 0, rank)
    parts = empty_best(5, 6)
    for start in range(0, 40, 7):
        parts = keep_best(parts, scores[:, start : start + 7], start, rank)
    assert (whole[0] == parts[0]).all() and (whole[1] == parts[1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_vector_is_named(value: float) -> None:
    documents = np.ones((6, 2), np.float32)
    documents[4, 1] = value
    with pytest.raises(KinvecError, match="document vector 4 holds NaN"):
        top_k(np.ones((1, 2), np.float32), [documents[:3], documents[3:]], list("abcdef"), 2)


def test_rows_and_ids_and_dimensions_must_match() -> None:
    one, two = np.ones((1, 2), np.float32), np.ones((2, 2), np.float32)
    with pytest.raises(KinvecError, match="2 document vectors but 3 document ids"):
        top_k(one, [two], list("abc"), 2)
    with pytest.raises(KinvecError, match="more document vectors than the 1"):
        top_k(one, [two], ["a"], 2)
    with pytest.raises(KinvecError, match="2 × 3, not rows of 2"):
        top_k(one, [np.ones((2, 3), np.float32)], ["a", "b"], 2)
