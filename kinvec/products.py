"""Linear products in bfloat16 on CPUs: the bias is added within the product, by oneDNN.

torch fills the output with the bias, reads it back and adds the product, and has oneDNN read the weights as they lie.
Once the output is larger than the cache this takes a seventh to a third longer (docs/experiments.md). The operators
used here are those that torch has for compiled models.

Shapes: r = rows (tokens), i = inputs, o = outputs of a layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinvec.machine import multiplies_bf16

FEW = 1024
"""Rows below which the output lies in the cache, and laying out the weights anew costs more than it brings."""


def linear(
    x: Float[Tensor, "*r i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*r o"]:
    """`torch.nn.functional.linear`, also under autocast."""
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    rows = x.shape[:-1].numel()
    if x.device.type != "cpu" or dtype != torch.bfloat16 or rows < FEW or not _there():
        return torch.nn.functional.linear(x, weight, bias)
    flat = x.reshape(rows, -1).to(dtype).contiguous()
    out = Linear.apply(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.view(*x.shape[:-1], -1)


@cache
def _there() -> bool:
    """Whether this torch has oneDNN and these operators, and the processor multiplies bfloat16."""
    found = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return found and multiplies_bf16(torch.device("cpu"))


class Linear(torch.autograd.Function):
    """x · weightᵀ + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "r i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
    ) -> Float[Tensor, "r o"]:
        ctx.save_for_backward(x, weight)
        laid = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), len(x))  # as oneDNN reads it fastest
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "r o"]) -> Any:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            grad @ weight if for_x else None,
            grad.t() @ x if for_weight else None,
            grad.sum(0) if for_bias else None,
        )
