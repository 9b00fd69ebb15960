"""What a training step asks and how it is scored: which texts are embedded, and the loss of their embeddings.

An objective is a value with two functions: `texts(batch)` gives the queries and the documents to embed, and
`loss(queries, documents, batch)` scores their embeddings. Shapes: B = queries, N = documents, d = dimensions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kinvec.config import Settings
from kinvec.contracts import RecipeError
from kinvec.losses import LOSSES
from kinvec.sampling import PairBatch

Loss = Callable[[Float[Tensor, "B d"], Float[Tensor, "N d"], PairBatch], Float[Tensor, ""]]


class ObjectiveSettings(Settings):
    """The training objective and its settings."""

    name: str = "contrastive"
    """`contrastive`, or your own as `my_file.py:my_loss`, a function of (queries, documents, batch) → loss."""
    temperature: float = Field(0.05, gt=0)
    """Cosines are divided by this (the scale of MultipleNegativesRankingLoss is 1 / temperature)."""
    hard_negatives: Literal["shared", "own"] = "shared"
    """Whether a query sees every hard negative of the batch, or only those of its own row."""
    both_directions: bool = False
    """Also ask each positive to find its query."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the other documents."""


@dataclass(frozen=True)
class Objective:
    """What `pipeline` hands to the trainer."""

    name: str
    loss: Loss

    @staticmethod
    def texts(batch: PairBatch) -> tuple[list[str], list[str]]:
        """The queries and the documents whose embeddings the loss needs."""
        return batch.queries, batch.documents


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective of these settings. Raises `RecipeError` for an unknown name or a file without the function."""
    if ":" in settings.name:
        return Objective(settings.name, _from_file(settings.name))
    if settings.name not in OBJECTIVES:
        raise RecipeError(
            f"objective.name: '{settings.name}' is unknown; known are {', '.join(OBJECTIVES)}, or my_file.py:my_loss"
        )
    return Objective(settings.name, OBJECTIVES[settings.name](settings))


def contrastive(settings: ObjectiveSettings) -> Loss:
    """InfoNCE over the batch: in-batch negatives, hard negatives, known positives and duplicates masked."""
    score = LOSSES[settings.both_directions]

    def loss(queries: Float[Tensor, "B d"], documents: Float[Tensor, "N d"], batch: PairBatch) -> Float[Tensor, ""]:
        device = queries.device
        excluded = batch.excluded
        if settings.hard_negatives == "own":
            rows = torch.arange(len(batch.queries))[:, None]
            hard = torch.arange(len(batch.documents))[None] >= len(batch.queries)
            excluded = excluded | (hard & (batch.owner[None] != rows))
        tensors = (batch.targets.to(device), excluded.to(device), batch.weights.to(device))
        return score(queries, documents, *tensors, settings.temperature, settings.label_smoothing)

    return loss


OBJECTIVES: dict[str, Callable[[ObjectiveSettings], Loss]] = {"contrastive": contrastive}


def _from_file(name: str) -> Any:
    """A user's own loss. Runs the user's file: it is named in their own recipe."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"objective.name: there is no file '{file}'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own lines raise
        raise RecipeError(f"objective.name: '{file}' cannot be run ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, function, None)):
        raise RecipeError(f"objective.name: '{file}' has no function '{function}'")
    return getattr(module, function)
