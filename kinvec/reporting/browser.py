"""The query browser: every query with its value before and after, and what each model found, as data for the page.

Documents are named by their place in one list of texts, so that a text that many queries share is there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kinvec import tasks
from kinvec.contracts import Result
from kinvec.files import evenly
from kinvec.reporting.reading import main_metric
from kinvec.reporting.rendering import embed, snippet

ROOM = 12_500_000  # bytes of the page that all its queries may take; the page is to stay below 15 MB
TEXT = (240, 160, 100, 70)  # characters of a text that are shown: the most that leave room for all queries


def browse(measured: Sequence[Sequence[Result]], names: Sequence[str], room: int = ROOM) -> dict[str, Any] | None:
    """The browser's data: of each task the results of all systems (at least two, of the same data), named by `names`.

    Where the queries of a task take more than its share of `room`, documents are cut shorter; where that is not enough
    as many queries as fit are kept, spread evenly.
    """
    several = [results for results in measured if len(results) > 1]
    if not several:
        return None
    return {"systems": list(names), "tasks": [_fitting(results, room // len(several)) for results in several]}


def _fitting(results: Sequence[Result], room: int) -> dict[str, Any]:
    kept = total = len(results[0].per_query["id"])
    for length in TEXT:
        found = _task(results, range(total), length)
        if (size := _size(found)) <= room:
            return found
    while size > room and kept > 1:
        kept = max(1, int(0.97 * kept * room / size))
        rows = evenly(total, kept).tolist()
        found = _task(results, rows, TEXT[-1])
        size = _size(found)
    return found


def _size(found: dict[str, Any]) -> int:
    return len(embed(found).encode())


def _task(results: Sequence[Result], rows: Sequence[int], length: int) -> dict[str, Any]:
    """One task's queries `rows` (places in the first result's table); the other results are joined by id."""
    first, by = results[0], main_metric(results[0])
    ids = [first.per_query["id"][row] for row in rows]
    places = [_places(result, ids) for result in results]
    values = [tasks.statistic(by).each(result.per_query)[place] for result, place in zip(results, places, strict=True)]
    told: dict[str, Any] = {
        "name": first.task,
        "unit": tasks.unit_of(first.kind),
        "metric": by,
        "total": len(first.per_query["id"]),
        "ids": ids,
        "queries": [first.per_query["query"][row] for row in rows],
        "values": [[None if np.isnan(value) else round(float(value), 6) for value in column] for column in values],
    }
    tables = [_at(result.per_query, place) for result, place in zip(results, places, strict=True)]
    if all("top_ids" in table for table in tables):
        return told | _rankings(results, tables, length)
    return told | {"facts": _facts(tables, by)}


def _places(result: Result, ids: Sequence[str]) -> list[int]:
    place = {identity: row for row, identity in enumerate(result.per_query["id"])}
    return [place[identity] for identity in ids]


def _at(columns: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[row] for row in rows] for name, column in columns.items()}


def _rankings(results: Sequence[Result], tables: Sequence[Mapping[str, list[Any]]], length: int) -> dict[str, Any]:
    """Of each query the first documents by every system, with scores, and the relevant ones with their grades."""
    texts: dict[str, str] = {}
    for result in results:
        texts |= dict(zip(result.documents.get("id", []), result.documents.get("text", []), strict=True))
    number: dict[str, int] = {}

    def numbers(documents: Iterable[str]) -> list[int]:
        return [number.setdefault(document, len(number)) for document in documents]

    tops = [[numbers(top) for top in table["top_ids"]] for table in tables]
    scores = [[[round(score, 3) for score in row] for row in table.get("top_scores", [])] for table in tables]
    judged = zip(tables[0].get("judged_ids", []), tables[0].get("judged_scores", []), strict=True)
    relevant = [[(key, grade) for key, grade in zip(*row, strict=True) if grade > 0] for row in judged]
    return {
        "top": tops,
        "scores": scores,
        "relevant": [[[numbers([key])[0], grade] for key, grade in row] for row in relevant],
        "documents": {"ids": list(number), "texts": [snippet(texts.get(key), length) for key in number]},
    }


def _facts(tables: Sequence[Mapping[str, list[Any]]], by: str) -> list[dict[str, Any]]:
    """The columns of a table that a person can read as they are: one value where all systems have the same."""
    found = []
    for name, first in tables[0].items():
        if name in ("id", "query", by) or name.endswith(("_x", "_y")) or not all(name in table for table in tables):
            continue
        columns = [table[name] for table in tables]
        if any(isinstance(value, list | dict) for value in first):
            continue
        told = columns[:1] if all(column == first for column in columns) else columns
        shown = [[_shown(value) for value in column] for column in told]
        found.append({"name": name.replace("_", " "), "values": shown})
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return snippet(value, TEXT[0]) if isinstance(value, str) else value
