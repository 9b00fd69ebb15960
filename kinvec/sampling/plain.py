"""Plain texts → batches, each text once an epoch in an order shuffled anew.

Shapes: n = texts of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kinvec.files import Table
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
    _order: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.rows) // batch_size)

    def batch(self, step: int, batch_size: int) -> TextBatch:
        """The batch of step `step`, counted from 0; the last of an epoch may be smaller."""
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        if epoch not in self._order:
            self._order.clear()
            self._order[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        rows = self._order[epoch][place * batch_size : (place + 1) * batch_size].tolist()
        return TextBatch([self.table.arrow.value("text", row) for row in rows], [self.table.where(row) for row in rows])


def text_source(table: Table, examples: Int[np.ndarray, " E"], settings: DataSettings, seed: int) -> TextSource:
    """The given rows of the table."""
    return TextSource(table, examples, seed)
