"""Plain texts → batches, each text once an epoch in an order shuffled anew.

Shapes: n = texts of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int
from torch import Tensor

from kinvec.files import Table
from kinvec.losses import pairs
from kinvec.sampling.order import drawn, steps_of
from kinvec.sampling.settings import DataSettings


@dataclass(frozen=True)
class TextBatch:
    """n texts and the place of each in its file."""

    queries: list[str]
    ids: list[str]
    documents: ClassVar[Sequence[str]] = ()

    @property
    def duplicates(self) -> Int[Tensor, "e 2"]:
        """Places of two texts of the batch that are the same text: no negatives of each other."""
        places: dict[str, list[int]] = {}
        for place, text in enumerate(self.queries):
            places.setdefault(text, []).append(place)
        return pairs([[other for other in places[text] if other != own] for own, text in enumerate(self.queries)])


@dataclass(frozen=True)
class TextSource:
    """The rows of a table of texts that training draws from."""

    table: Table
    rows: Int[np.ndarray, " E"]
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def steps_per_epoch(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def batch(self, step: int, batch_size: int) -> TextBatch:
        """The batch of step `step`, counted from 0; the last of an epoch may be smaller."""
        rows = self.rows[drawn(len(self.rows), self.seed, step, batch_size)].tolist()
        return TextBatch([self.table.arrow.value("text", row) for row in rows], [self.table.where(row) for row in rows])


def text_source(table: Table, examples: Int[np.ndarray, " E"], settings: DataSettings, seed: int) -> TextSource:
    """The given rows of the table."""
    return TextSource(table, examples, seed)
