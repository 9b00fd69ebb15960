"""Hidden states of packed texts → one vector a text.

Shapes: T = tokens of the pack, n = texts, h = hidden width. `starts[i]` and `lengths[i]` place text i; its first
`skip[i]` tokens (a prompt) are left out. The names are those of sentence-transformers' `Pooling` module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Hidden = Float[Tensor, "T h"]
Places = Int[Tensor, " n"]
Vectors = Float[Tensor, "n h"]


def cls_pooling(hidden: Hidden, starts: Places, lengths: Places) -> Vectors:
    """The first token."""
    return hidden[starts]


def last_pooling(hidden: Hidden, starts: Places, lengths: Places) -> Vectors:
    """The last token."""
    return hidden[starts + lengths - 1]


def mean_pooling(hidden: Hidden, starts: Places, lengths: Places) -> Vectors:
    """The mean of all tokens (Reimers and Gurevych 2019)."""
    return _sum(hidden, starts, lengths) / lengths[:, None]


def sqrt_mean_pooling(hidden: Hidden, starts: Places, lengths: Places) -> Vectors:
    """The sum of all tokens divided by the square root of their number."""
    return _sum(hidden, starts, lengths) / lengths[:, None].sqrt()


def weighted_mean_pooling(hidden: Hidden, starts: Places, lengths: Places, first: Places | None = None) -> Vectors:
    """The mean weighted by position, 1 for the first token (SGPT, Muennighoff 2022).

    `first` counts the tokens skipped before each text: those left keep the weights of their original positions.
    """
    text = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    weight = torch.arange(len(text), device=hidden.device) - starts[text] + 1
    if first is not None:
        weight = weight + first[text]
    weight = weight.to(hidden.dtype)[:, None]
    total = torch.zeros(len(lengths), 1, dtype=hidden.dtype, device=hidden.device).index_add(0, text, weight)
    return _sum(hidden * weight, starts, lengths) / total


def max_pooling(hidden: Hidden, starts: Places, lengths: Places) -> Vectors:
    """The largest value of each dimension."""
    return torch.segment_reduce(hidden, "max", lengths=lengths, axis=0)


def _sum(hidden: Hidden, starts: Places, lengths: Places) -> Vectors:
    text = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    return torch.zeros(len(lengths), hidden.shape[1], dtype=hidden.dtype, device=hidden.device).index_add(
        0, text, hidden
    )


POOLINGS: dict[str, Callable[..., Vectors]] = {  # in the order in which sentence-transformers concatenates them
    "cls": cls_pooling,
    "max": max_pooling,
    "mean": mean_pooling,
    "mean_sqrt_len_tokens": sqrt_mean_pooling,
    "weightedmean": weighted_mean_pooling,
    "lasttoken": last_pooling,
}


def pool(
    hidden: Hidden, starts: Places, lengths: Places, modes: tuple[str, ...], skip: Places | None = None
) -> Float[Tensor, "n m_h"]:
    """Pool in float32 by every named mode, concatenated; the first `skip` tokens of each text are left out.

    A text with nothing but its prompt keeps its last token, so that no vector is undefined.
    """
    hidden = hidden.float()
    first = None
    if skip is not None and bool(skip.any()):
        first = torch.minimum(skip, lengths - 1)
        text = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
        inside = torch.arange(len(text), device=hidden.device) - starts[text] >= first[text]
        hidden, lengths = hidden[inside], lengths - first
        starts = lengths.cumsum(0) - lengths
    vectors = []
    for mode in modes:
        extra = {"first": first} if mode == "weightedmean" else {}
        vectors.append(POOLINGS[mode](hidden, starts, lengths, **extra))
    return torch.cat(vectors, dim=1)


class Dense(nn.Module):
    """A linear layer with an activation after pooling, as sentence-transformers' `Dense`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "n a"]) -> Float[Tensor, "n b"]:
        return self.activation(self.linear(x))


class Normalize(nn.Module):
    """Scale every vector to length 1."""

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return nn.functional.normalize(x, dim=-1)
