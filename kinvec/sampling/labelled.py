"""Labelled texts → batches of P labels with K texts each, so that every text of a batch has a positive and negatives.

The batches of Hermans et al. 2017: the labels of a batch are drawn at random, each as often as any other. A label's
texts come in a shuffled order, anew in each epoch, and none comes again before all have come.
Shapes: n = texts of the batch, L = labels, P = labels of a batch, S = steps of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kinvec.console import say
from kinvec.contracts import KinvecError, RecipeError
from kinvec.files import Table
from kinvec.sampling.order import steps_of
from kinvec.sampling.settings import DataSettings


@dataclass(frozen=True)
class LabelBatch:
    """n texts, the number of each one's label, and the place of each in its file."""

    queries: list[str]
    labels: Int[Tensor, " n"]
    ids: list[str]
    documents: ClassVar[Sequence[str]] = ()


@dataclass(frozen=True)
class LabelSource:
    """The rows of a labelled table that training draws from, by label."""

    table: Table
    rows: list[Int[np.ndarray, " _"]]
    texts_per_label: int
    seed: int
    _drawn: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def shape(self, batch_size: int) -> tuple[int, int]:
        """(P, K) of a batch of this many texts. Raises `RecipeError` where two labels of two texts do not fit."""
        if batch_size < 4:
            raise RecipeError(f"trainer.batch_size: {batch_size} texts are no two labels of two texts; give at least 4")
        labels = min(len(self.rows), max(2, batch_size // self.texts_per_label))
        return labels, batch_size // labels

    def steps_per_epoch(self, batch_size: int) -> int:
        labels, texts = self.shape(batch_size)
        return steps_of(len(self), labels * texts)

    def batch(self, step: int, batch_size: int) -> LabelBatch:
        """The batch of step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        chosen, earlier = self._labels(epoch, batch_size)
        texts: list[str] = []
        labels: list[int] = []
        ids: list[str] = []
        for label, before in zip(chosen[place].tolist(), earlier[place].tolist(), strict=True):
            for row in self._texts(epoch, label, before, self.shape(batch_size)[1]):
                texts.append(self.table.arrow.value("text", row))
                labels.append(label)
                ids.append(self.table.where(row))
        return LabelBatch(texts, torch.tensor(labels), ids)

    def _labels(self, epoch: int, batch_size: int) -> tuple[Int[np.ndarray, "S P"], Int[np.ndarray, "S P"]]:
        """The labels of every batch of an epoch, and how often each was drawn in the epoch before."""
        if (epoch, batch_size) not in self._drawn:
            self._drawn.clear()
            count, draw = self.shape(batch_size)[0], np.random.default_rng([self.seed, epoch])
            steps = self.steps_per_epoch(batch_size)
            chosen = np.stack([draw.choice(len(self.rows), count, replace=False) for _ in range(steps)])
            self._drawn[epoch, batch_size] = chosen, _earlier(chosen.ravel()).reshape(chosen.shape)
        return self._drawn[epoch, batch_size]

    def _texts(self, epoch: int, label: int, before: int, count: int) -> list[int]:
        """The rows of the label's draw number `before`: the next `count` of its shuffled texts, going round."""
        rows = self.rows[label]
        order = np.random.default_rng([self.seed, epoch, label]).permutation(rows)
        return order[(before * count + np.arange(min(count, len(rows)))) % len(rows)].tolist()


def _earlier(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    ranks = np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))
    earlier = np.empty_like(ranks)
    earlier[order] = ranks
    return earlier


def label_source(table: Table, examples: Int[np.ndarray, " E"], settings: DataSettings, seed: int) -> LabelSource:
    """The given rows of the table by label. A label with a single text is left out, and said so.

    Raises `KinvecError` where fewer than two labels have two texts.
    """
    labels = np.array([label for batch in table.batches(["label"]) for label in batch.column(0).to_pylist()])
    names, numbers = np.unique(labels[examples], return_inverse=True)
    by_label = [examples[numbers == number] for number in range(len(names))]
    alone = [str(name) for name, rows in zip(names, by_label, strict=True) if len(rows) < 2]
    if alone:
        say(f"warning: labels with a single text are not trained on: {', '.join(alone[:5])}{', …' * (len(alone) > 5)}")
    rows = [rows for rows in by_label if len(rows) >= 2]
    if len(rows) < 2:
        raise KinvecError(f"{table.source}: training by labels needs two labels with at least two texts each")
    return LabelSource(table, rows, settings.texts_per_label, seed)
