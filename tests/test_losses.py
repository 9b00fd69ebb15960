"""Losses against plain loops and against sentence-transformers on the same embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_models import WORDS
from torch import Tensor

from kinvec import losses
from kinvec.contracts import KinvecError, RecipeError
from kinvec.embedder import Embedder
from kinvec.losses import dense, info_nce, info_nce_both_ways, pairs
from kinvec.objectives import ObjectiveSettings, make_objective
from kinvec.sampling import PairBatch

pytestmark = pytest.mark.usefixtures("one_thread")


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def by_loops(
    queries: Tensor,
    documents: Tensor,
    targets: Tensor,
    excluded: Tensor,
    weights: Tensor,
    temperature: float,
    smoothing: float,
) -> float:
    """The loss as its definition reads, in Python floats."""
    total = 0.0
    for i, query in enumerate(queries.tolist()):
        open_to = [j for j in range(len(documents)) if not excluded[i, j]]
        scores = {j: cosine(query, documents[j].tolist()) / temperature for j in open_to}
        norm = math.log(sum(math.exp(score) for score in scores.values()))
        hit = norm - scores[int(targets[i])]
        even = sum(norm - score for score in scores.values()) / len(scores)
        total += float(weights[i]) * ((1 - smoothing) * hit + smoothing * even)
    return total / float(weights.sum())


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Queries, documents, a target each, anything but the target excluded, unequal weights."""
    b, n, d = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    targets = torch.randint(n, (b,), generator=generator)
    excluded = torch.rand(b, n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    excluded[torch.arange(b), targets] = False
    return {
        "queries": torch.randn(b, d, generator=generator, dtype=torch.float64),
        "documents": torch.randn(n, d, generator=generator, dtype=torch.float64),
        "targets": targets,
        "excluded": excluded,
        "weights": torch.rand(b, generator=generator, dtype=torch.float64) + 0.1,
    }


def as_pairs(problem: dict[str, Any]) -> dict[str, Tensor]:
    return {"excluded": problem["excluded"].nonzero()}


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.02, 0.05, 1.0]), st.sampled_from([0.0, 0.1, 0.9]))
def test_info_nce_is_its_definition(problem: dict[str, Any], temperature: float, smoothing: float) -> None:
    ours = info_nce(**problem | as_pairs(problem), temperature=temperature, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(by_loops(**problem, temperature=temperature, smoothing=smoothing), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.05, 1.0]), st.sampled_from([0.0, 0.1]))
def test_both_ways_is_the_mean_of_two_definitions(
    problem: dict[str, Any], temperature: float, smoothing: float
) -> None:
    """Back: each positive against the queries, of which those are left out that exclude it."""
    queries, documents, targets = problem["queries"], problem["documents"], problem["targets"]
    count = len(queries)
    closed = [[bool(problem["excluded"][other, targets[i]]) for other in range(count)] for i in range(count)]
    mirror = {
        "queries": documents[targets], "documents": queries, "targets": torch.arange(count),
        "excluded": torch.tensor(closed), "weights": problem["weights"],
    }  # fmt: skip
    forth = by_loops(**problem, temperature=temperature, smoothing=smoothing)
    back = by_loops(**mirror, temperature=temperature, smoothing=smoothing)
    ours = info_nce_both_ways(**problem | as_pairs(problem), temperature=temperature, label_smoothing=smoothing)
    assert ours.item() == pytest.approx((forth + back) / 2, abs=1e-9)


@pytest.mark.parametrize("loss", [info_nce, info_nce_both_ways])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_right_and_excluded_documents_get_none(loss: Any, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    documents = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    excluded = torch.zeros(3, 5, dtype=torch.bool)
    excluded[:, 4] = True  # nobody's: it must not move
    excluded[0, 1] = True
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def value(q: Tensor, d: Tensor) -> Tensor:
        return loss(q, d, torch.arange(3), excluded.nonzero(), weights, 0.3, smoothing)

    assert torch.autograd.gradcheck(value, (queries, documents))
    value(queries, documents).backward()
    assert documents.grad is not None
    assert (documents.grad[4] == 0).all() and (documents.grad[:4].abs().amax(1) > 0).all()


@pytest.mark.parametrize("loss", [info_nce, info_nce_both_ways])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_large_batch_in_blocks_is_the_batch_in_one(loss: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, when the scores of some queries are held at a time, the last block smaller."""
    torch.manual_seed(rows)
    start = [torch.randn(10, 8), torch.randn(15, 8)]
    targets, closed = torch.randperm(10), torch.rand(10, 15) < 0.3
    closed[torch.arange(10), targets] = False
    excluded = closed.nonzero()
    found = {}
    for held in (2**24, rows * 15):
        monkeypatch.setattr(losses, "SCORES", held)
        vectors = [side.clone().requires_grad_() for side in start]
        value = loss(*vectors, targets, excluded, torch.rand(10, generator=torch.Generator().manual_seed(0)), 0.1, 0.2)
        value.backward()
        found[held] = [value.detach(), *(side.grad for side in vectors)]
    for whole, blocks in zip(*found.values(), strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans())
def test_what_is_left_out_is_the_same_in_blocks_of_rows(problem: dict[str, Any], alone: bool) -> None:
    """Pairs in any order, some twice, and documents that one query alone sees."""
    closed = problem["excluded"].clone()
    count, documents = closed.shape
    listed = closed.nonzero()
    listed = torch.cat([listed, listed[:2]])[torch.randperm(len(listed) + len(listed[:2]))]
    assert torch.equal(pairs([row.nonzero()[:, 0].tolist() for row in closed]), closed.nonzero())
    seen_by = torch.randint(-1, count, (documents,)) if alone else None
    for j, query in enumerate(seen_by.tolist() if seen_by is not None else ()):
        closed[:, j] |= (torch.arange(count) != query) & (query >= 0)
    for first in range(count):
        for last in range(first, count + 1):
            assert torch.equal(dense(listed, slice(first, last), documents, seen_by), closed[first:last])


def test_excluding_everything_else_leaves_nothing_to_learn() -> None:
    excluded = (~torch.eye(3, dtype=torch.bool)).nonzero()
    loss = info_nce(torch.randn(3, 4), torch.randn(3, 4), torch.arange(3), excluded, torch.ones(3), 0.05)
    assert loss.item() == 0.0


@pytest.mark.parametrize("hard", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("both", [False, True])
def test_equals_sentence_transformers_on_the_same_embeddings(hard: int, temperature: float, both: bool) -> None:
    """Value and gradients of MultipleNegativesRankingLoss; its documents are positives, then negatives by column."""
    torch.manual_seed(0)
    columns = [torch.randn(6, 16, dtype=torch.float64).requires_grad_() for _ in range(2 + hard)]
    directions = ("query_to_doc", "doc_to_query") if both else ("query_to_doc",)
    peer = MultipleNegativesRankingLoss(
        model=None, scale=1 / temperature, directions=directions, partition_mode="per_direction"
    )
    theirs = peer.compute_loss_from_embeddings(columns, None)
    their_gradients = torch.autograd.grad(theirs, columns)
    excluded, weights = pairs([]), torch.ones(6, dtype=torch.float64)
    loss = info_nce_both_ways if both else info_nce
    ours = loss(columns[0], torch.cat(columns[1:]), torch.arange(6), excluded, weights, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, columns), their_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-9)


# ---- the contrastive objective on a batch ----


def batch_of(excluded: Tensor, owner: list[int], weights: list[float]) -> PairBatch:
    count, documents = excluded.shape
    return PairBatch(
        queries=[f"q{i}" for i in range(count)], documents=[f"d{j}" for j in range(documents)],
        targets=torch.arange(count), excluded=excluded.nonzero(), owner=torch.tensor(owner),
        weights=torch.tensor(weights), scores=torch.ones(documents), query_ids=[f"q{i}" for i in range(count)],
    )  # fmt: skip


@pytest.mark.parametrize("hard", ["shared", "own"])
@pytest.mark.parametrize("both", [False, True])
def test_hard_negatives_are_shared_or_own(hard: Literal["shared", "own"], both: bool) -> None:
    """Three queries; row 0 brought documents 3 and 4, row 2 brought document 5."""
    torch.manual_seed(0)
    owner = [0, 1, 2, 0, 0, 2]
    excluded = torch.zeros(3, 6, dtype=torch.bool)
    excluded[1, 2] = excluded[2, 3] = True
    batch = batch_of(excluded, owner, [1.0, 0.5, 1.0])
    queries, documents = torch.randn(3, 8), torch.randn(6, 8)
    closed = excluded.clone()
    if hard == "own":
        for row in range(3):
            for column in range(3, 6):
                closed[row, column] |= owner[column] != row
    objective = make_objective(
        ObjectiveSettings(hard_negatives=hard, both_directions=both, temperature=0.1, label_smoothing=0.05)
    )
    arguments = (queries, documents, batch.targets, closed, batch.weights)
    expected = by_loops(*arguments, temperature=0.1, smoothing=0.05)
    if both:
        back = (documents[:3], queries, batch.targets, excluded[:, :3].T, batch.weights)
        expected = (expected + by_loops(*back, temperature=0.1, smoothing=0.05)) / 2
    assert objective.loss(queries, documents, batch).item() == pytest.approx(expected, abs=1e-5)
    assert objective.texts(batch) == (batch.queries, batch.documents)
    assert torch.equal(batch.excluded, excluded.nonzero())  # the batch itself is left as it was


def test_own_negatives_alone() -> None:
    """NeMo's GPT embedding: a softmax over the positive and the query's own negatives, nothing of other queries."""
    torch.manual_seed(0)
    owner = [0, 1, 2, 0, 1, 2]
    batch = batch_of(torch.zeros(3, 6, dtype=torch.bool), owner, [1.0, 1.0, 1.0])
    queries, documents = torch.randn(3, 8), torch.randn(6, 8)
    found = make_objective(ObjectiveSettings(in_batch=False, temperature=0.1)).loss(queries, documents, batch)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], documents[None], dim=-1)
    own = torch.arange(3)
    pairs = torch.stack([cosine[own, own], cosine[own, own + 3]], dim=1) / 0.1
    assert found.item() == pytest.approx(-pairs.log_softmax(1)[:, 0].mean().item(), abs=1e-6)
    with pytest.raises(RecipeError, match="both_directions asks .* drop one of the two"):
        make_objective(ObjectiveSettings(in_batch=False, both_directions=True))
    without = batch_of(torch.zeros(3, 3, dtype=torch.bool), [0, 1, 2], [1.0, 1.0, 1.0])
    with pytest.raises(RecipeError, match="in_batch=false needs hard negatives"):
        make_objective(ObjectiveSettings(in_batch=False)).loss(queries, documents[:3], without)


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_a_guide_masks_what_it_finds_nearer_than_the_positive(tiny_folder: Any, margin: float) -> None:
    """As it embeds the texts itself, behind its own prompts; the positive stays, whatever the guide thinks of it."""
    texts = [" ".join(WORDS[i : i + 5]) for i in range(0, 45, 5)]
    batch = replace(
        batch_of(torch.zeros(3, 6, dtype=torch.bool), [0, 1, 2, 0, 1, 2], [1.0] * 3),
        queries=texts[:3], documents=texts[3:],
    )  # fmt: skip
    guide = Embedder.load(tiny_folder)
    ours, theirs = (torch.from_numpy(guide.encode(side)) for side in (batch.queries, batch.documents))
    cosines = torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=-1)
    closed = cosines > cosines.diag()[:, None] - margin
    closed[torch.arange(3), torch.arange(3)] = False
    assert 0 < closed.sum() < 15
    settings = {"guide": str(tiny_folder), "guide_margin": margin, "temperature": 0.1}
    queries, documents = torch.randn(3, 8), torch.randn(6, 8)
    found = make_objective(ObjectiveSettings(**settings)).loss(queries, documents, batch)
    expected = by_loops(queries, documents, batch.targets, closed, batch.weights, temperature=0.1, smoothing=0.0)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def taught_batch() -> tuple[PairBatch, Tensor, Tensor]:
    """Three queries with two, no and one negative; teacher's scores of every document for the query that brought it."""
    torch.manual_seed(1)
    owner = [0, 1, 2, 0, 0, 2]
    batch = batch_of(torch.zeros(3, 6, dtype=torch.bool), owner, [1.0, 0.5, 2.0])
    return replace(batch, scores=torch.rand(6)), torch.randn(3, 8), torch.randn(6, 8)


def test_kl_is_that_of_the_softmaxes_over_a_querys_own_documents() -> None:
    batch, queries, documents = taught_batch()
    objective = make_objective(ObjectiveSettings(name="kl", temperature=0.1, teacher_temperature=0.5))
    expected = 0.0
    for row, weight in enumerate(batch.weights.tolist()):
        own = [j for j, owner in enumerate(batch.owner.tolist()) if owner == row]
        student = torch.tensor([cosine(queries[row].tolist(), documents[j].tolist()) for j in own]) / 0.1
        teacher = batch.scores[own] / 0.5
        divergence = torch.nn.functional.kl_div(student.log_softmax(0), teacher.softmax(0), reduction="sum")
        expected += weight * divergence.item() / 3.5
    queries.requires_grad_(True)
    found = objective.loss(queries, documents, batch)
    assert found.item() == pytest.approx(expected, abs=1e-5) and found.item() > 0.01
    found.backward()
    assert queries.grad is not None and queries.grad.isfinite().all() and queries.grad[0].abs().sum() > 0


def test_margin_mse_is_over_margins_of_positive_and_own_negatives() -> None:
    batch, queries, documents = taught_batch()
    found = make_objective(ObjectiveSettings(name="margin_mse")).loss(queries, documents, batch)
    errors: dict[int, list[float]] = {0: [], 2: []}
    for j in range(3, 6):
        row = int(batch.owner[j])
        ours = cosine(queries[row].tolist(), documents[row].tolist()) - cosine(
            queries[row].tolist(), documents[j].tolist()
        )
        errors[row].append((ours - float(batch.scores[row] - batch.scores[j])) ** 2)
    expected = (1.0 * sum(errors[0]) / 2 + 2.0 * errors[2][0]) / 3
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["kl", "margin_mse"])
def test_gradients_of_distillation_have_the_same_bits_again_on_two_threads(name: str) -> None:
    """A query's gradient is a sum over the documents it brought, which threads must not add in turns."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    owner = torch.arange(512).repeat(4)
    batch = batch_of(torch.zeros(512, 2048, dtype=torch.bool), owner.tolist(), [1.0] * 512)
    batch = replace(batch, scores=torch.rand(2048))
    objective = make_objective(ObjectiveSettings(name=name))
    queries, documents, found = torch.randn(512, 256), torch.randn(2048, 256), []
    for _ in range(4):
        own = queries.clone().requires_grad_()
        objective.loss(own, documents, batch).backward()
        found.append(own.grad)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", ["kl", "margin_mse"])
def test_a_teacher_that_said_nothing_is_missed(name: str) -> None:
    batch, queries, documents = taught_batch()
    objective = make_objective(ObjectiveSettings(name=name))
    with pytest.raises(KinvecError, match="no teacher's scores"):
        objective.loss(queries, documents, replace(batch, scores=torch.tensor([1.0, 1, 1, 0, 0, 0])))
    alone = batch_of(torch.zeros(3, 3, dtype=torch.bool), [0, 1, 2], [1.0] * 3)
    with pytest.raises(KinvecError, match="no hard negatives"):
        objective.loss(queries, documents[:3], replace(alone, scores=torch.rand(3)))


@pytest.mark.parametrize("dimensions", [[8], [8, 4, 2], [3]])
def test_matryoshka_is_the_mean_over_cut_and_rescaled_embeddings(dimensions: list[int]) -> None:
    torch.manual_seed(0)
    batch = batch_of(torch.zeros(5, 5, dtype=torch.bool), list(range(5)), [1.0] * 5)
    queries, documents = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    whole = make_objective(ObjectiveSettings(dimensions=dimensions, temperature=0.2))
    plain = make_objective(ObjectiveSettings(temperature=0.2))
    rescaled = [
        plain.loss(*(torch.nn.functional.normalize(side[:, :count], dim=1) for side in (queries, documents)), batch)
        for count in dimensions
    ]
    expected = sum(loss.item() for loss in rescaled) / len(rescaled)
    assert whole.loss(queries, documents, batch).item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(RecipeError, match="the embeddings have 8 dimensions, not 9"):
        make_objective(ObjectiveSettings(dimensions=[9])).loss(queries, documents, batch)


def test_a_users_own_loss_comes_from_their_file(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def my_loss(queries, documents, batch):\n    return (queries - documents[batch.targets]).pow(2).sum()\n"
    )
    objective = make_objective(ObjectiveSettings(name=f"{file}:my_loss"))
    queries, documents = torch.ones(2, 3), torch.zeros(2, 3)
    batch = batch_of(torch.zeros(2, 2, dtype=torch.bool), [0, 1], [1.0, 1.0])
    assert objective.loss(queries, documents, batch).item() == 6.0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("contrastif", r"objective\.name: 'contrastif' is unknown; known are contrastive"),
        ("nowhere.py:loss", r"there is no file 'nowhere\.py'"),
        ("{file}:other", r"mine\.py' has no function 'other'"),
        ("{broken}:loss", r"broken\.py"),
    ],
)
def test_an_objective_that_is_not_there(tmp_path: Any, name: str, sentence: str) -> None:
    (tmp_path / "mine.py").write_text("def my_loss(q, d, b): return q.sum()\n")
    (tmp_path / "broken.py").write_text("def my_loss(q, d, b) return q.sum()\n")
    name = name.format(file=tmp_path / "mine.py", broken=tmp_path / "broken.py")
    with pytest.raises(RecipeError, match=sentence):
        make_objective(ObjectiveSettings(name=name))
