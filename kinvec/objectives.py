"""What a training step asks and how it is scored: which texts are embedded, and the loss of their embeddings.

An objective is a value: the kind of data it learns from, and functions of (queries, documents, batch): `loss`, and
`measures`, which the log shows beside it. `texts(batch)` gives the queries and the documents to embed; where all texts
are alike (labelled texts, scored pairs) they are all queries. Shapes: B = queries, N = documents, n = labelled texts,
d = dimensions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kinvec.batching import Pack
from kinvec.config import Settings
from kinvec.contracts import KinvecError, RecipeError
from kinvec.embedder import Embedder
from kinvec.losses import (
    LOSSES,
    TRIPLETS,
    Mined,
    at_once,
    cosent,
    cosine_regression,
    kl_distillation,
    margin_mse,
    paired_angle,
    paired_cosine,
    sup_con,
    turned,
)
from kinvec.masking import Cloze, MaskingSettings, Task, ask, hidden_token
from kinvec.sampling import Batch, LabelBatch, PairBatch, ScoredBatch, TextBatch

Loss = Callable[[Float[Tensor, "B d"], Float[Tensor, "N d"], Any], Float[Tensor, ""]]
Measures = Callable[[Float[Tensor, "B d"], Float[Tensor, "N d"], Any], dict[str, float]]


class ObjectiveSettings(Settings):
    """The training objective and its settings."""

    name: str = "contrastive"
    """`contrastive` for queries and documents, `kl` or `margin_mse` where a teacher has scored them; `triplet` or
    `supcon` for labelled texts; `cosent`, `angle` or `cosine` for scored pairs; `simcse`, `embedding`, `mlm`, `mntp` or
    `clm` for plain texts; or your own as `my_file.py:my_loss`, a function of (queries, documents, batch) → loss."""
    temperature: float = Field(0.05, gt=0)
    """Cosines are divided by this (the scale of MultipleNegativesRankingLoss or CoSENTLoss is 1 / temperature)."""
    teacher: str | None = None
    """The model whose embeddings `embedding` learns."""
    teacher_temperature: float = Field(1.0, gt=0)
    """The teacher's scores are divided by this in `kl`."""
    hard_negatives: Literal["shared", "own"] = "shared"
    """Whether a query sees every hard negative of the batch, or only those of its own row."""
    guide: str | None = None
    """A model that judges the batch: what it finds nearer to a query than the positive is no negative (GIST)."""
    guide_margin: float = Field(0.0, ge=0)
    """Nor is what the guide finds less than this farther than the positive, as a difference of cosines."""
    in_batch: bool = True
    """Whether the documents of other queries are negatives too; false leaves a query's own hard negatives alone."""
    dimensions: list[int] = []
    """Matryoshka: also train the first so many dimensions, scaled to length 1 again, such as `[384, 192, 96]`."""
    both_directions: bool = False
    """Also ask each positive to find its query."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the other documents."""
    mining: Literal["all", "hard", "semi-hard", "hard-soft-margin"] = "semi-hard"
    """Which triplets of the batch `triplet` learns from."""
    distance: Literal["cosine", "euclidean"] = "cosine"
    """The distance in triplets: 1 − cosine, or Euclidean."""
    margin: float = Field(0.2, ge=0)
    """How much nearer a positive should be than a negative; hard-soft-margin has none."""
    masking: MaskingSettings = Field(default_factory=MaskingSettings)
    """Which tokens `mlm` and `mntp` hide."""


def _nothing(queries: Tensor, documents: Tensor, batch: Any) -> dict[str, float]:
    return {}


def _as_drawn(batch: Batch) -> tuple[Sequence[str], Sequence[str]]:
    return batch.queries, batch.documents


@dataclass(frozen=True)
class Objective:
    """What `pipeline` hands to the trainer.

    `texts(batch)` are the queries and the documents whose embeddings `loss` needs. An objective that predicts tokens
    has `ask` instead of a loss: (tokenizer, pack) → the pack with hidden tokens, and what is to be predicted. `noisy`
    ones learn from the model's dropout. `prepare` makes it ready with the untrained model and a sample of the texts.
    """

    name: str
    loss: Loss
    kind: str = "retrieval"
    measures: Measures = _nothing
    texts: Callable[[Any], tuple[Sequence[str], Sequence[str]]] = _as_drawn
    ask: Callable[[Any, Pack], Cloze] | None = None
    noisy: bool = False
    prepare: Callable[[Embedder, Sequence[str]], Objective] | None = None


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective of these settings. Raises `RecipeError` for an unknown name or a file without the function.

    A user's own loss learns from retrieval data unless its attribute `kind` says `labelled`, `pairs` or `texts`.
    """
    if ":" in settings.name:
        loss = _from_file(settings.name)
        return Objective(settings.name, loss, getattr(loss, "kind", "retrieval"))
    if settings.name not in OBJECTIVES:
        raise RecipeError(
            f"objective.name: '{settings.name}' is unknown; known are {', '.join(OBJECTIVES)}, or my_file.py:my_loss"
        )
    objective = OBJECTIVES[settings.name](settings)
    if settings.dimensions and objective.prepare:
        raise RecipeError(f"objective.dimensions: {settings.name} has one target a text; leave it out")
    if settings.dimensions:
        return replace(objective, loss=matryoshka(objective.loss, settings.dimensions))
    return objective


def matryoshka(loss: Loss, dimensions: Sequence[int]) -> Loss:
    """The mean of the loss over embeddings cut to each of the dimensions (Kusupati et al. 2022).

    Every loss here scales its embeddings to length 1, so a cut one is scaled anew. Raises `RecipeError` for more
    dimensions than there are.
    """

    def cut_loss(queries: Float[Tensor, "B d"], documents: Tensor, batch: Any) -> Float[Tensor, ""]:
        width = queries.shape[1]
        if not all(0 < count <= width for count in dimensions):
            raise RecipeError(f"objective.dimensions: the embeddings have {width} dimensions, not {max(dimensions)}")
        losses = [loss(queries[:, :count], documents[:, :count], batch) for count in dimensions]
        return torch.stack(losses).mean()

    return cut_loss


def contrastive(settings: ObjectiveSettings) -> Objective:
    """InfoNCE over the batch: in-batch negatives, hard negatives, known positives and duplicates masked."""
    if settings.both_directions and not settings.in_batch:
        raise RecipeError(
            "objective.both_directions asks a positive to find its query among those of the batch, and "
            "objective.in_batch=false leaves only its own; drop one of the two"
        )
    score = LOSSES[settings.both_directions]
    suspicious = None if settings.guide is None else guided(settings.guide, settings.guide_margin)

    def loss(queries: Float[Tensor, "B d"], documents: Float[Tensor, "N d"], batch: PairBatch) -> Float[Tensor, ""]:
        if not settings.in_batch and len(batch.documents) == len(batch.queries):
            raise RecipeError("objective.in_batch=false needs hard negatives, and the data have none")
        excluded = batch.excluded if suspicious is None else torch.cat([batch.excluded, suspicious(batch)])
        targets, excluded, weights, owner = (
            part.to(queries.device) for part in (batch.targets, excluded, batch.weights, batch.owner)
        )
        if settings.in_batch:  # positives are there for all
            owner = owner.where(torch.arange(len(owner), device=owner.device) >= len(queries), -1)
        seen_by = None if settings.in_batch and settings.hard_negatives == "shared" else owner
        smoothing = settings.label_smoothing
        return score(queries, documents, targets, excluded, weights, settings.temperature, smoothing, seen_by)

    return Objective("contrastive", loss)


def guided(name: str, margin: float) -> Callable[[PairBatch], Int[Tensor, "e 2"]]:
    """Queries and documents of a batch that a guide takes for unjudged positives (GISTEmbed, Solatorio 2024).

    Those whose cosine with the query, as the guide embeds both, is above that of the query's positive less `margin`.
    The guide is opened at the first batch.
    """
    opened = cache(partial(Embedder.load, name))

    def suspicious(batch: PairBatch) -> Int[Tensor, "e 2"]:
        queries, documents = (
            torch.from_numpy(opened().encode(texts, prompt=opened().prompts.get(side, ""), progress=False))
            for side, texts in (("query", batch.queries), ("document", batch.documents))
        )
        queries, documents = functional.normalize(queries, dim=1), functional.normalize(documents, dim=1)
        rows = at_once(len(documents))

        def near(first: int) -> Int[Tensor, "e 2"]:
            cosines, targets = queries[first : first + rows] @ documents.T, batch.targets[first : first + rows, None]
            nearer = cosines > cosines.gather(1, targets) - margin
            return nearer.scatter(1, targets, False).nonzero() + torch.tensor([first, 0])

        return torch.cat([near(first) for first in range(0, len(queries), rows)])

    return suspicious


def kl(settings: ObjectiveSettings) -> Objective:
    """Distillation: the softmax over a query's own documents as the teacher has it."""

    def loss(queries: Float[Tensor, "B d"], documents: Float[Tensor, "N d"], batch: PairBatch) -> Float[Tensor, ""]:
        own = _taught(batch, queries)
        return kl_distillation(queries, documents, *own, settings.temperature, settings.teacher_temperature)

    return Objective("kl", loss)


def distilled_margins(settings: ObjectiveSettings) -> Objective:
    """Distillation: the distance between a query's positive and its negatives as the teacher has it."""

    def loss(queries: Float[Tensor, "B d"], documents: Float[Tensor, "N d"], batch: PairBatch) -> Float[Tensor, ""]:
        return margin_mse(queries, documents, *_taught(batch, queries))

    return Objective("margin_mse", loss)


def _taught(batch: PairBatch, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(owner, teacher's scores, weights). Raises `KinvecError` for a batch without them, or without negatives."""
    count = len(batch.queries)
    if len(batch.documents) == count or bool((batch.scores[:count] == 1).all()):
        missing = "hard negatives" if len(batch.documents) == count else "teacher's scores (pos_score, neg_score)"
        raise KinvecError(f"the data have no {missing} to distil from; kinvec mine --reranker makes them")
    return batch.owner.to(queries.device), batch.scores.to(queries), batch.weights.to(queries)


def triplet(settings: ObjectiveSettings) -> Objective:
    """Triplets mined among the labelled texts of the batch; the log shows the share that still has a loss."""
    soft = settings.mining == "hard-soft-margin"

    def mined(texts: Float[Tensor, "n d"], batch: LabelBatch) -> Mined:
        labels = batch.labels.to(texts.device)
        return TRIPLETS[settings.mining](texts, labels, 0.0 if soft else settings.margin, settings.distance)

    def loss(texts: Float[Tensor, "n d"], documents: Tensor, batch: LabelBatch) -> Float[Tensor, ""]:
        return mined(texts, batch).loss

    def measures(texts: Float[Tensor, "n d"], documents: Tensor, batch: LabelBatch) -> dict[str, float]:
        return {"active_triplets": mined(texts, batch).active.item()}

    return Objective("triplet", loss, "labelled", measures)


def supcon(settings: ObjectiveSettings) -> Objective:
    """Supervised contrastive: every text of the same label is a positive, all others of the batch are negatives."""

    def loss(texts: Float[Tensor, "n d"], documents: Tensor, batch: LabelBatch) -> Float[Tensor, ""]:
        return sup_con(texts, batch.labels.to(texts.device), settings.temperature)

    return Objective("supcon", loss, "labelled")


def simcse(settings: ObjectiveSettings) -> Objective:
    """Every text twice, under two dropout masks: one should find the other (Gao et al. 2021)."""

    def loss(queries: Float[Tensor, "n d"], documents: Float[Tensor, "n d"], batch: TextBatch) -> Float[Tensor, ""]:
        own = torch.arange(len(queries), device=queries.device)
        weights, same = torch.ones(len(own), device=own.device), batch.duplicates.to(own.device)
        return LOSSES[False](queries, documents, own, same, weights, settings.temperature, settings.label_smoothing)

    return Objective("simcse", loss, "texts", texts=lambda batch: (batch.queries, batch.queries), noisy=True)


def embedding(settings: ObjectiveSettings) -> Objective:
    """Distillation of a larger model: each text's embedding is drawn to the teacher's, by mean squared error.

    The teacher's are brought to the student's dimensions by one fixed map (see `losses.turned`) and to length 1.
    """
    if settings.teacher is None:
        raise RecipeError("objective.name=embedding needs a teacher; set objective.teacher=MODEL")
    opened = cache(partial(Embedder.load, settings.teacher))

    def taught(texts: Sequence[str]) -> Float[Tensor, "n t"]:
        prompt = opened().prompts.get("document", "")
        return functional.normalize(torch.from_numpy(opened().encode(texts, prompt=prompt, progress=False)), dim=1)

    def prepare(student: Embedder, sample: Sequence[str]) -> Objective:
        before = torch.from_numpy(student.encode(sample, progress=False))
        to_student = turned(taught(sample), functional.normalize(before, dim=1))

        def distances(texts: Float[Tensor, "n d"], batch: TextBatch) -> Float[Tensor, " n"]:
            wanted = functional.normalize(taught(batch.queries) @ to_student, dim=1).to(texts)
            return (functional.normalize(texts, dim=1) - wanted).square().sum(1)

        def measures(texts: Float[Tensor, "n d"], documents: Tensor, batch: TextBatch) -> dict[str, float]:
            return {"teacher_cosine": 1 - distances(texts, batch).mean().item() / 2}

        def loss(texts: Float[Tensor, "n d"], documents: Tensor, batch: TextBatch) -> Float[Tensor, ""]:
            return distances(texts, batch).mean()

        return Objective("embedding", loss, "texts", measures)

    return Objective("embedding", _not_ready, "texts", prepare=prepare)


def language(task: Task) -> Callable[[ObjectiveSettings], Objective]:
    """An objective that predicts tokens: hidden ones where they stand (mlm) or one before (mntp), or the next (clm)."""

    def make(settings: ObjectiveSettings) -> Objective:
        def ask_of(tokenizer: Any, texts: Pack) -> Cloze:
            hidden = 0 if task == "clm" else hidden_token(tokenizer, settings.masking)
            special = {*tokenizer.all_special_ids} - ({tokenizer.eos_token_id} if task == "clm" else set())
            return ask(texts, task, settings.masking, hidden, torch.tensor(sorted(special)), len(tokenizer))

        return Objective(task, _no_loss, "texts", ask=ask_of)

    return make


def _not_ready(queries: Tensor, documents: Tensor, batch: Any) -> Tensor:
    raise AssertionError("this objective is prepared before it has a loss")


def _no_loss(queries: Tensor, documents: Tensor, batch: Any) -> Tensor:
    raise AssertionError("an objective that predicts tokens has no loss of embeddings")


def scored(name: str, loss_of: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Objective]:
    """An objective over scored pairs; `loss_of` takes first and second embeddings, scores and the temperature."""

    def make(settings: ObjectiveSettings) -> Objective:
        def loss(texts: Float[Tensor, "n d"], documents: Tensor, batch: ScoredBatch) -> Float[Tensor, ""]:
            first, second = texts.chunk(2)
            return loss_of(first, second, batch.scores.to(texts), settings.temperature)

        return Objective(name, loss, "pairs")

    return make


OBJECTIVES: dict[str, Callable[[ObjectiveSettings], Objective]] = {
    "contrastive": contrastive,
    "kl": kl,
    "margin_mse": distilled_margins,
    "triplet": triplet,
    "supcon": supcon,
    "cosent": scored("cosent", lambda a, b, scores, t: cosent(paired_cosine(a, b), scores, t)),
    "angle": scored("angle", lambda a, b, scores, t: cosent(paired_angle(a, b), scores, t)),
    "simcse": simcse,
    "embedding": embedding,
    "mlm": language("mlm"),
    "mntp": language("mntp"),
    "clm": language("clm"),
    "cosine": scored("cosine", lambda a, b, scores, t: cosine_regression(paired_cosine(a, b), scores)),
}


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
