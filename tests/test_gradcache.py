"""The gradient cache: chunks kept or recomputed give the loss and the gradients of one whole forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, build
from torch import Tensor

from kinvec.adapters import LoraSettings, add_lora
from kinvec.backbone import Backbone, fuse, set_dropout
from kinvec.batching import Pack, Tokens, cut, lay, pack
from kinvec.contracts import RecipeError
from kinvec.fused import replace_dropout
from kinvec.gradcache import backward
from kinvec.losses import info_nce, pairs
from kinvec.planner import chunks_to_keep, memory_budget, parse_bytes, saved_bytes_per_token
from kinvec.pooling import pool

pytestmark = pytest.mark.usefixtures("one_thread")

QUERIES = 6


def step_tokens() -> Tokens:
    """Six short queries, then six documents, of lengths 2 to 30."""
    draw = torch.Generator().manual_seed(0)
    lengths = [2, 5, 3, 5, 8, 2, 30, 12, 12, 25, 7, 19]
    return lay([torch.randint(5, VOCABULARY, (n,), generator=draw).tolist() for n in lengths])


class Step:
    """A tiny model, its texts in chunks, and the contrastive loss of their vectors."""

    def __init__(self, name: str, dropout: float, lora: bool = False, fused: bool = True) -> None:
        self.model = build(name)
        set_dropout(self.model, dropout)
        self.backbone = Backbone(self.model, self.model.config.pad_token_id)
        if lora:
            add_lora(self.backbone, LoraSettings(rank=2, dropout=dropout))
            for key, parameter in self.backbone.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=0.1)
        replace_dropout(self.backbone)
        if fused:
            fuse(self.backbone)
        self.backbone.train()
        self.tokens = step_tokens()

    def chunks(self, budget: int) -> list[Pack]:
        return [pack(self.tokens, rows) for rows in cut(self.tokens.lengths, budget)]

    def embed(self, texts: Pack) -> Tensor:
        return pool(self.backbone(texts), texts.starts, torch.tensor(texts.lengths), ("mean",))

    def loss(self, vectors: Tensor) -> Tensor:
        queries, documents = vectors[:QUERIES], vectors[QUERIES:]
        return info_nce(queries, documents, torch.arange(QUERIES), pairs([]), torch.ones(QUERIES), 0.3)

    def gradients(self, take: Callable[[], float], seed: int = 1) -> tuple[float, dict[str, Tensor], Tensor]:
        """Loss, gradients by name, and the random state afterwards."""
        torch.manual_seed(seed)
        self.backbone.zero_grad(set_to_none=True)
        value = take()
        found = {key: p.grad.clone() for key, p in self.backbone.named_parameters() if p.grad is not None}
        return value, found, torch.get_rng_state()

    def cached(self, budget: int, keep: int) -> tuple[float, dict[str, Tensor], Tensor]:
        return self.gradients(lambda: backward(self.embed, self.chunks(budget), self.loss, keep))

    def whole(self, chunks: Sequence[Pack]) -> tuple[float, dict[str, Tensor], Tensor]:
        """The same by plain autograd: all graphs at once, no cache."""

        def take() -> float:
            vectors = torch.cat([self.embed(chunk) for chunk in chunks])
            order = torch.tensor([row for chunk in chunks for row in chunk.rows])
            value = self.loss(vectors[order.argsort()])
            value.backward()
            return value.item()

        return self.gradients(take)


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, float]:
    """Cosine and ratio of norms of all gradients together, in float64."""
    assert a.keys() == b.keys() and a
    x, y = (torch.cat([g[key].flatten().double() for key in a]) for g in (a, b))
    return float(torch.cosine_similarity(x, y, dim=0)), float(x.norm() / y.norm())


@pytest.mark.parametrize("keep", [0, 2, 99])
@pytest.mark.parametrize("name", ["bert", "gemma2", "t5"])
def test_chunks_equal_one_whole_forward_without_dropout(name: str, keep: int) -> None:
    """`t5` goes through padded; the others packed."""
    step = Step(name, dropout=0.0)
    assert len(step.chunks(32)) > 4
    value, gradients, _ = step.cached(32, keep)
    whole_value, whole_gradients, _ = step.whole(step.chunks(10**6))
    assert value == pytest.approx(whole_value, rel=1e-5)
    similarity, ratio = cosine(gradients, whole_gradients)
    assert similarity >= 0.999999 and ratio == pytest.approx(1.0, abs=1e-5)
    for key, other in whole_gradients.items():
        torch.testing.assert_close(
            gradients[key], other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-3, msg=key
        )


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize(("name", "lora"), [("bert", False), ("llama", False), ("bert", True), ("mpnet", False)])
def test_recomputed_chunks_draw_the_same_dropout_to_the_bit(name: str, lora: bool, keep: int) -> None:
    """Kept or recomputed, the same chunks give the same loss, gradients and random state, bit for bit."""
    step = Step(name, dropout=0.2, lora=lora)
    kept_value, kept, kept_state = step.cached(32, 99)
    value, gradients, state = step.cached(32, keep)
    assert value == kept_value
    assert torch.equal(state, kept_state)
    assert gradients.keys() == kept.keys()
    assert all(torch.equal(gradients[key], kept[key]) for key in kept)
    quiet, _, _ = Step(name, dropout=0.0, lora=lora).cached(32, 99)
    assert value != quiet  # the dropout was there


@pytest.mark.parametrize("keep", [0, 2, 99])
def test_dropout_and_random_state_are_those_of_plain_autograd(keep: int) -> None:
    """Against the same chunks under autograd alone: the cache draws no number more, and none other."""
    step = Step("bert", dropout=0.2)
    value, gradients, state = step.cached(32, keep)
    plain_value, plain, plain_state = step.whole(step.chunks(32))
    assert torch.equal(state, plain_state)
    assert value == pytest.approx(plain_value, abs=1e-6)
    similarity, ratio = cosine(gradients, plain)
    assert similarity >= 0.999999 and ratio == pytest.approx(1.0, abs=1e-5)


def test_gradients_accumulate_over_two_steps_as_in_autograd() -> None:
    step = Step("bert", dropout=0.0)

    def twice() -> float:
        backward(step.embed, step.chunks(32), step.loss, 1)
        return backward(step.embed, step.chunks(32), step.loss, 1)

    _, once, _ = step.cached(32, 1)
    _, double, _ = step.gradients(twice)
    similarity, ratio = cosine(double, once)
    assert similarity >= 0.999999 and ratio == pytest.approx(2.0, rel=1e-5)


def test_a_loss_that_ignores_some_texts_gives_them_zero_gradients() -> None:
    """Their chunks are still walked backwards, with zeros, and nothing breaks."""
    step = Step("bert", dropout=0.0)
    value = backward(step.embed, step.chunks(32), lambda vectors: vectors[0].pow(2).sum(), 1)
    alone = step.embed(pack(step.tokens, [0])).pow(2).sum()
    assert value == pytest.approx(alone.item(), rel=1e-5)


# ---- how many chunks may be kept ----


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.floats(1, 1e6), st.integers(0, 10**9))
def test_the_plan_stays_within_its_budget(sizes: list[int], per_token: float, budget: int) -> None:
    kept = chunks_to_keep(sizes, per_token, budget)
    assert 0 <= kept <= len(sizes)
    held = sum(sizes[:kept]) + (max(sizes) if kept < len(sizes) else 0)
    assert kept == 0 or held * per_token <= budget
    if sum(sizes) * per_token <= 0.5 * budget:
        assert kept == len(sizes)
    assert chunks_to_keep(sizes, per_token, 2 * budget) >= kept


@pytest.mark.parametrize(
    ("text", "amount"), [("6GiB", 6 * 2**30), ("500MB", 500_000_000), ("1.5 gib", 3 * 2**29), ("1000", 1000)]
)
def test_amounts_of_memory(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount == memory_budget(text, torch.device("cpu"))
    assert memory_budget("auto", torch.device("cpu")) > 2**20


@pytest.mark.parametrize("text", ["much", "6 apples", "", "-3GB", "1.2.3GB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RecipeError, match="no amount of memory"):
        parse_bytes(text)


def test_saved_bytes_are_counted_and_the_random_state_is_left() -> None:
    """A model of twice the layers holds about twice as much; weights do not count; no number is drawn."""
    found = {}
    for layers in (2, 4):
        model: Any = build("bert", num_hidden_layers=layers)
        set_dropout(model, 0.1)
        backbone = Backbone(model, 0).train()
        state = torch.get_rng_state()
        found[layers] = saved_bytes_per_token(backbone, backbone, pack(step_tokens(), range(12)))
        assert torch.equal(torch.get_rng_state(), state)
    assert 4 * 32 * 4 < found[2] < found[4] < 2 * found[2]
