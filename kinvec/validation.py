"""What dev says beside the ranking: the loss of its queries, and their cosines with what is relevant and what is not.

Nothing is encoded for it: the vectors are kept as the ranking's evaluation makes them. Shapes: d = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from kinvec.contracts import Encoder, KinvecError, RetrievalData
from kinvec.losses import pairs
from kinvec.objectives import Objective
from kinvec.sampling import PairBatch
from kinvec.tasks.evaluation import unit


class Listener:
    """An encoder that remembers the queries and the judged documents it encodes, and the sum of all documents."""

    def __init__(self, encoder: Encoder, data: RetrievalData) -> None:
        judged = {document for grades in data.qrels.values() for document in grades}
        self.encoder, self.name = encoder, encoder.name
        self.texts = {name: data.corpus.texts[row] for row, name in enumerate(data.corpus.ids) if name in judged}
        self.queries: dict[str, np.ndarray] = {}
        self.documents: dict[str, np.ndarray] = dict.fromkeys(self.texts.values(), np.empty(0))
        self.total: Any = 0.0
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        vectors = self.encoder.encode_queries(texts)
        self.queries |= dict(zip(texts, vectors, strict=True))
        return vectors

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        vectors = self.encoder.encode_documents(texts)
        self.documents |= {text: vectors[row] for row, text in enumerate(texts) if text in self.documents}
        self.total, self.count = self.total + unit(vectors).sum(0, dtype=np.float64), self.count + len(vectors)
        return vectors


def validation(
    data: RetrievalData, heard: Listener, objective: Objective, batch_size: int, negatives: int
) -> dict[str, float]:
    """Figures of the model that `heard` listened to; NeMo logs the same as `val_loss`, `avg_pos_cs`, `avg_neg_cs`.

    `val_loss` is the objective's loss over dev queries in their order, each with its first positive and at most
    `negatives` documents judged as none, in batches of nearly equal size; left out where the objective does not learn
    from queries with documents, or needs negatives that dev has not. `cosine_positive` and `cosine_negative` are means
    over queries of the mean cosine with their positives, and with documents judged 0; where no document is judged so,
    with all other documents of the corpus. `cosine_difference` is the first less the second.
    """
    batches = list(dev_batches(data, heard.texts, batch_size, negatives))
    if not batches:
        return {}
    positive, negative = cosines(data, heard)
    found = {"cosine_positive": positive, "cosine_negative": negative, "cosine_difference": positive - negative}
    if objective.kind != "retrieval" or objective.ask is not None:
        return found
    total = rows = 0.0
    try:
        for batch in batches:
            queries, documents = (
                torch.from_numpy(np.stack([known[text] for text in texts]))
                for known, texts in ((heard.queries, batch.queries), (heard.documents, batch.documents))
            )
            with torch.no_grad():
                total += float(objective.loss(queries, documents, batch)) * len(batch.queries)
            rows += len(batch.queries)
    except KinvecError:  # an objective that needs negatives or a teacher's scores, and dev has none
        return found
    return {"val_loss": total / rows} | found


def cosines(data: RetrievalData, heard: Listener) -> tuple[float, float]:
    """(mean cosine with positives, mean cosine with negatives), as `validation` says."""
    of_positives, of_negatives, of_others = [], [], []
    for query, grades in data.qrels.items():
        vector = unit(heard.queries[data.queries[query]][None])[0]
        near: dict[bool, list[float]] = {True: [], False: []}
        for document, grade in grades.items():
            if document in heard.texts:
                known = unit(heard.documents[heard.texts[document]][None])[0]
                near[grade > 0].append(float(vector @ known))
        if near[True]:
            of_positives.append(np.mean(near[True]))
        if near[False]:
            of_negatives.append(np.mean(near[False]))
        rest = heard.count - len(near[True])
        of_others.append((float(vector @ heard.total) - sum(near[True])) / max(rest, 1))
    return float(np.mean(of_positives)), float(np.mean(of_negatives or of_others))


def dev_batches(data: RetrievalData, texts: Mapping[str, str], batch_size: int, negatives: int) -> Iterator[PairBatch]:
    """The judged queries that have a positive, in their order; `texts` are the judged documents of the corpus."""
    rows: list[tuple[str, list[str], list[str]]] = []
    for query, grades in data.qrels.items():
        there = [document for document in grades if document in texts]
        relevant = [texts[document] for document in there if grades[document] > 0]
        others = [texts[document] for document in there if grades[document] <= 0]
        if relevant:
            rows.append((query, relevant, others[:negatives]))
    for part in np.array_split(np.arange(len(rows)), math.ceil(len(rows) / batch_size)) if rows else ():
        yield _batch(data, [rows[row] for row in part])


def _batch(data: RetrievalData, rows: Sequence[tuple[str, list[str], list[str]]]) -> PairBatch:
    documents = [relevant[0] for _, relevant, _ in rows] + [text for *_, others in rows for text in others]
    owner = [*range(len(rows)), *(row for row, (*_, others) in enumerate(rows) for _ in others)]
    queries = [data.queries[query] for query, *_ in rows]
    no_negative = [{text, *relevant} for text, (_, relevant, _) in zip(queries, rows, strict=True)]
    excluded = pairs(
        [[j for j, text in enumerate(documents) if text in known and j != i] for i, known in enumerate(no_negative)]
    )
    ones = torch.ones(len(rows))
    graded = (torch.arange(len(documents)) < len(rows)).float()
    names = [query for query, *_ in rows]
    return PairBatch(
        queries, documents, torch.arange(len(rows)), excluded, torch.tensor(owner), ones, graded, query_ids=names
    )
