"""Texts in the plane, before and after, as data for the page: the same texts on both sides, linked by hovering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kinvec.contracts import Result
from kinvec.reporting.reading import main_metric
from kinvec.reporting.rendering import snippet

METHODS = {
    "umap": ("UMAP", "near texts stay near; directions and the distances of clusters mean nothing"),
    "tsne": ("t-SNE", "near texts stay near; directions and the distances of clusters mean nothing"),
    "pca": ("PCA", "the two directions in which the embeddings differ most; what differs elsewhere falls together"),
}  # column → name, and what a reader may take from it; the first that is there is shown first
COLOURS = 8  # labels of a picture that have a colour of their own
SEARCH = ("query", "relevant document", "other document")
TEXT = 110  # characters of a text that are told


def pictures(measured: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """Of each task whose results have places in the plane: points, the groups that colour them, and their places.

    A point is a text that all results of the task have a place for. Places are per cent of a square, [x, y] in the
    order of the points for each method and system.
    """
    return [found for results in measured if (found := _picture(results))]


def _picture(results: Sequence[Result]) -> dict[str, Any] | None:
    tables = [(result.per_query, result.documents) for result in results]
    methods = [name for name in METHODS if all(f"{name}_x" in rows for rows, _ in tables)]
    if not methods:
        return None
    queries = _shared([rows for rows, _ in tables], methods[0])
    documents = _shared([found for _, found in tables], methods[0])
    if len(queries) + len(documents) < 2:
        return None
    first, found = results[0], {"name": results[0].task, "sides": ["Before", "After"][: len(results)]}
    colouring = _by_label(first, queries) if "label" in first.per_query else _by_relevance(first, queries, documents)
    places = {
        name: {"title": METHODS[name][0], "says": METHODS[name][1], "places": _places(tables, queries, documents, name)}
        for name in methods
    }
    return found | colouring | {"methods": list(places.values())}


def _shared(tables: Sequence[Mapping[str, list[Any]]], method: str) -> list[str]:
    """Ids of the rows that have a place in every table, in the order of the first."""
    placed = [
        [key for key, x in zip(table["id"], table[f"{method}_x"], strict=True) if x is not None]
        for table in tables if f"{method}_x" in table
    ]  # fmt: skip
    if len(placed) < len(tables):
        return []
    everywhere = set(placed[0]).intersection(*placed[1:])
    return [key for key in placed[0] if key in everywhere]


def _by_label(result: Result, shown: Sequence[str]) -> dict[str, Any]:
    """Points coloured by label; of many labels those that the first result recovers worst."""
    rows = result.per_query
    worst: dict[str, list[float]] = {}
    for label, value in zip(rows["label"], rows.get(main_metric(result), [0.0] * len(rows["id"])), strict=True):
        worst.setdefault(label, []).append(value)
    coloured = sorted(sorted(worst, key=lambda label: float(np.mean(worst[label])))[:COLOURS])
    others = len(worst) - len(coloured)
    row = {key: number for number, key in enumerate(rows["id"])}
    labels = [rows["label"][row[key]] for key in shown]
    return {
        "groups": coloured + ([f"{others} other labels"] if others else []),
        "note": "Coloured are the labels that the model before recovers worst." if others else "",
        "group": [coloured.index(label) if label in coloured else len(coloured) for label in labels],
        "coloured": len(coloured),
        "texts": [
            f"{label}: {snippet(rows['query'][row[key]], TEXT)}" for key, label in zip(shown, labels, strict=True)
        ],
        "links": [],
    }


def _by_relevance(result: Result, queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
    """Points coloured as queries, documents relevant to one of them, and others; links from each query to its own."""
    rows, kept = result.per_query, result.documents
    row = {key: number for number, key in enumerate(rows["id"])}
    place = {key: len(queries) + number for number, key in enumerate(documents)}
    text = dict(zip(kept.get("id", []), kept.get("text", []), strict=True))
    links = [
        [number, place[document]]
        for number, key in enumerate(queries)
        for document, grade in zip(rows["judged_ids"][row[key]], rows["judged_scores"][row[key]], strict=True)
        if grade > 0 and document in place
    ]
    relevant = {document for _, document in links}
    group = [0] * len(queries) + [1 if place[key] in relevant else 2 for key in documents]
    return {
        "groups": list(SEARCH),
        "note": "Point at a query: lines lead to its relevant documents.",
        "group": group,
        "coloured": 2,
        "texts": [f"query: {snippet(rows['query'][row[key]], TEXT)}" for key in queries]
        + [f"{SEARCH[group[place[key]]]}: {snippet(text.get(key), TEXT)}" for key in documents],
        "links": links,
    }


def _places(
    tables: Sequence[tuple[Mapping[str, list[Any]], Mapping[str, list[Any]]]],
    queries: Sequence[str], documents: Sequence[str], method: str,
) -> list[list[list[float]]]:  # fmt: skip
    sides = [np.array([*_column(rows, queries, method), *_column(found, documents, method)]) for rows, found in tables]
    turned = [sides[0], *(turn(side, sides[0]) for side in sides[1:])]
    return [_in_square(side).round(1).tolist() for side in turned]


def _column(table: Mapping[str, list[Any]], shown: Sequence[str], method: str) -> list[tuple[float, float]]:
    if not shown:
        return []
    row = {key: number for number, key in enumerate(table["id"])}
    return [(table[f"{method}_x"][row[key]], table[f"{method}_y"][row[key]]) for key in shown]


def turn(places: Float[np.ndarray, "n 2"], onto: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Places turned and mirrored to lie as near `onto` as they can (orthogonal Procrustes, Schönemann 1966).

    Directions of a picture are arbitrary; what looks alike before and after should stand in the same corner.
    """
    centred = places - places.mean(axis=0)
    left, _, right = np.linalg.svd(centred.T @ (onto - onto.mean(axis=0)))
    return centred @ left @ right


def _in_square(places: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Per cent of a square, at one scale in both directions, y downwards."""
    low, high = places.min(axis=0), places.max(axis=0)
    scale = 94 / ((high - low).max() or 1.0)
    return 50 + (places - (low + high) / 2) * scale * np.array([1.0, -1.0])
