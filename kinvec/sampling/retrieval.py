"""Retrieval examples → batches: which pairs a step sees, and which of its documents may be negatives for which query.

Shapes: B = queries of the batch, N = its documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinvec.console import say
from kinvec.contracts import Corpus, Example, KinvecError, RetrievalData
from kinvec.files import Table, exact_key, text_key, text_keys
from kinvec.losses import pairs
from kinvec.sampling.order import drawn, steps_of
from kinvec.sampling.settings import DataSettings


@dataclass(frozen=True)
class PairBatch:
    """B queries against N documents: row i's positive is document `targets[i]`; hard negatives follow the positives.

    A row (i, j) of `excluded` says that document j is no negative for query i although it is not its target: it is
    another known positive, a duplicate of one, or the query's own text. `owner[j]` is the row that brought document j,
    and `scores[j]` what the data say of the two: a grade, or a teacher's score. `where` are the places of the rows in
    their files, where they have one.
    """

    queries: list[str]
    documents: list[str]
    targets: Int[Tensor, " B"]
    excluded: Int[Tensor, "e 2"]
    owner: Int[Tensor, " N"]
    weights: Float[Tensor, " B"]
    scores: Float[Tensor, " N"]
    query_ids: list[str]
    where: tuple[str, ...] = ()

    @property
    def ids(self) -> list[str]:
        """What a message calls the rows."""
        return self.query_ids


class KnownPositives:
    """The judged (query, positive) pairs of the rows trained on, by id and by text, as sorted pairs of 64-bit keys.

    All of them, not only those of a batch; rows held out for dev or test are not looked at.
    """

    def __init__(self, table: Table, examples: Int[np.ndarray, " E"]) -> None:
        trained_on = np.zeros(len(table), dtype=bool)
        trained_on[examples] = True
        queries, documents, row = [], [], 0
        for batch in table.batches(["query_id", "query", "pos_id", "pos_doc"]):
            ids, docs = batch.column("pos_id"), batch.column("pos_doc")
            counts = np.diff(docs.offsets.to_numpy())
            wanted = np.repeat(trained_on[row : row + len(counts)], counts)
            row += len(counts)
            by_text = np.repeat(text_keys(batch.column("query").to_pylist()), counts)[wanted]
            by_id = np.repeat(id_keys(batch.column("query_id").to_pylist()), counts)[wanted]
            doc_texts = text_keys(docs.flatten().to_pylist())[wanted]
            doc_ids = id_keys(ids.flatten().to_pylist())[wanted]
            queries += [by_text, by_text, by_id, by_id]
            documents += [doc_texts, doc_ids, doc_texts, doc_ids]
        query_keys, document_keys = np.concatenate(queries), np.concatenate(documents)
        order = np.lexsort((document_keys, query_keys))
        self._queries, self._documents = query_keys[order], document_keys[order]

    def of(self, key: int) -> Int[np.ndarray, " n"]:
        """Keys of all documents known as positives of the query with this key."""
        first = np.searchsorted(self._queries, key, side="left")
        last = np.searchsorted(self._queries, key, side="right")
        return self._documents[first:last]


def id_keys(ids: Sequence[str]) -> Int[np.ndarray, " n"]:
    """64-bit keys of ids, apart from those of texts: an id that reads like some text is not that text."""
    return np.fromiter((exact_key(f"\x00id\x00{value}") for value in ids), dtype=np.int64)


@dataclass(frozen=True)
class PairSource:
    """The (query, positive) rows of a table that training draws from."""

    table: Table
    rows: Int[np.ndarray, " R"]
    places: Int[np.ndarray, " R"]
    weights: Float[np.ndarray, " R"]
    known: KnownPositives
    settings: DataSettings
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def steps_per_epoch(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def batch(self, step: int, batch_size: int) -> PairBatch:
        """The batch of step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        chosen = drawn(len(self), self.seed, step, batch_size)
        picked = [(self.table.example(int(self.rows[i])), int(self.places[i])) for i in chosen]
        draw = np.random.default_rng([self.seed, epoch, place, 1])
        batch = build_batch(picked, self.weights[chosen], self.known, self.settings, draw)
        return replace(batch, where=tuple(self.table.where(int(self.rows[i])) for i in chosen))


def pair_source(table: Table, examples: Int[np.ndarray, " E"], settings: DataSettings, seed: int) -> PairSource:
    """One row per (query, positive) of the given examples of the table.

    Every query weighs the same, however many positives it has and however many lines of the file they stand in.
    """
    examples = _with_negatives(table, examples, settings)
    counts = _counts(table, "pos_doc")[examples]
    keys = [text_keys(batch.column("query").to_pylist()) for batch in table.batches(["query"])]
    _, query = np.unique(np.concatenate(keys)[examples], return_inverse=True)
    weights = 1.0 / np.maximum(np.bincount(query, weights=counts), 1.0)
    rows = np.repeat(examples, counts)
    places = np.concatenate([np.arange(count) for count in counts]) if len(counts) else np.empty(0, dtype=np.int64)
    return PairSource(
        table, rows, places, np.repeat(weights[query], counts), KnownPositives(table, examples), settings, seed
    )


def _counts(table: Table, column: str) -> Int[np.ndarray, " E"]:
    """How many documents every row has in a column."""
    counts = [np.diff(batch.column(column).offsets.to_numpy()) for batch in table.batches([column])]
    return np.concatenate(counts) if counts else np.empty(0, dtype=np.int64)


def _with_negatives(table: Table, examples: Int[np.ndarray, " E"], settings: DataSettings) -> Int[np.ndarray, " k"]:
    """The examples, without those of too few hard negatives where such are dropped, or an error about the first."""
    if settings.fewer_negatives not in ("drop", "error"):
        return examples
    counts = _counts(table, "neg_doc")[examples]
    short = counts < settings.negatives_per_query
    if settings.fewer_negatives == "error" and short.any():
        first = int(np.argmax(short))
        raise KinvecError(
            f"{table.where(int(examples[first]))}: the row has {counts[first]} hard negatives, and "
            f"data.negatives_per_query is {settings.negatives_per_query}; add some, or set data.fewer_negatives=repeat"
        )
    if short.all():
        raise KinvecError(f"{table.source}: no row has {settings.negatives_per_query} hard negatives; nothing is left")
    if short.any():
        say(f"{short.sum():,} queries with fewer than {settings.negatives_per_query} hard negatives are left out")
    return examples[~short]


def build_batch(
    picked: Sequence[tuple[Example, int]], weights: Float[np.ndarray, " B"], known: KnownPositives,
    settings: DataSettings, draw: np.random.Generator,
) -> PairBatch:  # fmt: skip
    """Lay out positives, then hard negatives, and mark what must not count as a negative."""
    texts = [example.positives[place] for example, place in picked]
    ids = [example.positive_ids[place] for example, place in picked]
    scores = [example.positive_scores[place] for example, place in picked]
    owner = list(range(len(picked)))
    for row, (example, _) in enumerate(picked):
        for i in _choose(len(example.negatives), settings, draw):
            texts.append(example.negatives[i])
            ids.append(example.negative_ids[i] if example.negative_ids else "")
            scores.append(example.negative_scores[i] if example.negative_scores else 0.0)
            owner.append(row)
    return PairBatch(
        queries=[example.query for example, _ in picked],
        documents=texts,
        targets=torch.arange(len(picked)),
        excluded=_excluded([example for example, _ in picked], texts, ids, known),
        owner=torch.tensor(owner),
        weights=torch.tensor(weights, dtype=torch.float32),
        scores=torch.tensor(scores),
        query_ids=[example.query_id for example, _ in picked],
    )


def join(batches: Sequence[PairBatch], known: Sequence[KnownPositives]) -> PairBatch:
    """Batches of several data sets as one: every document may be a negative of every query.

    Positives come first, then hard negatives, as in each. Between data sets only texts say what is a known positive or
    a duplicate of one; ids of one set mean nothing in another.
    """
    sizes = [len(batch.queries) for batch in batches]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    hard = [(place, column) for place, batch in enumerate(batches) for column in range(sizes[place], len(batch.owner))]
    columns = [(place, column) for place, size in enumerate(sizes) for column in range(size)] + hard
    documents = [batches[place].documents[column] for place, column in columns]
    queries = [query for batch in batches for query in batch.queries]
    no_negatives = _same_texts(queries, documents, known)
    number = {column: number for number, column in enumerate(columns)}
    for place, (batch, start) in enumerate(zip(batches, starts, strict=True)):
        for row, column in batch.excluded.tolist():
            no_negatives[start + row].add(number[place, column])
    return PairBatch(
        queries, documents, torch.arange(len(queries)), pairs([sorted(some) for some in no_negatives]),
        owner=torch.tensor([starts[place] + int(batches[place].owner[column]) for place, column in columns]),
        weights=torch.cat([batch.weights for batch in batches]),
        scores=torch.tensor([float(batches[place].scores[column]) for place, column in columns]),
        query_ids=[query for batch in batches for query in batch.query_ids],
        where=tuple(place for batch in batches for place in batch.where),
    )  # fmt: skip


def _same_texts(queries: Sequence[str], documents: Sequence[str], known: Sequence[KnownPositives]) -> list[set[int]]:
    """Of each query, the documents but its own whose text is the query's or one of its known positives."""
    columns = _columns(text_keys(documents))
    keys = [{key, *(other for one in known for other in one.of(key).tolist())} for key in text_keys(queries).tolist()]
    return [_found(some, columns, row) for row, some in enumerate(keys)]


def _columns(*keys: Int[np.ndarray, " N"]) -> dict[int, list[int]]:
    """Where documents have which key."""
    columns: dict[int, list[int]] = {}
    for column, some in enumerate(zip(*(part.tolist() for part in keys), strict=True)):
        for key in some:
            columns.setdefault(key, []).append(column)
    return columns


def _found(keys: set[int], columns: Mapping[int, Sequence[int]], own: int) -> set[int]:
    """The documents with one of the keys, but for the own positive."""
    return {column for key in keys for column in columns.get(key, ())} - {own}


def _choose(available: int, settings: DataSettings, draw: np.random.Generator) -> Sequence[int]:
    if settings.fewer_negatives == "repeat" and 0 < available < settings.negatives_per_query:
        return [place % available for place in range(settings.negatives_per_query)]
    count = min(available, settings.negatives_per_query)
    if settings.negatives == "first" or count == available:
        return range(count)
    return sorted(draw.choice(available, size=count, replace=False).tolist())


def _excluded(
    examples: Sequence[Example], texts: Sequence[str], ids: Sequence[str], known: KnownPositives
) -> Int[Tensor, "e 2"]:
    columns = _columns(text_keys(texts), id_keys(ids))
    by_text, by_id = text_keys([e.query for e in examples]).tolist(), id_keys([e.query_id for e in examples]).tolist()
    # a document that is the query's own text is no negative
    keys = [{text, *known.of(text).tolist(), *known.of(own).tolist()} for text, own in zip(by_text, by_id, strict=True)]
    return pairs([sorted(_found(some, columns, row)) for row, some in enumerate(keys)])


def as_retrieval(table: Table, examples: Int[np.ndarray, " E"], distractors: int, name: str) -> RetrievalData:
    """The given examples as a search problem: their judged documents, and documents of other rows as distractors."""
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for row in examples.tolist():
        example = table.example(row)
        queries[example.query_id] = example.query
        judged = qrels.setdefault(example.query_id, {})
        for doc, text, score in zip(example.positive_ids, example.positives, example.positive_scores, strict=True):
            documents[doc] = text
            judged[doc] = max(1, round(score))
        for doc, text in zip(example.negative_ids, example.negatives, strict=True):
            documents[doc] = text
            judged.setdefault(doc, 0)
    wanted = len(documents) + distractors
    for doc, text in _documents(table, np.setdiff1d(np.arange(len(table)), examples), name):
        if len(documents) >= wanted:
            break
        documents.setdefault(doc, text)
    corpus = Corpus(list(documents), list(documents.values()))
    fingerprint = f"{table.fingerprint}-{name}-{distractors}"
    return RetrievalData(corpus, queries, qrels, fingerprint, name=Path(table.source).stem, split=name)


def _documents(table: Table, rows: Int[np.ndarray, " E"], name: str) -> Iterator[tuple[str, str]]:
    """Documents of the rows, rows in an order that is random but always the same."""
    seed: Any = abs(text_key(name))
    for row in np.random.default_rng(seed).permutation(rows).tolist():
        example = table.example(row)
        yield from zip(example.positive_ids, example.positives, strict=True)
        yield from zip(example.negative_ids, example.negatives, strict=True)
