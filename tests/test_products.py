"""Products with their bias in one: to rounding what float64 computes, forward and backward; else torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kinvec import products
from kinvec.products import FEW, linear

ROUNDING = 2.0**-8
SIZES = [((1500, 48), 80), ((3, 400, 33), 7), ((FEW - 1, 48), 80), ((FEW, 1), 1)]  # inputs, and how many outputs
needs_bf16 = pytest.mark.skipif(not products._there(), reason="this processor does not multiply bfloat16")


def inputs(shape: tuple[int, ...], outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(outputs)
    x, weight = torch.randn(shape, generator=draws), torch.randn(outputs, shape[-1], generator=draws)
    return x, weight, torch.randn(outputs, generator=draws) * 10.0


def assert_rounded(found: Tensor | None, exact: Tensor | None) -> None:
    """Sums are made in float32, and rounded once."""
    assert found is not None and exact is not None
    least = 1e-4 * float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, atol=least, rtol=ROUNDING)


@needs_bf16
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SIZES)
def test_a_product_and_its_gradients_are_rounded_once(shape: tuple[int, ...], outputs: int, biased: bool) -> None:
    given = [tensor.bfloat16().requires_grad_() for tensor in inputs(shape, outputs)[: 2 + biased]]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    out, expected = linear(*given), nn.functional.linear(*exact)
    assert out.dtype == torch.bfloat16
    assert_rounded(out, expected.detach())
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(given, exact, strict=True):
        assert_rounded(ours.grad, theirs.grad)


@needs_bf16
def test_under_autocast_weights_in_float32_get_their_gradients_in_float32() -> None:
    """Also of inputs that lie apart in memory; frozen weights get none."""
    x, weight, bias = inputs((1500, 96), 80)
    apart, weight = x[:, ::2].requires_grad_(), weight[:, :48].requires_grad_()
    found = []
    for product in (linear, nn.functional.linear):
        apart.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = product(apart, weight, bias)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and apart.grad is not None and weight.grad is not None
        assert apart.grad.dtype == weight.grad.dtype == torch.float32 and bias.grad is None
        found.append([out.detach(), apart.grad, weight.grad])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 2 * ROUNDING * theirs.norm()


def test_what_is_not_for_it_is_torchs_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, few rows, processors that do not multiply bfloat16."""
    given = inputs((1500, 48), 80)
    assert torch.equal(linear(*given), nn.functional.linear(*given))
    x, weight, bias = (tensor.bfloat16() for tensor in given)
    few = x[: FEW - 1]
    assert torch.equal(linear(few, weight, bias), nn.functional.linear(few, weight, bias))
    monkeypatch.setattr(products, "_there", lambda: False)
    assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
