"""Scored pairs → batches of pairs, each pair once an epoch.

Shapes: B = pairs of the batch, R = rows to draw from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinvec.contracts import KinvecError
from kinvec.files import Table
from kinvec.sampling.order import drawn, steps_of
from kinvec.sampling.settings import DataSettings


@dataclass(frozen=True)
class ScoredBatch:
    """B pairs: all first texts, then all second ones, in `queries` (both sides are alike); scores within the range."""

    queries: list[str]
    scores: Float[Tensor, " B"]
    ids: list[str]
    documents: ClassVar[Sequence[str]] = ()


@dataclass(frozen=True)
class ScoredSource:
    """The scored pairs of a table that training draws from; scores from `low` to `high` become 0 to 1."""

    table: Table
    rows: Int[np.ndarray, " R"]
    low: float
    high: float
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def steps_per_epoch(self, batch_size: int) -> int:
        return steps_of(len(self), batch_size)

    def batch(self, step: int, batch_size: int) -> ScoredBatch:
        """The batch of step `step`, counted from 0."""
        chosen = self.rows[drawn(len(self.rows), self.seed, step, batch_size)].tolist()
        rows = [self.table.arrow.row(row) for row in chosen]
        scores = torch.tensor([(row["score"] - self.low) / (self.high - self.low) for row in rows])
        texts = [row["first"] for row in rows] + [row["second"] for row in rows]
        return ScoredBatch(texts, scores, [self.table.where(row) for row in chosen])


def scored_source(table: Table, examples: Int[np.ndarray, " E"], settings: DataSettings, seed: int) -> ScoredSource:
    """The given pairs. Raises `KinvecError` where all scores are equal, or one is outside `data.score_range`."""
    scores = np.concatenate([batch.column(0).to_numpy() for batch in table.batches(["score"])])[examples]
    low, high = settings.score_range or (float(scores.min()), float(scores.max()))
    if low >= high:
        raise KinvecError(f"{table.source}: all scores are {low:g}; pairs of different scores are needed to learn from")
    outside = np.flatnonzero((scores < low) | (scores > high))
    if len(outside):
        row = int(examples[outside[0]])
        raise KinvecError(
            f"{table.where(row)}: the score {scores[outside[0]]:g} is outside data.score_range, {low:g} to {high:g}"
        )
    return ScoredSource(table, examples, low, high, seed)
