"""Exact top-k search in bounded memory: products choose candidates, float64 decides, ties in trec_eval's order.

Blocks of queries and documents are multiplied in bf16 where the processor does that (a third of the time of float32),
on a GPU in float16 where queries have length 1, else, and below ceilings, in float32. A product is off by no more than
its stated bound, so whatever could be among the k best by product plus bound is a candidate; candidates are scored
again in float64, pair by pair, and rounded to float32. The last bits of a product depend on the processor, the threads
and the shape of the block; rankings do not, and equal documents score equally.

The order is total: higher score first; among equal scores the id that is *greater* as a string first. That is how
trec_eval, and pytrec_eval with it, reads a run (`comp_sim_docno` compares float32 scores, then document names in
descending order), so the lists made here and the metrics computed from their scores agree to the last tie.

Shapes: q = queries, n = documents, s = documents of a shard, b = documents of a block, d = dimensions, k = results kept
for each query, c = candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from kinvec import distributed
from kinvec.contracts import KinvecError
from kinvec.distributed import CPU
from kinvec.machine import forget, multiplies_bf16

DOCUMENT_ROWS = 16_384  # b; a block of scores is at most QUERY_ROWS × DOCUMENT_ROWS, 16 MiB in bf16
QUERY_ROWS = 512
GPU_ROWS = 4  # times as many of both on a GPU: 256 MiB a block
SIDE_BY_SIDE = 4  # groups of queries looked at at a time, at most: each holds a block of scores
PAIR_ROWS = 16_384  # query-document pairs scored in float64 at a time
CROWD, FEW = 4, 64  # a group holds so many times k candidates a query, FEW at the least, before they are thinned
CANDIDATE_BYTES, BEST_BYTES = 20, 12  # two rows and a score; a row and a score
FP32, TINY = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny)
ROUNDED = {
    torch.bfloat16: (1.01 * 2.0**-8, 0.0),
    torch.float16: (1.01 * 2.0**-11, 2.0**-24),
    torch.float32: (FP32, 0.0),
}  # what rounding a number changes, as a share of the result; and a result near zero, at most
LONGEST = 2.0**15  # of a document in float16, so that no score overflows

Best = tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]


def top_k(
    queries: Float[np.ndarray, "q d"], documents: Iterable[np.ndarray], ids: Sequence[str] | Int64[np.ndarray, " n"],
    k: int, ceilings: Float32[np.ndarray, " q"] | None = None, advance: Callable[[int], None] = lambda rows: None,
    device: torch.device = CPU,
) -> Best:  # fmt: skip
    """The k documents with the largest inner product for each query, best first; with `ceilings`, of those up to them.

    `documents` are the shards [s, d] of one matrix in the order of `ids`: `[matrix]`, memory-mapped files, or a
    generator that encodes as it goes; of a shard only one block of rows and its scores are held at a time, and its
    candidates. `advance` is told the rows of every block. Of several processes each does a share of the queries where
    the shards are files. Products are computed on `device`, with the same result. Returns the scores and the rows'
    indices, both [q, min(k, n)]; minus infinity and −1 where fewer are below the ceiling.

    Who searches the same documents again gives their ranks (`rank_ids`) as `ids`: to sort a million takes as long as to
    answer a query.

    Raises `KinvecError` where a vector holds NaN or infinity, dimensions differ, or there are more rows or more ids.
    """
    tie_rank = ids if isinstance(ids, np.ndarray) else rank_ids(ids)
    queries = _checked(queries, queries.shape[1], "query", 0)
    highest = np.full(len(queries), np.inf, np.float32) if ceilings is None else ceilings
    reduced, files = _product_type(queries, ceilings is None, device), _files(documents)
    count = distributed.helpers(len(queries)) if files else 1
    parts = list(zip(np.array_split(queries, count), np.array_split(highest, count), strict=True))
    found = distributed.shared(
        lambda part: _best(part, documents, tie_rank, k, (reduced, device), advance),
        parts,
        partial(_best_of_files, files=files, tie_rank=tie_rank, k=k, how=(reduced, device)) if files else None,
    )
    scores, rows = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(rows)


Part = tuple[Float32[np.ndarray, "p d"], Float32[np.ndarray, " p"]]
"""Some of the queries, and their ceilings."""
How = tuple[torch.dtype, torch.device]
"""What vectors are multiplied as, and where."""


def _product_type(queries: Float32[np.ndarray, "q d"], rough: bool, device: torch.device) -> torch.dtype:
    """Not `rough` it is float32: a ceiling may lie where documents are dense, and too many would be near it otherwise.

    float16 has an eighth of the error of bf16, so fewer candidates, but a small range.
    """
    if not rough or not multiplies_bf16(device):
        return torch.float32
    unit = np.linalg.norm(queries, axis=1).max(initial=0.0) <= 1.01
    return torch.float16 if device.type == "cuda" and unit else torch.bfloat16


def _best(
    part: Part, documents: Iterable[np.ndarray], tie_rank: Int64[np.ndarray, " n"], k: int, how: How,
    advance: Callable[[int], None] = lambda rows: None,
) -> Best:  # fmt: skip
    (queries, highest), n = part, len(tie_rank)
    best = empty_best(len(queries), min(k, n))
    at_once = QUERY_ROWS * _larger(how[1])
    rows_of = [slice(q, q + at_once) for q in range(0, len(queries), at_once)]
    groups = [_group(queries[rows], highest[rows], how) for rows in rows_of]
    start = 0
    for shard in documents:
        if start + len(shard) > n:
            raise KinvecError(f"there are more document vectors than the {n:,} document ids; write them again")
        if best[0].size:
            _search(groups, rows_of, best, shard, start, tie_rank, advance)
        start += len(shard)
    if start != n:
        raise KinvecError(f"there are {start:,} document vectors but {n:,} document ids; write them again")
    return best


def _files(documents: Iterable[np.ndarray]) -> list[str]:
    """The files of memory-mapped shards, for other processes to open; none where a shard is no whole file."""
    if not isinstance(documents, list) or not all(isinstance(shard, np.memmap) for shard in documents):
        return []
    names = [str(shard.filename) for shard in documents]
    whole = [np.load(name, mmap_mode="r").shape for name in names]
    return names if whole == [shard.shape for shard in documents] else []


def _best_of_files(part: Part, files: Sequence[str], how: How, **given: Any) -> Best:
    """For another process, which has a GPU of its own."""
    own = how[0], torch.device(how[1].type)
    return _best(part, [np.load(name, mmap_mode="r") for name in files], how=own, **given)


def multiplies_on(encoder: object) -> torch.device:
    """The GPU that a model runs on; the CPU for any other, and for what says nothing."""
    device = getattr(encoder, "device", CPU)
    return device if isinstance(device, torch.device) and device.type == "cuda" else CPU


def rank_ids(ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Each id's place when ids are sorted in descending order: the smaller rank wins a tie."""
    texts = list(ids)  # they may be lazy, and sorting asks for each
    descending = sorted(range(len(texts)), key=texts.__getitem__, reverse=True)
    rank = np.empty(len(ids), dtype=np.int64)
    rank[descending] = np.arange(len(ids))
    return rank


def empty_best(q: int, k: int) -> Best:
    """Scores of minus infinity and indices of −1: what `keep_best` starts from."""
    return np.full((q, k), -np.inf, dtype=np.float32), np.full((q, k), -1, dtype=np.int64)


def keep_best(best: Best, scores: Float32[np.ndarray, "q b"], start: int, tie_rank: Int64[np.ndarray, " n"]) -> Best:
    """The best k of `best` and of the block of exact `scores`, whose columns are the documents from row `start` on."""
    if best[0].shape[1] == 0:
        return best
    row, column = np.nonzero(scores >= best[0][:, -1:])  # one that equals the k-th best may enter, by its id
    return _merged(best, row, start + column, scores[row, column], tie_rank)


def pair_scores(
    queries: np.ndarray, documents: np.ndarray, row: Int64[np.ndarray, " p"], column: Int64[np.ndarray, " p"]
) -> Float32[np.ndarray, " p"]:
    """Inner products of the pairs (query, document), in float64, rounded: as `top_k` scores them."""
    scores = np.empty(len(row), dtype=np.float32)
    for start in range(0, len(row), PAIR_ROWS):
        pairs = slice(start, start + PAIR_ROWS)
        scores[pairs] = np.einsum("pd,pd->p", queries[row[pairs]], documents[column[pairs]], dtype=np.float64)
        forget(documents)
    return scores


# --- Candidates -----------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Queries that are multiplied at a time, and the documents of the shard that may be among their k best.

    `floor` is never above the exact score of the query's k-th best so far; `error` is the largest bound of any product
    so far. Candidates are rows of the group, rows of the shard, and scores by product.
    """

    vectors: Float32[np.ndarray, "q d"]
    reduced: Tensor
    lengths: Float32[np.ndarray, " q"]
    lost: Float32[np.ndarray, " q"]
    highest: Float32[np.ndarray, " q"]
    floor: Float32[np.ndarray, " q"]
    error: Float32[np.ndarray, " q"]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _group(vectors: Float32[np.ndarray, "q d"], highest: Float32[np.ndarray, " q"], how: How) -> _Group:
    lowest, none = np.full(len(vectors), -np.inf, np.float32), np.zeros(len(vectors), np.float32)
    return _Group(vectors, *_reduced(vectors, how), highest, lowest, none, [])


def _reduced(vectors: Float32[np.ndarray, "m d"], how: How) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The vectors as they are multiplied, their lengths, and the lengths of what rounding took from them."""
    whole = torch.from_numpy(vectors).to(how[1])
    reduced = whole.to(how[0])
    lengths, lost = torch.linalg.vector_norm(whole, dim=1), torch.linalg.vector_norm(whole - reduced.float(), dim=1)
    return reduced, lengths.cpu().numpy(), lost.cpu().numpy()


def _read(tensor: Tensor) -> Any:
    """As an array of NumPy's, unless a GPU holds it: that compares and finds up to eight times as fast as torch."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _larger(device: torch.device) -> int:
    return 1 if device.type == "cpu" else GPU_ROWS


def _search(
    groups: Sequence[_Group], parts: Sequence[slice], best: Best, shard: np.ndarray, start: int,
    tie_rank: Int64[np.ndarray, " n"], advance: Callable[[int], None],
) -> None:  # fmt: skip
    """The shard's documents, which are those from row `start` on, compete in `best`; `parts` are the groups' rows."""
    k, d, how = best[0].shape[1], groups[0].vectors.shape[1], (groups[0].reduced.dtype, groups[0].reduced.device)
    at_once = DOCUMENT_ROWS * _larger(how[1])

    def look(rows: slice, group: _Group, reduced: Tensor, longest: float, most_lost: float, first: int) -> None:
        error = _bound(group, longest, most_lost, d)
        group.error = np.maximum(group.error, error)
        _add(group, torch.mm(group.reduced, reduced.T), error, first, k)
        if _held(group) > _crowd(group, k):  # documents that products cannot tell apart
            _decide(group, rows, best, shard, start, tie_rank)

    with _sums_in_float32(), _side_by_side(parts, groups) as each:
        for first in range(0, len(shard), at_once):
            block = _checked(shard[first : first + at_once], d, "document", start + first)
            reduced, lengths, lost = _reduced(block, how)
            if how[0] == torch.float16 and lengths.max(initial=0) > LONGEST:
                raise KinvecError(f"a document vector is {lengths.max():,.0f} long, too long for float16; --device cpu")
            each(look, reduced, float(lengths.max(initial=0)), float(lost.max(initial=0)), first)
            forget(shard)
            advance(len(block))
        each(lambda rows, group: _decide(group, rows, best, shard, start, tie_rank))


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """On a GPU torch may add parts of a half-precision product in half precision, which no bound here allows for."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction = before


@contextmanager
def _side_by_side(parts: Sequence[slice], groups: Sequence[_Group]) -> Iterator[Callable[..., None]]:
    """`each(work, …)` calls work(rows, group, …) for every group, several groups at a time, each on a few threads.

    So the threads that look at candidates, one a group, do not wait for each other as those of one product do.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(SIDE_BY_SIDE, threads, len(groups)))

    def run(number: int, work: Callable[..., None], given: tuple[Any, ...]) -> None:
        torch.set_num_threads(threads // workers)  # of this thread's products
        for rows, group in zip(parts[number::workers], groups[number::workers], strict=True):
            work(rows, group, *given)

    def each(work: Callable[..., None], *given: Any) -> None:
        for done in [pool.submit(run, number, work, given) for number in range(workers)]:
            done.result()

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield each
        finally:
            torch.set_num_threads(threads)


def _held(group: _Group) -> int:
    return sum(len(part[0]) for part in group.found)


def _crowd(group: _Group, k: int) -> int:
    return CROWD * max(k, FEW) * len(group.vectors)


def _bound(group: _Group, longest: float, most_lost: float, d: int) -> Float32[np.ndarray, " q"]:
    """The most that a product with any document of a block is off by before it is rounded.

    What rounding took from either side, |a·b − â·b̂| ≤ ‖a − â‖‖b‖ + ‖â‖‖b − b̂‖; and what the sum in float32 adds, twice
    the bound d · u · ‖a‖‖b‖ (Higham 2002, eq. 3.5).
    """
    rounded = group.lost * (longest + most_lost) + (group.lengths + group.lost) * most_lost
    flushed = d * TINY * (group.lengths + longest + 1)  # bf16 products take what is smaller than that for zero
    return (rounded + 2 * d * FP32 * (group.lengths + group.lost) * (longest + most_lost) + flushed).astype(np.float32)


def _add(group: _Group, scores: Tensor, error: Float32[np.ndarray, " q"], first: int, k: int) -> None:
    """What of a block may be among the k best joins the candidates; where that is too much, the floor rises first."""
    crowd = _crowd(group, k)
    if np.isneginf(group.floor).any():  # all would be found; a part of the block tells enough
        _raise_floor(group, scores[:, : max(k + 1, scores.shape[1] // 2)], error, k)
    places = _within(group, scores, error)
    if len(places) > crowd:  # documents sorted towards the queries
        _raise_floor(group, scores, error, k)
        places = _within(group, scores, error)
    row, column = np.divmod(places, scores.shape[1])
    found = scores.view(-1)[torch.from_numpy(places).to(scores.device)]
    group.found.append((row, first + column, found.float().cpu().numpy()))
    if _held(group) > crowd:
        _thin(group, k)


def _within(group: _Group, scores: Tensor, error: Float32[np.ndarray, " q"]) -> Int64[np.ndarray, " c"]:
    """Places in the block, row after row, of what may reach the floor and may be below the ceiling."""
    reaches = _at_least(scores, group.floor - error)
    if np.isfinite(group.highest).any():
        values = _read(scores.float())
        reaches &= values - _slack(values, scores.dtype) <= _beside(group.highest + error, scores)
    if isinstance(reaches, np.ndarray):
        return np.flatnonzero(reaches)
    return reaches.view(-1).nonzero()[:, 0].cpu().numpy()


def _beside(values: Float32[np.ndarray, " q"], scores: Tensor) -> Any:
    """A number for each row of the scores."""
    return _read(torch.from_numpy(values).to(scores.device))[:, None]


def _slack(found: Any, dtype: torch.dtype) -> Any:
    """What rounding a product may have changed."""
    share, least = ROUNDED[dtype]
    return abs(found) * share + least if least else abs(found) * share


def _raise_floor(group: _Group, scores: Tensor, error: Float32[np.ndarray, " q"], k: int) -> None:
    """The floor rises to what k documents of the block surely reach."""
    if scores.shape[1] <= k:
        return
    values = _read(scores.float())
    slack = _slack(values, scores.dtype)
    either = np if isinstance(values, np.ndarray) else torch
    surely = either.where(values + slack <= _beside(group.highest - error, scores), values - slack, -np.inf)
    if isinstance(surely, np.ndarray):
        kth = np.partition(surely, -k, axis=1)[:, -k]
    else:
        kth = surely.topk(k, sorted=False).values.amin(1).cpu().numpy()
    group.floor = np.maximum(group.floor, kth - error)


def _at_least(scores: Tensor, floor: Float32[np.ndarray, " q"]) -> Any:
    """Where [q, b] scores, as they were before they were rounded, may reach a row's floor.

    Positive half-precision numbers are ordered as their bits are: a fast comparison.
    """
    below, rounded = floor - 2 * _slack(floor, scores.dtype), scores.dtype != torch.float32
    least = torch.from_numpy(below - _slack(below, scores.dtype) if rounded else below)  # rounded down
    least = least.to(scores.device, scores.dtype)[:, None]
    if rounded and below.min(initial=np.inf) > 0:
        scores, least = scores.view(torch.int16), least.view(torch.int16)
    if scores.dtype == torch.bfloat16:  # which NumPy does not know
        return _read(scores >= least)
    return _read(scores) >= _read(least)


def _thin(group: _Group, k: int) -> None:
    """Raise the floor to what k candidates surely reach, and drop those that cannot reach it."""
    row, column, found = (np.concatenate(parts) for parts in zip(*group.found, strict=True))
    error, slack = group.error[row], _slack(found, group.reduced.dtype)
    surely = np.where(found + slack + error <= group.highest[row], found - slack - error, -np.inf)
    group.floor = np.maximum(group.floor, _kth_best(row, surely.astype(np.float32), k, len(group.floor)))
    stays = found + slack + error >= group.floor[row]
    group.found = [(row[stays], column[stays], found[stays])]


def _kth_best(row: np.ndarray, values: Float32[np.ndarray, " c"], k: int, q: int) -> Float32[np.ndarray, " q"]:
    """The k-th largest value of each row, minus infinity where there are fewer.

    Row and value are sorted as one integer, ten times as fast as by two keys: bits of floats are ordered as the floats
    are once those of negative ones are turned round.
    """
    bits = values.view(np.uint32)
    descending = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    keys = np.sort((row.astype(np.uint64) << np.uint64(32)) | descending)
    per_row = np.bincount(row, minlength=q)
    enough = np.flatnonzero(per_row >= k)
    kth = keys[(np.cumsum(per_row) - per_row)[enough] + k - 1].astype(np.uint32)
    found = np.full(q, -np.inf, np.float32)
    found[enough] = np.where(kth >> 31, kth, ~kth & np.uint32(0x7FFFFFFF)).astype(np.uint32).view(np.float32)
    return found


def _decide(
    group: _Group, rows: slice, best: Best, shard: np.ndarray, start: int, tie_rank: Int64[np.ndarray, " n"]
) -> None:  # fmt: skip
    """The group's candidates compete in its `rows` of `best` by their exact scores; the group is emptied."""
    if not group.found:
        return
    _thin(group, best[0].shape[1])
    (row, column, _), group.found = group.found[0], []
    row, column = (side[np.argsort(column, kind="stable")] for side in (row, column))  # a file is read forwards
    scores = pair_scores(group.vectors, shard, row, column)
    within = scores <= group.highest[row]
    so_far = best[0][rows], best[1][rows]
    kept = _merged(so_far, row[within], start + column[within], scores[within], tie_rank)
    best[0][rows], best[1][rows] = kept
    group.floor = np.maximum(group.floor, kept[0][:, -1])


def _merged(best: Best, row: np.ndarray, document: np.ndarray, score: np.ndarray, tie_rank: np.ndarray) -> Best:
    """The best k of `best` and of documents found, by their exact scores."""
    q, k = best[0].shape
    rows = np.concatenate([np.repeat(np.arange(q), k), row])
    values = np.concatenate([best[0].ravel(), score])
    documents = np.concatenate([best[1].ravel(), document])
    order = np.lexsort((tie_rank[documents], -values, rows))
    per_row = np.bincount(rows, minlength=q)  # at least k, since the k so far always compete
    kept = order[(np.cumsum(per_row) - per_row)[:, None] + np.arange(k)]
    return values[kept], documents[kept]


def _checked(vectors: np.ndarray, dimension: int, what: str, first_row: int) -> Float32[np.ndarray, "b d"]:
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        shape = " × ".join(map(str, vectors.shape))
        raise KinvecError(f"{what} vectors are {shape}, not rows of {dimension} as the queries are; use one model")
    vectors = np.array(vectors, dtype=np.float32, order="C")  # in memory, once
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise KinvecError(f"{what} vector {row:,} holds NaN or infinity; is the model broken? Try --precision fp32")
    return vectors
