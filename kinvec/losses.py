"""Losses as functions of tensors: no model, no rank, no trainer inside.

Shapes: B = queries of the batch, N = documents of the batch, n = labelled texts or scored pairs, d = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SCORES = 2**24  # held at a time: 64 MiB; a batch of 4,096 is one block


def info_nce(
    queries: Float[Tensor, "B d"],
    documents: Float[Tensor, "N d"],
    targets: Int[Tensor, " B"],
    excluded: Int[Tensor, "e 2"],
    weights: Float[Tensor, " B"],
    temperature: float,
    label_smoothing: float = 0.0,
    seen_by: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """The contrastive loss of van den Oord et al. 2018 over cosine similarities.

    Query i should find document `targets[i]` among all documents but those that are excluded for it: a row (i, j) of
    `excluded` leaves document j out, and one with `seen_by[j]` ≥ 0 is there for that query only. No target may be left
    out. The loss is the mean of the cross-entropies weighted by `weights`. Of larger batches the scores are computed
    for some queries at a time, and again for their gradients: memory is O((B + N) d + e).
    """
    queries, documents = functional.normalize(queries, dim=-1), functional.normalize(documents, dim=-1)

    def some(queries: Tensor, targets: Tensor, first: int) -> Tensor:
        closed = dense(excluded, slice(first, first + len(queries)), len(documents), seen_by)
        scores = queries @ documents.T / temperature
        return _cross_entropy(scores.masked_fill(closed, float("-inf")), targets, label_smoothing)

    rows = at_once(len(documents))
    blocks = list(zip(queries.split(rows), targets.split(rows), range(0, len(queries), rows), strict=True))
    if len(blocks) == 1:
        losses = some(queries, targets, 0)
    else:
        losses = torch.cat([checkpoint(some, *block, use_reentrant=False) for block in blocks])
    return (losses * weights).sum() / weights.sum()


def at_once(documents: int) -> int:
    """Queries whose scores with so many documents are held at a time."""
    return max(1, SCORES // documents)


def dense(
    excluded: Int[Tensor, "e 2"], rows: slice, documents: int, seen_by: Int[Tensor, " N"] | None = None
) -> Bool[Tensor, "b N"]:
    """What `excluded` and `seen_by` leave out for the queries `rows`, as `info_nce` reads them."""
    query, document = excluded[(excluded[:, 0] >= rows.start) & (excluded[:, 0] < rows.stop)].unbind(1)
    closed = torch.zeros(rows.stop - rows.start, documents, dtype=torch.bool, device=excluded.device)
    closed[query - rows.start, document] = True
    if seen_by is not None:
        own = torch.arange(rows.start, rows.stop, device=seen_by.device)[:, None]
        closed |= (seen_by >= 0) & (seen_by != own)
    return closed


def pairs(excluded: Sequence[Sequence[int]]) -> Int[Tensor, "e 2"]:
    """Documents that are left out, given for query after query, as `info_nce` takes them."""
    return torch.tensor([(i, j) for i, documents in enumerate(excluded) for j in documents]).long().view(-1, 2)


def info_nce_both_ways(
    queries: Float[Tensor, "B d"],
    documents: Float[Tensor, "N d"],
    targets: Int[Tensor, " B"],
    excluded: Int[Tensor, "e 2"],
    weights: Float[Tensor, " B"],
    temperature: float,
    label_smoothing: float = 0.0,
    seen_by: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """The mean of `info_nce` and of its mirror, in which each positive should find its query among the batch's queries.

    The symmetric loss of CLIP (Radford et al. 2021). A query for which the positive is excluded is no negative either.
    """
    forth = info_nce(queries, documents, targets, excluded, weights, temperature, label_smoothing, seen_by)
    own = torch.arange(len(queries), device=queries.device)
    positives, mirrored = documents.index_select(0, targets), _mirrored(excluded, targets)
    back = info_nce(positives, queries, own, mirrored, weights, temperature, label_smoothing)
    return (forth + back) / 2


def _mirrored(excluded: Int[Tensor, "e 2"], targets: Int[Tensor, " B"]) -> Int[Tensor, "m 2"]:
    """(i, j) where the target of query i is excluded for query j."""
    ordered, order = targets.sort()
    query, document = excluded.T.contiguous()
    first, last = torch.searchsorted(ordered, document), torch.searchsorted(ordered, document, right=True)
    count = last - first  # of the queries that have this document as their target
    pair, place = _members(count)
    return torch.stack([order[first[pair] + place], query[pair]], dim=1)


def _members(count: Int[Tensor, " g"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """The group of every member, and its place in it, of groups of so many members, one group after another."""
    group = torch.repeat_interleave(count)
    return group, torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]


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


# --- Distillation ---------------------------------------------------------------------------------------------------


def kl_distillation(
    queries: Float[Tensor, "B d"],
    documents: Float[Tensor, "N d"],
    owner: Int[Tensor, " N"],
    teacher: Float[Tensor, " N"],
    weights: Float[Tensor, " B"],
    temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) over the documents that a query brought, the mean over queries weighted by `weights`.

    The distributions are softmaxes of cosines / temperature and of the teacher's scores / teacher_temperature (RocketQA
    v2, Ren et al. 2021). `owner[j]` is the query that brought document j, `teacher[j]` their score.
    """
    own = _own_documents(owner, len(queries))
    cosines = paired_cosine(queries.index_select(0, owner), documents)
    student, wanted = (
        scores[own].masked_fill(own < 0, float("-inf")).log_softmax(1)
        for scores in (cosines / temperature, teacher / teacher_temperature)
    )
    each = (wanted.exp() * (wanted - student).masked_fill(own < 0, 0.0)).sum(1)
    return (each * weights).sum() / weights.sum()


def _own_documents(owner: Int[Tensor, " N"], queries: int) -> Int[Tensor, "B m"]:
    """The documents that each query brought, in their order; −1 where others brought more."""
    count = torch.bincount(owner, minlength=queries)
    own = owner.new_full((queries, int(count.max())), -1)
    own[_members(count)] = owner.argsort(stable=True)
    return own


def margin_mse(
    queries: Float[Tensor, "B d"],
    documents: Float[Tensor, "N d"],
    owner: Int[Tensor, " N"],
    teacher: Float[Tensor, " N"],
    weights: Float[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Mean squared error between the margins of student and teacher (Hofstätter et al. 2020).

    A margin is the score of a query's positive (document i of query i) less that of a negative it brought (documents
    from B on); the student's scores are cosines. Negatives of a query share its weight.
    """
    cosines, own = paired_cosine(queries.index_select(0, owner), documents), owner[len(queries) :]
    student, wanted = (scores[own] - scores[len(queries) :] for scores in (cosines, teacher))
    share = weights[own] / torch.bincount(own, minlength=len(queries))[own]
    return ((student - wanted).square() * share).sum() / share.sum()


def turned(teacher: Float[Tensor, "n t"], student: Float[Tensor, "n d"]) -> Float[Tensor, "t d"]:
    """The map of a teacher's embeddings to a student's dimensions that keeps most of them and turns the student least.

    The teacher's principal directions about the origin, as many as the student has dimensions, then the rotation that
    brings the same texts nearest to where the student has them (orthogonal Procrustes, Schönemann 1966). With d ≥ t
    cosines are the teacher's own.
    """
    width, keep = student.shape[1], min(teacher.shape[1], student.shape[1])
    teacher, student = teacher.double(), student.double()
    directions = torch.linalg.eigh(teacher.T @ teacher).eigenvectors.flip(1)[:, :keep]  # ascending, so turned round
    directions = torch.nn.functional.pad(directions, (0, width - keep))
    left, _, right = torch.linalg.svd((teacher @ directions).T @ student)
    return (directions @ left @ right).float()


# --- Labelled texts -------------------------------------------------------------------------------------------------


class Mined(NamedTuple):
    """The loss of the triplets that were mined, and the share of them that still has a loss."""

    loss: Float[Tensor, ""]
    active: Float[Tensor, ""]


def batch_all_triplet(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], margin: float, distance: str = "cosine"
) -> Mined:
    """Every triplet of the batch: mean of max(0, d(a, p) − d(a, n) + margin) over those above 0 (Hermans et al. 2017).

    a and p share a label, n has another. Sorted negatives replace the n³ triplets: those that are active for (a, p) are
    the first c of a's negatives, and their losses add up to c · (d(a, p) + margin) − the sum of their distances.
    """
    distances, positive, negative = _labelled_distances(embeddings, labels, distance)
    near_first = _sorted_negatives(distances, negative)
    reach = distances + margin
    count = torch.searchsorted(near_first.detach(), reach.detach().contiguous())
    sums = functional.pad(near_first.masked_fill(near_first.isinf(), 0.0).cumsum(dim=1), (1, 0))
    losses = (count * reach - sums.gather(1, count)) * positive
    active = (count * positive).sum()
    triplets = (positive.sum(1) * negative.sum(1)).sum()
    return Mined(losses.sum() / active.clamp(min=1), active / triplets.clamp(min=1))


def batch_hard_triplet(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], margin: float, distance: str = "cosine"
) -> Mined:
    """Each anchor with its farthest positive and its nearest negative (Hermans et al. 2017, equation 5).

    Anchors without a positive or a negative in the batch do not count.
    """
    gap = _hardest_gap(embeddings, labels, distance)
    losses = (gap + margin).relu()
    return Mined(_mean(losses), _mean((losses > 0).float()))


def batch_hard_soft_margin_triplet(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], margin: float = 0.0, distance: str = "cosine"
) -> Mined:
    """As `batch_hard_triplet` with ln(1 + exp(gap)) in place of the hinge (Hermans et al. 2017); no margin is needed.

    Active are the anchors with a negative nearer than a positive.
    """
    gap = _hardest_gap(embeddings, labels, distance)
    return Mined(_mean(functional.softplus(gap + margin)), _mean((gap + margin > 0).float()))


def batch_semi_hard_triplet(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], margin: float, distance: str = "cosine"
) -> Mined:
    """Each pair (a, p) with the nearest negative that is farther than p (Schroff et al. 2015, equation 4).

    Where none is farther, the farthest negative. The mean is over all pairs, whether active or not; anchors without a
    negative do not count.
    """
    distances, positive, negative = _labelled_distances(embeddings, labels, distance)
    near_first = _sorted_negatives(distances, negative)
    count = negative.sum(1, keepdim=True)
    beyond = torch.searchsorted(near_first.detach(), distances.detach().contiguous(), right=True)
    chosen = near_first.gather(1, beyond.minimum((count - 1).clamp(min=0)))
    pairs = positive & (count > 0)
    losses = (distances - chosen + margin)[pairs].relu()
    return Mined(_mean(losses), _mean((losses > 0).float()))


def sup_con(embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], temperature: float) -> Float[Tensor, ""]:
    """Supervised contrastive loss over cosines, the sum outside the logarithm (Khosla et al. 2020, equation 2).

    An anchor should find each text of its label among all others. Anchors without a positive do not count.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None]) & ~own
    logs = (_cosine(embeddings, embeddings) / temperature).masked_fill(own, float("-inf")).log_softmax(dim=1)
    each = -logs.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    return _mean(each[positive.any(1)])


def _cosine_distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    return 1.0 - _cosine(x, x)


def _euclidean_distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Not through inner products, which lose the small distances; the gradient at distance 0 is 0."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"cosine": _cosine_distances, "euclidean": _euclidean_distances}


def _labelled_distances(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], distance: str
) -> tuple[Float[Tensor, "n n"], Bool[Tensor, "n n"], Bool[Tensor, "n n"]]:
    """All distances, and for each anchor (row) which texts are its positives and which its negatives."""
    same = labels[:, None] == labels[None]
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return DISTANCES[distance](embeddings), same & ~own, ~same


def _sorted_negatives(distances: Float[Tensor, "n n"], negative: Bool[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Each anchor's distances to its negatives, the nearest first; the rest of the row is infinite."""
    return distances.masked_fill(~negative, float("inf")).sort(dim=1).values


def _hardest_gap(embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"], distance: str) -> Float[Tensor, " m"]:
    """d(a, farthest positive) − d(a, nearest negative) of every anchor that has both."""
    distances, positive, negative = _labelled_distances(embeddings, labels, distance)
    both = positive.any(1) & negative.any(1)
    farthest = distances.masked_fill(~positive, float("-inf")).amax(1)
    nearest = distances.masked_fill(~negative, float("inf")).amin(1)
    return farthest[both] - nearest[both]


def _mean(values: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """The mean; of nothing 0, with a gradient of 0."""
    return values.sum() / max(len(values), 1)


TRIPLETS: dict[str, Callable[..., Mined]] = {
    "all": batch_all_triplet,
    "hard": batch_hard_triplet,
    "semi-hard": batch_semi_hard_triplet,
    "hard-soft-margin": batch_hard_soft_margin_triplet,
}
"""By how the triplets of a batch are mined."""


# --- Scored pairs ---------------------------------------------------------------------------------------------------


def cosent(similarities: Float[Tensor, " n"], scores: Float[Tensor, " n"], temperature: float) -> Float[Tensor, ""]:
    """CoSENT (Su 2022; Huang et al. 2024): ln(1 + Σ exp((s_i − s_j) / temperature)) over pairs with score_i < score_j.

    Only the order of the scores counts.
    """
    scaled = similarities / temperature
    wrong_order = (scaled[:, None] - scaled[None])[scores[:, None] < scores[None]]
    return torch.cat([wrong_order.new_zeros(1), wrong_order]).logsumexp(0)


def cosine_regression(similarities: Float[Tensor, " n"], scores: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean squared error of cosines against scores (Reimers and Gurevych 2019)."""
    return functional.mse_loss(similarities, scores)


def paired_cosine(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The cosine of each pair."""
    return functional.cosine_similarity(first, second, dim=1)


def paired_angle(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """AnglE's similarity (Li and Li 2023, equation 6): the two halves of a vector are real and imaginary parts.

    |Re + Im| of the inner product of the complex vectors, divided by their lengths; it does not flatten out where
    cosines do. d must be even.
    """
    (a, b), (c, d) = first.chunk(2, dim=1), second.chunk(2, dim=1)
    real, imaginary = (a * c + b * d).sum(1), (b * c - a * d).sum(1)
    return (real + imaginary).abs() / (first.norm(dim=1) * second.norm(dim=1))
