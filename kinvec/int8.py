"""int8 for encoding: linear layers multiply 8-bit integers, each token and each output with a scale of its own.

Weights are rounded once, activations as they come, so that nothing is calibrated (the vector-wise quantisation of
LLM.int8(), Dettmers et al. 2022). Before that both are turned by the same orthogonal matrix, which changes no product,
(x H) · (w H) = x · w, and leaves no number that stands out and takes the codes from all others (QuaRot, Ashkboos et al.
2024). Sums of integers are exact: neighbours, rows and threads change no bit of a product. Attention, norms and all
else stay in bf16 where the processor multiplies it, else in float32.

Shapes: T = tokens, i = inputs, o = outputs of a layer, p = inputs filled up to whole vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinvec.contracts import KinvecError
from kinvec.fused import fuse_projections
from kinvec.kernels import LANES, compiled_for, rounded, scaled
from kinvec.machine import multiplies_bytes

MOST = 127  # codes of weights are −127 to 127
FINE = MOST if multiplies_bytes() else 63  # codes of activations are −FINE to FINE: twice 127 · 127 fits into 16 bits
ZERO = FINE + 1  # added to them: processors multiply unsigned bytes by signed ones
GROUP = 128  # numbers that are turned together, at most: int8.c holds them in registers, and more brings nothing
TINY = 1e-20  # the least scale


class Int8Linear(nn.Module):
    """Linear layers that read the same input as one product of 8-bit integers, their outputs side by side."""

    bias: Tensor

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = turned(torch.cat([layer.weight.detach().float() for layer in layers]))
        biases: list[Any] = [layer.bias for layer in layers]  # all of them, or none
        bias = torch.zeros(len(weight)) if biases[0] is None else torch.cat(biases).detach().float()
        scale = _scales(weight, MOST)
        codes = weight.div_(scale).round_().to(torch.int8)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", bias)
        self._zeros = torch.zeros(len(scale), dtype=torch.long)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)  # as the processor's kernel reads it

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """The layers' outputs, in the type of x."""
        codes, scale = round_tokens(x.reshape(-1, x.shape[-1]))
        out = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, ZERO, self._packed, self.scale, self._zeros, None, 1.0, 0, x.dtype, "none", [], ""
        )
        if compiled_for(out):
            scaled(out, scale, self.bias)
        else:
            torch.addcmul(self.bias.to(x.dtype), out, scale.to(x.dtype), out=out)
        return out.view(*x.shape[:-1], -1)


def round_tokens(x: Float[Tensor, "T i"]) -> tuple[UInt8[Tensor, "T p"], Float[Tensor, "T 1"]]:
    """Codes and scales of activations: what is `turned` is scale · (code − ZERO), to half a scale."""
    if compiled_for(x):
        return rounded(x, _turn(x.shape[1])[1], FINE, TINY)
    x = turned(x.float())
    scale = _scales(x, FINE)
    return x.div_(scale).add_(ZERO + 0.5).to(torch.uint8), scale  # cut off, which rounds: none is negative


def _scales(x: Float[Tensor, "n p"], most: int) -> Float[Tensor, "n 1"]:
    """How far apart codes are in each row, if its largest number is to be `most`."""
    return x.abs().amax(-1, keepdim=True).clamp_(min=TINY * most).div_(most)


def turned(x: Float[Tensor, "n i"]) -> Float[Tensor, "n p"]:
    """Rows filled up with 0, and every group of their numbers turned: products of rows stay."""
    filled = nn.functional.pad(x, (0, -x.shape[1] % LANES))
    matrix, _ = _turn(x.shape[1])
    return (filled.view(-1, len(matrix)) @ matrix).view(filled.shape)


@cache
def _turn(inputs: int) -> tuple[Float[Tensor, "group group"], Float[Tensor, " group"]]:
    """Sylvester's Hadamard matrix with signs for its rows, and the signs: what turns groups of a row's numbers.

    A group is the largest power of two that divides the row when it is filled up, at most GROUP. The matrix gathers
    what all numbers share into one; with the signs of Rudin and Shapiro before it, that too is spread evenly.
    """
    filled = inputs + -inputs % LANES
    places = range(min(filled & -filled, GROUP))
    odd = torch.tensor([[(i & j).bit_count() % 2 for j in places] for i in places])
    signs = torch.tensor([1.0 - 2.0 * ((i & i >> 1).bit_count() % 2) for i in places])
    return signs[:, None] * (1.0 - 2.0 * odd) / len(places) ** 0.5, signs


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
