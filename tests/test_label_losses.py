"""Losses over labelled texts and scored pairs, against sentence-transformers and against loops over all triplets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import losses as peer
from sentence_transformers.sentence_transformer.losses.batch_hard_triplet import (
    BatchHardTripletLossDistanceFunction as Distance,
)
from torch import Tensor

from kinvec.losses import TRIPLETS, cosent, cosine_regression, paired_angle, paired_cosine, sup_con

PEERS: dict[str, Callable[..., Any]] = {
    "all": peer.BatchAllTripletLoss, "hard": peer.BatchHardTripletLoss, "semi-hard": peer.BatchSemiHardTripletLoss,
    "hard-soft-margin": peer.BatchHardSoftMarginTripletLoss,
}  # fmt: skip
PEER_DISTANCES = {"cosine": Distance.cosine_distance, "euclidean": Distance.eucledian_distance}


def with_gradient(value: Callable[[Tensor], Tensor], embeddings: Tensor) -> tuple[float, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    result = value(leaf)
    result.backward()
    assert leaf.grad is not None
    return result.item(), leaf.grad


# ---- sentence-transformers ----


@pytest.mark.parametrize("distance", PEER_DISTANCES)
@pytest.mark.parametrize("mining", TRIPLETS)
@pytest.mark.parametrize("margin", [0.05, 0.4, 2.0])
def test_mined_triplets_have_the_loss_and_gradient_of_sentence_transformers(
    mining: str, distance: str, margin: float
) -> None:
    draws = torch.Generator().manual_seed(3)
    labels = torch.arange(24) % 5
    embeddings = torch.randn(24, 8, generator=draws) + 0.4 * torch.randn(5, 8, generator=draws)[labels]
    soft = mining == "hard-soft-margin"
    theirs = PEERS[mining](None, distance_metric=PEER_DISTANCES[distance], **({} if soft else {"margin": margin}))
    expected, gradient = with_gradient(lambda x: theirs.compute_loss_from_embeddings([x], labels), embeddings)
    own = 0.0 if soft else margin
    found, ours = with_gradient(lambda x: TRIPLETS[mining](x, labels, own, distance).loss, embeddings)
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


SCORED: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "cosent": (peer.CoSENTLoss, lambda a, b, scores: cosent(paired_cosine(a, b), scores, 0.05)),
    "angle": (peer.AnglELoss, lambda a, b, scores: cosent(paired_angle(a, b), scores, 0.05)),
    "cosine": (peer.CosineSimilarityLoss, lambda a, b, scores: cosine_regression(paired_cosine(a, b), scores)),
}


@pytest.mark.parametrize("name", SCORED)
def test_scored_pairs_have_the_loss_and_gradient_of_sentence_transformers(name: str) -> None:
    theirs, ours = SCORED[name]
    draws = torch.Generator().manual_seed(5)
    scores = torch.tensor([0.0, 0.2, 0.2, 0.5, 0.5, 0.5, 0.9, 1.0])  # with ties
    both = torch.randn(16, 6, generator=draws)
    model = torch.nn.Identity()
    expected, gradient = with_gradient(
        lambda x: theirs(model).compute_loss_from_embeddings(list(x.chunk(2)), scores), both
    )
    found, own = with_gradient(lambda x: ours(*x.chunk(2), scores), both)
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)


# ---- loops over all triplets ----


def distance_of(a: Tensor, b: Tensor, distance: str) -> Tensor:
    if distance == "euclidean":
        return (a - b).norm()
    return 1 - (a @ b) / (a.norm() * b.norm())


def triplets(labels: list[int]) -> Iterator[tuple[int, int, int]]:
    for a, p, n in product(range(len(labels)), repeat=3):
        if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
            yield a, p, n


def brute_force(mining: str, x: Tensor, labels: list[int], margin: float, distance: str) -> tuple[Tensor, float]:
    """Loss and share of active triplets, by going through every triplet."""
    far = {(i, j): distance_of(x[i], x[j], distance) for i, j in product(range(len(labels)), repeat=2) if i != j}
    every = list(triplets(labels))
    anchors = sorted({a for a, _, _ in every})
    if mining == "all":
        terms = [(far[a, p] - far[a, n] + margin).clamp(min=0) for a, p, n in every]
        active = [term for term in terms if term > 0]
        return (torch.stack(active).mean() if active else x.sum() * 0), len(active) / max(len(terms), 1)
    terms = []
    if mining == "semi-hard":
        for a, p in sorted({(a, p) for a, p, _ in every}):
            negatives = sorted((far[a, n] for b, q, n in every if (b, q) == (a, p)), key=lambda d: d.item())
            beyond = [d for d in negatives if d > far[a, p]]
            terms.append((far[a, p] - (beyond[0] if beyond else negatives[-1]) + margin).clamp(min=0))
    else:
        for anchor in anchors:
            positive = max((far[a, p] for a, p, _ in every if a == anchor), key=lambda d: d.item())
            negative = min((far[a, n] for a, _, n in every if a == anchor), key=lambda d: d.item())
            gap = positive - negative + margin
            terms.append(gap.clamp(min=0) if mining == "hard" else gap.exp().log1p())
    if not terms:
        return x.sum() * 0, 0.0
    threshold = math.log(2) if mining == "hard-soft-margin" else 0.0
    return torch.stack(terms).mean(), sum(term.item() > threshold for term in terms) / len(terms)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=9), seed=st.integers(0, 10_000),
    margin=st.sampled_from([0.0, 0.1, 0.7]), distance=st.sampled_from(["cosine", "euclidean"]),
    mining=st.sampled_from(list(TRIPLETS)),
)  # fmt: skip
def test_mining_is_that_of_a_loop_over_all_triplets(
    labels: list[int], seed: int, margin: float, distance: str, mining: str
) -> None:
    """Also where an anchor has no positive or no negative: it does not count."""
    margin = 0.0 if mining == "hard-soft-margin" else margin
    embeddings = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mined = TRIPLETS[mining](embeddings, torch.tensor(labels), margin, distance)
    expected, active = brute_force(mining, embeddings, labels, margin, distance)
    assert mined.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert mined.active.item() == pytest.approx(active, abs=1e-6)
    _, ours = with_gradient(lambda x: TRIPLETS[mining](x, torch.tensor(labels), margin, distance).loss, embeddings)
    _, theirs = with_gradient(lambda x: brute_force(mining, x, labels, margin, distance)[0], embeddings)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=7), seed=st.integers(0, 10_000))
def test_sup_con_is_equation_2(labels: list[int], seed: int) -> None:
    x = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def equation(x: Tensor) -> Tensor:
        total, count = x.sum() * 0, 0
        for i in range(len(labels)):
            positives = [p for p in range(len(labels)) if p != i and labels[p] == labels[i]]
            if not positives:
                continue
            scores = {a: (1 - distance_of(x[i], x[a], "cosine")) / 0.1 for a in range(len(labels)) if a != i}
            all_others = torch.stack(list(scores.values())).exp().sum().log()
            total = total - sum(scores[p] - all_others for p in positives) / len(positives)
            count += 1
        return total / max(count, 1)

    expected, theirs = with_gradient(equation, x)
    found, ours = with_gradient(lambda x: sup_con(x, torch.tensor(labels), 0.1), x)
    assert found == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


# ---- what could go wrong ----


@pytest.mark.parametrize("mining", TRIPLETS)
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_equal_texts_have_a_finite_gradient(mining: str, distance: str) -> None:
    embeddings = torch.nn.functional.normalize(torch.ones(4, 3), dim=1)
    loss, gradient = with_gradient(
        lambda x: TRIPLETS[mining](x, torch.tensor([0, 0, 1, 1]), 0.2, distance).loss, embeddings
    )
    assert math.isfinite(loss) and torch.isfinite(gradient).all()


def test_separated_labels_have_no_active_triplet_and_no_loss() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0], [-1.0, 0.01]])
    for mining in ("all", "hard", "semi-hard"):
        mined = TRIPLETS[mining](embeddings, torch.tensor([0, 0, 1, 1]), 0.2, "cosine")
        assert (mined.loss.item(), mined.active.item()) == (0.0, 0.0)
