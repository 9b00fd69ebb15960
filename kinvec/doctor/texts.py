"""The distinct texts of a table, by side, and where each stands; read again when they are wanted.

Shapes: t = distinct texts of a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from kinvec.checks import Keys, chosen_batches, entries_of, quoted
from kinvec.files import Table, evenly

MAPPED = 500  # texts read here and there before their pages are given back
LEAD = 30  # characters shown of what texts have in common, before the first that differs

SIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "retrieval": {"queries": ("query",), "documents": ("pos_doc", "neg_doc")},
    "pairs": {"texts": ("first", "second")},
    "labelled": {"texts": ("text",)},
    "texts": {"texts": ("text",)},
}


@dataclass(frozen=True)
class Texts:
    """The texts of a side that differ in more than case and white space, in the order of their first appearance.

    Text i is entry `place[i]` of row `row[i]` (of the keys) in `columns[column[i]]`; it has `lengths[i]` characters.
    """

    table: Table
    of: Keys
    side: str
    columns: tuple[str, ...]
    keys: Int64[np.ndarray, " t"]
    column: Int64[np.ndarray, " t"]
    row: Int64[np.ndarray, " t"]
    place: Int64[np.ndarray, " t"]
    lengths: Int32[np.ndarray, " t"]

    def __len__(self) -> int:
        return len(self.keys)

    def text(self, number: int) -> str:
        """Text `number`."""
        value = self.table.arrow.value(self.columns[self.column[number]], int(self.of.numbers[self.row[number]]))
        return str(value[self.place[number]] if isinstance(value, list) else value)

    def read(self, numbers: Int64[np.ndarray, " c"]) -> list[str]:
        """Some texts."""
        found = [self.text(number) for number in numbers.tolist()]
        if len(found) > MAPPED:
            self.table.arrow.let_go()
        return found

    def quoted(self, number: int) -> dict[str, Any]:
        """Text `number` as an example, with its place."""
        return quoted(self.table, self.of, int(self.row[number]), self.text(number))

    def contrasted(self, numbers: Int64[np.ndarray, " c"]) -> list[dict[str, Any]]:
        """Texts as examples that differ in what is shown of them: a long common beginning is left out."""
        found = self.read(numbers)
        shown = []
        for at, number in enumerate(numbers.tolist()):
            start = len(commonprefix([found[at], found[0 if at else 1]])) - LEAD
            text = found[at] if start < LEAD else f"…{found[at][start:]}"
            shown.append(quoted(self.table, self.of, int(self.row[number]), text))
        return shown

    def batches(self, numbers: Int64[np.ndarray, " c"]) -> Iterator[list[str]]:
        """Texts by their numbers, which ascend, a record batch at a time: one pass over the data."""
        rows, inverse = np.unique(self.row[numbers], return_inverse=True)
        start = 0
        for batch in chosen_batches(self.table, self.columns, self.of.numbers[rows]):
            here = numbers[np.searchsorted(inverse, start) : np.searchsorted(inverse, start + batch.num_rows)]
            found = [entries_of(batch.column(name)) for name in self.columns]
            begins = [np.cumsum(each) - each for _, each in found]
            at = np.searchsorted(rows, self.row[here]) - start
            yield [
                found[column][0][begins[column][row] + place]
                for column, row, place in zip(self.column[here], at, self.place[here], strict=True)
            ]
            start += batch.num_rows

    def spread(self, limit: int, characters: int | None = None) -> Int64[np.ndarray, " c"]:
        """Numbers of texts, evenly spread: at most `limit`, of about so many characters in all."""
        if characters is not None and len(self):
            limit = min(limit, max(1, int(characters / max(1.0, float(self.lengths.mean())))))
        return evenly(len(self), limit)


def texts_of(table: Table, keys: Keys) -> list[Texts]:
    """The texts of each side of a table."""
    return [_distinct(table, keys, side, columns) for side, columns in SIDES[table.kind].items()]


def _distinct(table: Table, keys: Keys, side: str, columns: tuple[str, ...]) -> Texts:
    rows = [keys.rows(name) for name in columns]
    places = [np.arange(len(row)) - np.searchsorted(row, row) for row in rows]
    column = np.repeat(np.arange(len(columns)), [len(row) for row in rows])
    row, place = np.concatenate(rows), np.concatenate(places)
    of = np.concatenate([keys.of[name] for name in columns])
    order = np.lexsort((place, column, row))
    first = order[np.sort(np.unique(of[order], return_index=True)[1])]
    lengths = np.concatenate([keys.lengths[name] for name in columns])
    return Texts(table, keys, side, columns, of[first], column[first], row[first], place[first], lengths[first])
