"""Plain texts → batches, each text once an epoch in an order shuffled anew.

Shapes: n = texts of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kinvec.files import Table
from kinvec.sampling.order import drawn, steps_of
from kinvec.sampling.settings import DataSettings


@dataclass(frozen=True)
class TextBatch:
    """n texts and the place of each in its file."""

    queries: list[str]
    ids: list[str]
    documents: ClassVar[Sequence[str]] = ()

    @property
    def duplicates(self) -> Bool[Tensor, "n n"]:
        """Which other texts of the batch are the same text: no negatives of each other."""
        numbers = torch.tensor([self.queries.index(text) for text in self.queries])
        same = numbers[:, None] == numbers[None, :]
        return same & ~torch.eye(len(numbers), dtype=torch.bool)


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
