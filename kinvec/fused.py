"""What a model computes in one piece instead of several: projections of the same input, biases, passes over memory.

No weight changes its place or name, and no projection that carries an adapter is joined with others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kinvec.kernels import AddNorm, compiled_for, draw, dropped, keep_mask, masked, rescale
from kinvec.products import linear


class FusedProjections:
    """One matrix product for the query, key and value projections that read the same input."""

    def __init__(self, product: Callable[[Tensor], Tensor], widths: list[int]) -> None:
        self.product, self.widths = product, widths
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def project(self, index: int, x: Tensor) -> Tensor:
        """The output of projection `index` for x; the first one asked for computes all."""
        if x is not self._input or index not in self._outputs:
            parts = self.product(x).split(self.widths, -1)
            self._input, self._outputs = x, dict(enumerate(parts))
        part = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return part


def joined(layers: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Linear layers as one. The weights stay where they are and keep their names; each forward joins them."""

    def product(x: Tensor) -> Tensor:
        weight = torch.cat([*(layer.weight for layer in layers)])
        biases: tuple[Tensor, ...] = tuple(filter(torch.is_tensor, (layer.bias for layer in layers)))
        return linear(x, weight, torch.cat(biases) if biases else None)

    return product


PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


def fuse_projections(
    model: nn.Module, join: Callable[[Sequence[nn.Linear]], Callable[[Tensor], Tensor]] = joined
) -> int:
    """Fuse every attention layer's plain query, key and value projections; returns how many layers were fused.

    Only plain linear layers are fused: one that carries an adapter computes for itself. `join` makes one product of
    them.
    """
    count = 0
    for module in list(model.modules()):
        for names in PROJECTIONS:
            found = [getattr(module, name, None) for name in names]
            layers = tuple(layer for layer in found if type(layer) is nn.Linear)
            if len(layers) < len(names):
                continue
            if len({layer.bias is None for layer in layers}) > 1:
                continue
            fused = FusedProjections(join(layers), [layer.out_features for layer in layers])
            for index, layer in enumerate(layers):
                layer.forward = _bind(fused, index)  # type: ignore[method-assign, assignment]
            count += 1
    return count


def _bind(fused: FusedProjections, index: int) -> Callable[[Tensor], Tensor]:
    return lambda x: fused.project(index, x)


class _Dropout(torch.autograd.Function):
    """Compiled, the backward pass draws the same places again; else the mask is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p = p
        if compiled_for(x):
            ctx.chance = draw(p)
            return dropped(x, ctx.chance)
        keep = keep_mask(x.shape, p, x.device)
        ctx.save_for_backward(keep)
        return masked(x, keep).mul_(rescale(p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not ctx.saved_tensors:
            return dropped(grad.contiguous(), ctx.chance), None
        return masked(grad, ctx.saved_tensors[0]).mul_(rescale(ctx.p)), None


class Dropout(nn.Dropout):
    """`nn.Dropout` that keeps no mask for the backward pass, or a cheap one: two bytes an element instead of four."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return _Dropout.apply(x, self.p) if self.p < 1.0 else torch.zeros_like(x)


def _add_norm(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """BERT's output blocks, LayerNorm(input + dropout(dense(hidden))), with one pass after the product."""
    h, norm, p = module.dense(hidden_states), module.LayerNorm, module.dropout.p if module.training else 0.0
    fits = compiled_for(h) and compiled_for(input_tensor) and h.shape == input_tensor.shape
    if not fits or h.element_size() > input_tensor.element_size() or p == 1.0:
        return norm(module.dropout(h) + input_tensor)
    return AddNorm.apply(h, input_tensor, norm.weight, norm.bias, norm.eps, p, torch.is_grad_enabled())


def _is_output_block(module: nn.Module) -> bool:
    """A block of BERT or one of the many families that copied it: nothing but these three, and a norm over one axis."""
    children = dict(module.named_children())
    norm = children.get("LayerNorm")
    if children.keys() != {"dense", "dropout", "LayerNorm"} or not isinstance(children["dropout"], nn.Dropout):
        return False
    if not hasattr(children["dense"], "in_features"):
        return False
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) > 1 or not norm.elementwise_affine:
        return False
    return list(signature(type(module).forward).parameters) == ["self", "hidden_states", "input_tensor"]


@torch.no_grad()
def _normalises_last(block: Any) -> bool:
    """Whether an output block computes what BERT's does: asked of the block itself, whatever its code looks like."""
    norm, training = block.LayerNorm.weight, block.training
    widths = block.dense.in_features, len(norm)
    hidden, residual = (torch.linspace(-1.0, 1.0, 2 * width).view(2, width).to(norm) for width in widths)
    block.eval()
    with torch.autocast(norm.device.type, torch.bfloat16):  # a frozen base may be of another type than the norm
        same = torch.equal(block(hidden, residual), block.LayerNorm(block.dense(hidden) + residual))
    block.train(training)
    return same


def fuse_output_blocks(model: nn.Module) -> None:
    """Put BERT's output blocks into one pass, in training and encoding, so that both give the same bits."""
    for module in list(model.modules()):
        if _is_output_block(module) and _normalises_last(module):
            module.forward = MethodType(_add_norm, module)


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
    return linear(input, layer.weight, layer.bias)


def fuse_biases(model: nn.Module) -> None:
    """Have every plain linear layer add its bias within its product."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]


def replace_dropout(model: nn.Module) -> None:
    """Use the cheap dropout everywhere in the model; modules without parameters, so no weight changes its name."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
