"""The compiled attention computes what attention in float64 computes, on any lengths, heads, masks and processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_attention import MASKS, text_mask
from torch import Tensor

from kinvec import kernels
from kinvec.attention import EqualLengthAttention, TextMask, packed_attention
from kinvec.attention import packed as in_pack
from kinvec.batching import Pack
from kinvec.kernels import Attention, attends, library

RUNS = ((2, 1), (1, 5), (3, 8), (1, 16), (2, 31), (1, 33), (1, 77), (1, 140))
HEADS = ((3, 3, 8, 8), (4, 2, 32, 32), (4, 1, 64, 48), (2, 2, 10, 6))  # query heads, others, widths of keys and values
SCALE = 0.3


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert library() is not None, "these tests need a C compiler"


def pack_of(runs: Sequence[tuple[int, int]]) -> Pack:
    lengths = tuple(length for texts, length in runs for _ in range(texts))
    places = torch.cat([torch.arange(length) for length in lengths])
    return Pack(places, places, lengths, (0,) * len(lengths), tuple(range(len(lengths))))


def projections(runs: Sequence[tuple[int, int]], sizes: tuple[int, int, int, int]) -> list[Tensor]:
    """Queries, keys and values as a joined projection leaves them: slices of one matrix."""
    heads, others, width, values = sizes
    parts = (heads * width, others * width, others * values)
    draws = torch.Generator().manual_seed(width)
    whole = torch.randn(sum(texts * length for texts, length in runs), sum(parts), generator=draws).bfloat16()
    shapes = ((heads, width), (others, width), (others, values))
    return [x.view(len(whole), *shape) for x, shape in zip(whole.split(parts, -1), shapes, strict=True)]


def attend(parts: Sequence[Tensor], runs: Any, mask: TextMask, dropout: float = 0.0) -> Tensor:
    biases = [mask.bias(0, length, parts[0]) for _, length in runs]
    return Attention.apply(*parts, pack_of(runs).runs, biases, SCALE, dropout)


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    """To what three roundings to bfloat16 on the way leave."""
    assert found is not None and expected is not None
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 0.006 and (found.double() - expected).abs().max() < 0.015 * expected.abs().max()


def assert_near_with_gradients(out: Tensor, single: list[Tensor], expected: Tensor, exact: list[Tensor]) -> None:
    """A result and what it gives its inputs, in bfloat16 and in float64."""
    assert_near(out, expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad)
    expected.backward(grad.double())
    for x, y in zip(single, exact, strict=True):
        assert_near(x.grad, y.grad)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", HEADS)
def test_it_and_its_gradients_are_those_of_float64(sizes: tuple[int, int, int, int], mask: str) -> None:
    single = [x.requires_grad_() for x in projections(RUNS, sizes)]
    exact = [x.detach().double().requires_grad_() for x in single]
    out = attend(single, RUNS, text_mask(mask))
    expected = EqualLengthAttention.apply(*exact, pack_of(RUNS), text_mask(mask), SCALE, 0.0, None)
    assert_near_with_gradients(out, single, expected, exact)


def test_a_text_is_alone_and_threads_change_no_bit() -> None:
    parts = projections(RUNS, HEADS[1])
    grad = torch.randn(len(parts[0]), 4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results(rows: slice, runs: Any) -> list[Tensor]:
        given = [x[rows].detach().requires_grad_() for x in parts]
        out = attend(given, runs, text_mask("none"))
        out.backward(grad[rows])
        return [out.detach(), *(x.grad for x in given if x.grad is not None)]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(slice(None), RUNS))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    first = 0
    for texts, length in RUNS:
        for _ in range(texts):
            rows = slice(first, first + length)
            assert all(torch.equal(x[rows], y) for x, y in zip(found[0], results(rows, ((1, length),)), strict=True))
            first += length


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_dropout_drops_is_dropped_in_the_gradients_too(rate: float) -> None:
    """Values that are the unit matrix make the probabilities visible, as dropout leaves them."""
    torch.manual_seed(0)
    texts, length, heads = 9, 44, 4
    q, k, _ = projections(((texts, length),), (heads, heads, 16, length))
    v = torch.eye(length).repeat(texts, 1)[:, None].expand(-1, heads, -1).bfloat16()
    single = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in single]
    out = attend(single, ((texts, length),), text_mask("none"), rate)

    def by_text(x: Tensor) -> Tensor:
        return x.view(texts, length, *x.shape[1:]).transpose(1, 2)

    keep = by_text(out.detach()) > 0
    share = keep.double().mean()
    assert abs(share - (1 - rate)) < 5 * (rate * (1 - rate) / keep.numel()) ** 0.5
    assert all(not torch.equal(keep[0, 0], other) for other in (keep[0, 1], keep[1, 0])), "heads and texts on their own"
    qs, ks, vs = map(by_text, exact)
    probs = torch.softmax(qs @ ks.transpose(-1, -2) * SCALE, -1) * keep / (1 - rate)
    expected = (probs @ vs).transpose(1, 2).reshape(out.shape)
    assert_near_with_gradients(out, single, expected, exact)


def test_a_saved_random_state_drops_the_same_places() -> None:
    parts, state = projections(RUNS, HEADS[0]), torch.get_rng_state()
    first, second = (attend(parts, RUNS, text_mask("none"), 0.3) for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(attend(parts, RUNS, text_mask("none"), 0.3), first) and not torch.equal(first, second)


def test_scores_far_apart_and_numbers_that_are_none() -> None:
    q, k, v = projections(((1, 40),), (1, 1, 8, 8))
    far = attend([q * 60.0, k * 60.0, v], ((1, 40),), text_mask("causal"))
    exact = EqualLengthAttention.apply(
        *((x * 60.0).double() for x in (q, k)), v.double(), pack_of(((1, 40),)), text_mask("causal"), SCALE, 0.0, None
    )
    assert_near(far, exact)
    q[7] = float("nan")
    found = attend([q, k, v], ((1, 40),), text_mask("none"))
    assert found[7].isnan().all() and not found[:7].isnan().any(), "a loss that is no number must be seen"


def test_it_serves_bfloat16_of_texts_that_fit_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    q, _, v = projections(((1, 40),), (4, 2, 32, 32))
    monkeypatch.setattr(kernels, "_in_c", lambda: type("Library", (), {"multiplies": staticmethod(lambda: 1)}))
    assert attends(q, v, 2048) and not attends(q, v, 2049)
    assert not attends(q.float(), v.float(), 40) and not attends(q[..., :31], v, 40)
    assert attends(q, v.repeat(1, 1, 4), 819) and not attends(q, v.repeat(1, 1, 4), 820)
    monkeypatch.setattr(kernels, "_in_c", lambda: type("Library", (), {"multiplies": staticmethod(lambda: 0)}))
    assert not attends(q, v, 40)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_takes_it(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and encoding alike: the same bits; elsewhere what torch computes."""
    q, k, v = (x.transpose(0, 1)[None] for x in projections(RUNS, HEADS[1]))
    layer, taken = torch.nn.Module().train(training), []
    for there in (True, False):
        monkeypatch.setattr("kinvec.attention.attends", lambda *_, there=there: there)
        with torch.no_grad(), in_pack(pack_of(RUNS)):
            taken.append(packed_attention(layer, q, k, v, text_mask("causal"), scaling=SCALE)[0][0])
    parts = [x[0].transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(taken[0], attend(parts, RUNS, text_mask("causal")))
    assert_near(taken[1], taken[0].double())


def test_processors_without_these_products_compute_the_same(monkeypatch: pytest.MonkeyPatch, afresh: None) -> None:
    """Code for the first 64-bit processors of the kind beside that for this very one."""
    parts = [x.requires_grad_() for x in projections(RUNS, HEADS[1])]
    found = []
    for flags in (kernels.FLAGS, tuple(flag for flag in kernels.FLAGS if flag != "-march=native")):
        monkeypatch.setattr(kernels, "FLAGS", flags)
        library.cache_clear()
        torch.manual_seed(0)
        out = attend(parts, RUNS, text_mask("causal"), 0.2)
        found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), parts)])
    assert not kernels._in_c().multiplies()
    for x, y in zip(*found, strict=True):
        assert_near(x, y.double())
        assert torch.equal(x == 0, y == 0)
