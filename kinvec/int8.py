"""int8 for encoding: linear layers multiply 8-bit integers, each token and each output with a scale of its own.

Weights are rounded once, activations as they come, so that nothing is calibrated (the vector-wise quantisation of
LLM.int8(), Dettmers et al. 2022, without its exception for outliers). A token has its own range, and sums of integers
are exact: neighbours, rows and threads change no bit of a product. Attention, norms and all else stay in bf16 where the
processor multiplies it, else in float32.

Shapes: T = tokens, i = inputs, o = outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinvec.contracts import KinvecError
from kinvec.fused import fuse_projections

MOST = 127  # codes are −127 to 127
ZERO = 128  # added to the codes of activations: processors multiply unsigned bytes by signed ones
SLAB = 2**18  # numbers that are rounded at a time: their float32 copies stay in the cache
FINEST = 1e-4  # the least step of codes, of the numbers themselves: nearly equal ones would lose it in float32
TINY = 1e-20  # the least step of zeros


class Int8Linear(nn.Module):
    """Linear layers that read the same input as one product of 8-bit integers, their outputs side by side.

    Activations are rounded between their least and their largest value, which are not symmetric about 0: x = middle +
    scale · codes. What the middle adds to an output is large where its weights do not sum to 0, and would drown the
    rest in bf16. So each output's mean weight is taken off before rounding, and its share added apart:
    x · w = scale · (codes · w′) + middle · sum(w′) + sum(x) · mean(w).
    """

    apart: Tensor

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        biases: list[Any] = [layer.bias for layer in layers]  # all of them, or none
        bias = torch.zeros(len(weight)) if biases[0] is None else torch.cat(biases)
        mean = weight.mean(1)
        weight -= mean[:, None]
        scale = weight.abs().amax(1).clamp_(min=TINY).div_(MOST)
        codes = weight.div_(scale[:, None]).round_().to(torch.int8)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("apart", torch.stack([codes.sum(1) * scale, mean, bias.detach().float()]))
        self._zeros = torch.zeros(len(scale), dtype=torch.long)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)  # as the processor's kernel reads it

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """The layers' outputs, in the type of x."""
        codes, scale, apart = round_tokens(x.reshape(-1, x.shape[-1]))
        out = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, ZERO, self._packed, self.scale, self._zeros, None, 1.0, 0, x.dtype, "none", [], ""
        )
        torch.addcmul(apart.to(x.dtype) @ self.apart.to(x.dtype), out, scale.to(x.dtype), out=out)
        return out.view(*x.shape[:-1], -1)


def round_tokens(x: Float[Tensor, "T i"]) -> tuple[UInt8[Tensor, "T i"], Float[Tensor, "T 1"], Float[Tensor, "T 3"]]:
    """Codes of activations, x = middle + scale · (code − ZERO) to half a scale; scales; and middle, sum of x, 1.

    A token's middle lies between its least and its largest value, MOST scales from either.
    """
    codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    apart = torch.ones(len(x), 3)
    rows = max(1, SLAB // x.shape[1])
    for start in range(0, len(x), rows):
        here = slice(start, start + rows)
        slab = x[here].to(torch.float32, copy=True)
        least, most = slab.amin(-1, keepdim=True), slab.amax(-1, keepdim=True)
        step = torch.maximum((most - least) / (2 * MOST), FINEST * (most.abs() + least.abs())).clamp_(min=TINY)
        middle = (least + most) / 2
        scale[here], apart[here, :1], apart[here, 1] = step, middle, slab.sum(-1)
        codes[here] = slab.mul_(1 / step).add_(ZERO + 0.5 - middle / step)  # cut off, which rounds: none is negative
    return codes, scale, apart


def quantise(model: nn.Module) -> None:
    """Put the model's linear layers into int8, in place: queries, keys and values as one product.

    The model is for encoding from then on. Raises `KinvecError` for one that has no linear layers.
    """
    fuse_projections(model, _joined)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight is not None:
                setattr(module, name, Int8Linear([child]))
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise KinvecError(
            f"{type(model).__name__}: none of its weights are in plain linear layers, so there is nothing for int8; "
            "use precision=bf16 or fp32"
        )
    model.requires_grad_(False)


def _joined(layers: Sequence[nn.Linear]) -> Int8Linear:
    """The layers in one, which hangs on the first of them; their own weights are let go."""
    joined = Int8Linear(layers)
    for layer in layers:
        layer.weight = layer.bias = None  # type: ignore[assignment]
    layers[0].joined = joined
    return joined
