"""One data set or several in one training: which of them a step draws from, behind which prompts, and how it is scored.

Batches are homogeneous (all of one data set, whose texts are each other's negatives), or mixed (some rows of each set;
for queries with documents only). Step k is a function of (data, seed, k) alone.
Shapes: K = data sets, S = steps of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kinvec.objectives import Objective, ObjectiveSettings
from kinvec.sampling import DataSettings, PairBatch, Source, join


class SetSettings(DataSettings):
    """One of several data sets: any key of `data` and `objective` that is not the same for all of them, and these."""

    weight: float | None = Field(None, gt=0)
    """Its share of the training, beside the weights of the others; unset in all, `data.share_temperature` decides."""
    prompts: dict[str, str] = {}
    """Put before its queries and documents, in training and evaluation; unset, those of the recipe."""
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    """What it is trained by; keys that are not set are those of the recipe's objective."""


class MixtureSettings(DataSettings):
    """What is trained on, and how it is read and drawn. A list under `data` is several data sets."""

    max_length: int | None = None
    """Tokens at which texts are cut; unset, the model's own maximum."""
    sets: dict[str, SetSettings] = {}
    """Several data sets in the place of `data.train`, by name; other keys of `data` hold for all of them."""
    batches: Literal["homogeneous", "mixed"] = "homogeneous"
    """Of several data sets: each batch from one of them, or some rows of each in every batch."""
    share_temperature: float = Field(1.0, gt=0)
    """A data set's share grows with its size to the power of 1 / this: 1 is by size, more is more even."""


@dataclass(frozen=True)
class TrainingSet:
    """A data set that is trained on: where its batches come from, how they are scored, and its prompts."""

    name: str
    source: Source
    objective: Objective
    prompts: Mapping[str, str]
    weight: float | None = None


@dataclass(frozen=True)
class Step:
    """What one optimiser step learns from: texts, each with its prompt, how they are scored, rows of each data set."""

    batch: Any
    objective: Objective
    queries: Sequence[str]
    documents: Sequence[str]
    query_prompts: Sequence[str]
    document_prompts: Sequence[str]
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Mixture:
    """The data sets of a training. An epoch has as many steps as one pass over all of them takes."""

    sets: tuple[TrainingSet, ...]
    batches: str = "homogeneous"
    share_temperature: float = 1.0
    seed: int = 0

    def steps_per_epoch(self, batch_size: int) -> int:
        return sum(part.source.steps_per_epoch(batch_size) for part in self.sets)

    def step(self, number: int, batch_size: int) -> Step:
        """Step `number`, counted from 0."""
        if self.batches == "mixed":
            return self._mixed(number, batch_size)
        counts = self.counts(batch_size)
        epoch, place = divmod(number, sum(counts))
        order, before = _order(counts, self.seed, epoch)
        chosen = int(order[place])
        return _of_one(self.sets[chosen], epoch * counts[chosen] + int(before[place]), batch_size)

    def counts(self, batch_size: int) -> tuple[int, ...]:
        """Of an epoch's steps (homogeneous) or of a batch's rows (mixed), how many are each data set's, at least 1."""
        if self.batches == "mixed":
            return divide(batch_size, self._shares([len(part.source) for part in self.sets]))
        steps = [part.source.steps_per_epoch(batch_size) for part in self.sets]
        return divide(sum(steps), self._shares(steps))

    def plan(self, batch_size: int, steps: int) -> dict[str, dict[str, int | float]]:
        """Of each data set its rows, its share of the training, and how often `steps` steps go through it."""
        counts = self.counts(batch_size)
        told: dict[str, dict[str, int | float]] = {}
        for part, count in zip(self.sets, counts, strict=True):
            rows, share = len(part.source), count / sum(counts)
            each = rows / count if self.batches == "mixed" else part.source.steps_per_epoch(batch_size) / share
            told[part.name] = {"rows": rows, "share": round(share, 4), "passes": round(steps / each, 2)}
        return told

    def _shares(self, sizes: Sequence[int]) -> Float[np.ndarray, " K"]:
        by_size = np.asarray(sizes, dtype=np.float64) ** (1 / self.share_temperature)
        weights = [part.weight for part in self.sets]
        shares = by_size if None in weights else np.array(weights, dtype=np.float64)
        return shares / shares.sum()

    def _mixed(self, number: int, batch_size: int) -> Step:
        """A batch with rows of every data set, each at its own pace; queries and documents of all meet in it."""
        counts = self.counts(batch_size)
        drawn = [part.source.batch(number, count) for part, count in zip(self.sets, counts, strict=True)]
        batch = join(drawn, [part.source.known for part in self.sets])  # type: ignore[attr-defined]
        of_row = [part for part, own in zip(self.sets, drawn, strict=True) for _ in own.queries]
        objective = _measured_by_set(self.sets[0].objective, [part.name for part in of_row])
        return Step(
            batch, objective, batch.queries, batch.documents,
            [part.prompts.get("query", "") for part in of_row],
            [of_row[owner].prompts.get("document", "") for owner in batch.owner.tolist()],
            {part.name: len(own.queries) for part, own in zip(self.sets, drawn, strict=True)},
        )  # fmt: skip


def alone(source: Source, objective: Objective, prompts: Mapping[str, str] | None = None) -> Mixture:
    """A training on one data set."""
    return Mixture((TrainingSet("", source, objective, prompts or {}),))


def _of_one(part: TrainingSet, number: int, batch_size: int) -> Step:
    batch = part.source.batch(number, batch_size)
    queries, documents = part.objective.texts(batch)
    return Step(
        batch, part.objective, queries, documents,
        [part.prompts.get("query", "")] * len(queries),
        [part.prompts.get("document", "")] * len(documents),
        {part.name: len(batch.ids)},
    )  # fmt: skip


def _measured_by_set(objective: Objective, sets: Sequence[str]) -> Objective:
    """The objective, with the loss over the queries of each data set alone among what the log shows."""
    names, numbers = np.unique(sets, return_inverse=True)

    def measures(queries: Tensor, documents: Tensor, batch: PairBatch) -> dict[str, float]:
        found = {}
        for number, name in enumerate(names.tolist()):
            weights = torch.where(torch.from_numpy(numbers == number), batch.weights, 0.0)
            found[f"loss/{name}"] = float(objective.loss(queries, documents, replace(batch, weights=weights)))
        return found

    return replace(objective, measures=measures)


def divide(total: int, shares: Float[np.ndarray, " K"]) -> tuple[int, ...]:
    """Whole numbers that add up to `total`, as near to the shares as can be (largest remainders), none of them 0."""
    exact = shares * total
    counts = np.maximum(np.floor(exact + 1e-9).astype(int), 1)
    for place in np.argsort(counts - exact, kind="stable")[: max(total - counts.sum(), 0)]:
        counts[place] += 1
    while counts.sum() > total:  # those that were raised to 1 took from the others
        counts[np.argmax(counts)] -= 1
    return tuple(counts.tolist())


@lru_cache(maxsize=2)
def _order(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Which data set each step of the epoch draws from, and how often it was drawn from before in that epoch."""
    order = np.random.default_rng([seed, epoch, 2]).permutation(np.repeat(np.arange(len(counts)), counts))
    before = np.empty_like(order)
    for number, count in enumerate(counts):
        before[order == number] = np.arange(count)
    return order, before
