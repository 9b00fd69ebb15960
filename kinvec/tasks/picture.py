"""Places in the plane: a picture of texts in which near embeddings are near.

Labels and judgements play no part in where a text is put, and every method has its seed.
Shapes: n = texts pictured, d = dimensions.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from sklearn.manifold import TSNE

from kinvec.contracts import Result, RetrievalData
from kinvec.files import evenly

PICTURED = 1000  # texts that have a place, at most
QUERIES = 300  # of them are queries of a search; each brings its first relevant document
FEWEST = 10  # texts that make a picture
SEED = 42

Columns = dict[str, list[Any]]


def pca(vectors: Float32[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """The two directions of the greatest variance (Pearson 1901), each turned so that its longest reach is positive."""
    centred = vectors - vectors.mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(vectors), 2))
    places[:, : min(2, len(lengths))] = (left * lengths)[:, :2]
    farthest = places[np.abs(places).argmax(axis=0), [0, 1]]
    return places * np.where(farthest < 0, -1.0, 1.0)


def tsne(vectors: Float32[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Near texts stay near, by t-SNE (van der Maaten and Hinton 2008) over cosine distance."""
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    layout = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=SEED)
    plane: np.ndarray = layout.fit_transform(vectors)
    return plane


def umap(vectors: Float32[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Near texts stay near, by UMAP (McInnes et al. 2018) over cosine distance; umap-learn has to be installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TensorFlow is not there, and that a seed means one thread
        from umap import UMAP  # type: ignore[import-not-found]  # nothing else needs it, and it brings a compiler

        layout = UMAP(metric="cosine", n_neighbors=min(15, len(vectors) - 1), random_state=SEED)
        plane: np.ndarray = layout.fit_transform(vectors)
    return plane


METHODS = {"pca": pca, "tsne": tsne, "umap": umap}


def places(vectors: Float32[np.ndarray, "n d"], methods: Sequence[str]) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Every text's place by each of the methods, and by UMAP where it is installed; none for too few texts."""
    if len(vectors) < FEWEST:
        return {}
    there = [*methods, *(["umap"] if importlib.util.find_spec("umap") else [])]
    return {name: METHODS[name](vectors) for name in there}


def columns(found: dict[str, Float[np.ndarray, "n 2"]], rows: Iterable[int], count: int) -> Columns:
    """Places of these rows as columns of `count` rows (`pca_x`, `pca_y`); None where a row has no place."""
    rows, made = list(rows), Columns()
    for name, plane in found.items():
        for axis, values in zip("xy", plane.T.tolist(), strict=True):
            column: list[Any] = [None] * count
            for row, value in zip(rows, values, strict=True):
                column[row] = value
            made[f"{name}_{axis}"] = column
    return made


class SearchPicture:
    """Queries, their relevant documents and others, the same for every model; vectors are kept as they pass by."""

    def __init__(self, data: RetrievalData) -> None:
        self.queries = evenly(len(data.qrels), QUERIES)
        judgements = list(data.qrels.values())
        firsts = {
            next((key for key, grade in judgements[row].items() if grade > 0), None) for row in self.queries.tolist()
        }
        relevant = [row for row, identity in enumerate(data.corpus.ids) if identity in firsts]
        others = evenly(len(data.corpus), max(0, PICTURED - len(self.queries) - len(relevant)))
        self.documents: Int64[np.ndarray, " m"] = np.union1d(relevant, others).astype(np.int64)
        self.kept: list[np.ndarray] = []

    def passing(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks of documents, unchanged."""
        start = 0
        for block in blocks:
            here = slice(*np.searchsorted(self.documents, [start, start + len(block)]).tolist())
            self.kept.append(block[self.documents[here] - start])
            start += len(block)
            yield block

    def draw(self, queries: Float32[np.ndarray, "q d"], ids: Sequence[str], result: Result) -> None:
        """Put the places into the rows of `result` that have one, once all documents have passed by."""
        found = places(np.concatenate([queries[self.queries], *self.kept]), ["pca"])
        row = {identity: row for row, identity in enumerate(result.documents.get("id", []))}
        if row:
            n, shown = len(self.queries), [row[ids[i]] for i in self.documents.tolist()]
            result.per_query |= columns(
                {name: plane[:n] for name, plane in found.items()}, self.queries.tolist(), len(queries)
            )
            result.documents |= columns({name: plane[n:] for name, plane in found.items()}, shown, len(row))
