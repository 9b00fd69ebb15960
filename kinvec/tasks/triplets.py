"""Triplets: how much nearer a query is to its positives than to the documents judged as negatives for it.

The measure by which Bg2Vec was compared, mean(cos(query, positive) − cos(query, negative)), and its share above 0. A
query with several positives or negatives stands for all triplets they make.

Shapes: q = queries, p = judged pairs, d = dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from kinvec.contracts import Qrels, RecipeError

TRIPLETS = ("margin", "triplet_accuracy")


def have_triplets(qrels: Qrels) -> bool:
    """Whether some query has a positive and a document that is judged as none."""
    return any(min(grades.values()) <= 0 < max(grades.values()) for grades in qrels.values() if grades)


def chosen(qrels: Qrels, measures: Sequence[str], default: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(measures of rankings, measures of triplets): those named, else `default` and what the judgements allow.

    Raises `RecipeError` where a measure of triplets is named and there are none.
    """
    there = have_triplets(qrels)
    if not measures:
        return tuple(default), TRIPLETS if there else ()
    triplets = tuple(name for name in measures if name in TRIPLETS)
    if triplets and not there:
        raise RecipeError(f"{triplets[0]} needs negatives (neg_doc, or documents judged 0), and the data have none")
    return tuple(name for name in measures if name not in TRIPLETS), triplets


class Pairs:
    """The judged pairs of a search, whose cosines are taken as the documents' vectors pass by."""

    def __init__(self, qrels: Qrels, ids: Sequence[str]) -> None:
        judged = {document for grades in qrels.values() for document in grades}
        row = {identity: row for row, identity in enumerate(ids) if identity in judged}
        found = [
            (row[document], query, grade > 0)
            for query, grades in enumerate(qrels.values())
            for document, grade in grades.items()
            if document in row
        ]
        pairs: Int64[np.ndarray, "p 3"] = np.array(sorted(found), dtype=np.int64).reshape(-1, 3)
        self.rows, self.queries, positive = pairs.T
        self.positive = positive.astype(bool)
        self.cosines: Float64[np.ndarray, " p"] = np.zeros(len(pairs))
        self.products: Float64[np.ndarray, " p"] = np.zeros(len(pairs))
        self.count = len(qrels)

    def passing(self, queries: Float[np.ndarray, "q d"], blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks of documents, unchanged; afterwards `cosines` and `products` are filled."""
        start = 0
        for block in blocks:
            here = slice(*np.searchsorted(self.rows, [start, start + len(block)]).tolist())
            a, b = queries[self.queries[here]].astype(np.float64), block[self.rows[here] - start].astype(np.float64)
            self.products[here], self.cosines[here] = (a * b).sum(axis=1), cosines(a, b)
            start += len(block)
            yield block

    def similarities(self, qrels: Qrels, ids: Sequence[str]) -> list[list[float | None]]:
        """Each query's inner products with its judged documents, in their order; None for one that is not there."""
        found = zip(self.queries.tolist(), self.rows.tolist(), self.products.tolist(), strict=True)
        product = {(query, ids[row]): value for query, row, value in found}
        return [[product.get((query, key)) for key in grades] for query, grades in enumerate(qrels.values())]

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Each query's mean over its triplets of margin and of margin > 0; None for a query without a triplet."""
        values: dict[str, list[Any]] = {name: [None] * self.count for name in TRIPLETS}
        order = np.argsort(self.queries, kind="stable")
        for pairs in np.split(order, np.flatnonzero(np.diff(self.queries[order])) + 1):
            positive = self.positive[pairs]
            margins = self.cosines[pairs][positive][:, None] - self.cosines[pairs][~positive]
            if margins.size:
                query = int(self.queries[pairs[0]])
                values["margin"][query] = float(margins.mean())
                values["triplet_accuracy"][query] = float((margins > 0).mean())
        return {name: values[name] for name in names}


def cosines(a: Float[np.ndarray, "p d"], b: Float[np.ndarray, "p d"]) -> Float64[np.ndarray, " p"]:
    """Row by row, in float64; 0 where a vector is 0."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    product: np.ndarray = (a * b).sum(axis=1)
    return product / np.where(lengths > 0, lengths, 1.0)
