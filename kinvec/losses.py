"""Losses as functions of tensors: no model, no rank, no trainer inside.

Shapes: B = queries of the batch, N = documents of the batch, d = dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def info_nce(
    queries: Float[Tensor, "B d"],
    documents: Float[Tensor, "N d"],
    targets: Int[Tensor, " B"],
    excluded: Bool[Tensor, "B N"],
    weights: Float[Tensor, " B"],
    temperature: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """The contrastive loss of van den Oord et al. 2018 over cosine similarities.

    Query i should find document `targets[i]` among all documents that are not `excluded[i]`. The loss is the mean of
    the cross-entropies weighted by `weights`. `excluded[i, targets[i]]` must be False.
    """
    scores = _cosine(queries, documents) / temperature
    losses = _cross_entropy(scores.masked_fill(excluded, float("-inf")), targets, label_smoothing)
    return (losses * weights).sum() / weights.sum()


def info_nce_both_ways(
    queries: Float[Tensor, "B d"],
    documents: Float[Tensor, "N d"],
    targets: Int[Tensor, " B"],
    excluded: Bool[Tensor, "B N"],
    weights: Float[Tensor, " B"],
    temperature: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """The mean of `info_nce` and of its mirror, in which each positive should find its query among the batch's queries.

    The symmetric loss of CLIP (Radford et al. 2021). A query for which the positive is excluded is no negative either.
    """
    forth = info_nce(queries, documents, targets, excluded, weights, temperature, label_smoothing)
    own = torch.arange(len(queries), device=queries.device)
    back = info_nce(documents[targets], queries, own, excluded.T[targets], weights, temperature, label_smoothing)
    return (forth + back) / 2


def _cosine(a: Float[Tensor, "A d"], b: Float[Tensor, "B d"]) -> Float[Tensor, "A B"]:
    return functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T


def _cross_entropy(scores: Float[Tensor, "B N"], targets: Int[Tensor, " B"], smoothing: float) -> Float[Tensor, " B"]:
    """Cross-entropy a row; smoothing spreads its share evenly over the documents that are not excluded."""
    logs = scores.log_softmax(dim=-1)
    nll = -logs.gather(1, targets[:, None]).squeeze(1)
    if smoothing == 0.0:
        return nll
    open_to = scores > float("-inf")
    even = -torch.where(open_to, logs, 0.0).sum(1) / open_to.sum(1)
    return (1.0 - smoothing) * nll + smoothing * even


LOSSES: dict[bool, Any] = {False: info_nce, True: info_nce_both_ways}
"""By whether both directions count."""
