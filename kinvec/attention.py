"""Attention over packed texts: every text sees itself alone, without padding, forward and backward.

Any Hugging Face model that takes a custom attention function runs on it (`install`). The model's own mask rule
(causal, bidirectional, sliding window) is taken from transformers, so each family keeps its exact semantics; we only
ask it about one text at a time. Kernels: `torch.nn.attention.varlen` on CUDA in half precision without dropout;
`kernels.Attention` on CPUs that multiply bfloat16 in vectors; everywhere else texts of equal length share one batched
matrix product, and what lies between the products is `kernels.softmax`.

Shapes: T = tokens of the pack, H = query heads, K = key/value heads, D = head width; g texts of a run have length L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kinvec.batching import Pack
from kinvec.contracts import KinvecError
from kinvec.kernels import Attention, attends, softmax, softmax_backward

IMPLEMENTATION = "kinvec_packed"
_PACK: ContextVar[Pack | None] = ContextVar("pack", default=None)


@contextmanager
def packed(pack: Pack) -> Iterator[None]:
    """Inside, models on our attention treat their one row of tokens as the texts of `pack`."""
    token = _PACK.set(pack)
    try:
        yield
    finally:
        _PACK.reset(token)


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer's first pass and of its second, which autograd runs when `packed` is over."""
    pack = _PACK.get()
    return nullcontext(), nullcontext() if pack is None else packed(pack)


class TextMask:
    """The model's mask rule for one kind of layer, evaluated within a text when asked."""

    def __init__(self, rule: Callable[..., Tensor]) -> None:
        self.rule = rule
        self._biases: dict[tuple[int, torch.dtype], Tensor | None] = {}

    def allowed(self, start: int, length: int, device: torch.device) -> Bool[Tensor, "L L"]:
        """Which keys each query of a text of `length` tokens that begins at `start` may see."""
        place = torch.arange(start, start + length, device=device)
        zero = torch.zeros((), dtype=torch.long, device=device)
        return self.rule(zero, zero, place[:, None], place[None, :]).expand(length, length)

    def bias(self, start: int, length: int, like: Tensor) -> Float[Tensor, "L L"] | None:
        """What to add to the scores; None where every token sees every other. Within a text distances alone decide."""
        key = (length, like.dtype)
        if key not in self._biases:
            allowed = self.allowed(start, length, like.device)
            bias = torch.zeros(length, length, dtype=like.dtype, device=like.device)
            self._biases[key] = None if bool(allowed.all()) else bias.masked_fill(~allowed, float("-inf"))
        return self._biases[key]

    def window(self, start: int, length: int, device: torch.device) -> tuple[int, int]:
        """How far a token of the longest text sees to its left and right; −1 is without limit."""
        allowed = self.allowed(start, length, device)
        left, right = int(allowed[-1].sum()) - 1, int(allowed[0].sum()) - 1
        return (-1 if left == length - 1 else left, -1 if right == length - 1 else right)


def install(model: nn.Module) -> bool:
    """Put a Hugging Face model on packed attention; False where its code has no place for a custom attention."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if not getattr(model, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _text_mask)
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    return True


CAUSAL_LAYERS = {  # they look back by construction, whatever mask they are given
    "chunked_attention", "linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding",
    "indexed_attention",
}  # fmt: skip


def set_direction(model: nn.Module, causal: bool) -> None:
    """Let every token see only what precedes it, or the whole text, by the model's own switch (transformers ≥ 5.2).

    Raises `KinvecError` for architectures some of whose layers are causal by construction.
    """
    from transformers import PreTrainedModel

    config: Any = model.config
    text = config.get_text_config()
    stuck = sorted(CAUSAL_LAYERS & set(getattr(text, "layer_types", None) or ()))
    if stuck and not causal:
        raise KinvecError(
            f"{config.model_type}: its {stuck[0]} layers stay causal, so it cannot become bidirectional; train it with "
            "attention=causal and pooling=lasttoken"
        )
    text.is_causal = causal
    for module in model.modules():  # some attention layers read only their own flag (StableLM, Nemotron)
        if not isinstance(module, PreTrainedModel) and isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = causal  # type: ignore[assignment]


def _text_mask(*, mask_function: Callable[..., Tensor], **_: Any) -> TextMask:
    return TextMask(mask_function)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T V"],
    attention_mask: TextMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 T H V"], None]:
    """The attention function that transformers calls in every layer."""
    pack = _PACK.get()
    assert pack is not None, "a model on packed attention was called outside of packed(...)"
    # Under autocast rotary positions turn queries and keys, but not values, back into float32.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _varlen_fits(q, dropout, softcap):
        return _varlen(q, k, v, pack, attention_mask, scale)[None], None
    mask = attention_mask or TextMask(lambda b, h, i, j: (i >= 0) & (j >= 0))
    if softcap is None and attends(q, v, max(pack.lengths)):
        biases = [mask.bias(first, length, q) for first, _, length in pack.runs]
        return Attention.apply(q, k, v, pack.runs, biases, scale, dropout)[None], None
    # In training also without gradients: a chunk that is embedded twice must give the same bits both times.
    if module.training or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return EqualLengthAttention.apply(q, k, v, pack, mask, scale, dropout, softcap)[None], None
    assert dropout == 0.0, "dropout is for training"
    return _forward_only(q, k, v, pack, mask, scale, softcap)[None], None


def _varlen_fits(q: Tensor, dropout: float, softcap: float | None) -> bool:
    return q.is_cuda and dropout == 0.0 and softcap is None and q.dtype in (torch.float16, torch.bfloat16)


def _varlen(q: Tensor, k: Tensor, v: Tensor, pack: Pack, mask: TextMask | None, scale: float) -> Float[Tensor, "T H V"]:
    """One kernel for texts of any lengths (FlashAttention, Dao 2023); CUDA only, no dropout, no softcap."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor((0, *pack.lengths), device=q.device).cumsum(0).to(torch.int32)
    longest = max(pack.lengths)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    last = int(ends[-1]) - longest  # texts lie shortest first, so the longest ends the pack
    window = mask.window(last, longest, q.device) if mask is not None else (-1, -1)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest, scale=scale, window_size=window
    )
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out


SLAB = 2**21  # scores at a time: they stay in the cache between the two products


def _slabs(pack: Pack, heads: int) -> Iterator[tuple[int, int, int]]:
    """The runs of equal length, cut into (first token, texts, tokens each) of at most SLAB scores, or of one text."""
    for start, texts, length in pack.runs:
        step = max(1, SLAB // (heads * length * length))
        for first in range(0, texts, step):
            yield start + first * length, min(step, texts - first), length


def _by_head(x: Float[Tensor, "T K D"], start: int, g: int, length: int, groups: int = 1) -> Float[Tensor, "gH L D"]:
    """The run's texts and heads as one batch; each key/value head serves `groups` query heads."""
    run = x[start : start + g * length].reshape(g, length, *x.shape[1:]).permute(0, 2, 1, 3)
    if groups > 1:
        run = run.repeat_interleave(groups, dim=1)
    return run.reshape(-1, length, x.shape[-1])


def _from_heads(x: Float[Tensor, "gH L D"], g: int, out: Float[Tensor, "gL K D"], groups: int = 1) -> None:
    """The inverse of `_by_head`, written into `out`; gradients of shared key/value heads are summed."""
    length, width = x.shape[1:]
    heads = x.reshape(g, -1, groups, length, width)
    heads = heads.sum(2) if groups > 1 else heads[:, :, 0]
    out.view(g, length, -1, width).copy_(heads.permute(0, 2, 1, 3))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, float, Tensor | None]:
    """Scores [gH, L, L], what they are still to be multiplied by, and the tanh of capped scores (Gemma 2)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if softcap is None:
        return scores, scale, None
    tanh = scores.mul_(scale / softcap).tanh_()
    return tanh.clone(), softcap, tanh


def _forward_only(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, mask: TextMask, scale: float, softcap: float | None
) -> Float[Tensor, "T H V"]:
    """Without gradients, in slabs; the fused kernel takes texts whose scores alone outgrow the cache."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    heads = q.shape[1]
    groups = heads // k.shape[1]
    for start, g, length in _slabs(pack, heads):
        bias = mask.bias(start, length, q)
        here = slice(start, start + g * length)
        if softcap is None and heads * length * length > SLAB:
            qs, ks, vs = (x[here].view(g, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            text = nn.functional.scaled_dot_product_attention(
                qs, ks, vs, attn_mask=bias, scale=scale, enable_gqa=groups > 1
            )
            out[here].view(g, length, *out.shape[1:]).copy_(text.transpose(1, 2))
            continue
        with torch.autocast(q.device.type, enabled=False):
            by_head = _by_head(q, start, g, length), _by_head(k, start, g, length, groups)
            scores, factor, _ = _scores(*by_head, scale, softcap)
            _, probs = softmax(scores, bias, factor, 0.0)
            _from_heads(torch.bmm(probs, _by_head(v, start, g, length, groups)), g, out[here])
    return out


class EqualLengthAttention(torch.autograd.Function):
    """Attention by batched matrix products over runs of equal length, with its own backward.

    One function for the whole pack: slicing per run inside autograd would add up a pack-sized gradient for every run.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd hands its arguments over one by one
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pack: Pack,
        mask: TextMask,
        scale: float,
        dropout: float,
        softcap: float | None,
    ) -> Float[Tensor, "T H V"]:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        groups = q.shape[1] // k.shape[1]
        saved: list[Tensor | None] = []
        with torch.autocast(q.device.type, enabled=False):
            for start, g, length in _slabs(pack, q.shape[1]):
                qs = _by_head(q, start, g, length)
                ks, vs = (_by_head(x, start, g, length, groups) for x in (k, v))
                scores, factor, tanh = _scores(qs, ks, scale, softcap)
                probs, seen = softmax(scores, mask.bias(start, length, q), factor, dropout)
                _from_heads(torch.bmm(seen, vs), g, out[start : start + g * length])
                saved += [qs, ks, vs, probs, tanh]
        ctx.save_for_backward(*saved)
        ctx.shapes = q.shape, k.shape, v.shape
        ctx.pack, ctx.scale, ctx.dropout, ctx.groups = pack, scale, dropout, groups
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "T H V"]) -> Any:
        dq, dk, dv = (grad.new_empty(shape) for shape in ctx.shapes)
        saved = ctx.saved_tensors
        for slab, (start, g, length) in enumerate(_slabs(ctx.pack, grad.shape[1])):
            qs, ks, vs, probs, tanh = saved[5 * slab : 5 * slab + 5]
            dout = _by_head(grad, start, g, length)
            dseen = torch.bmm(dout, vs.transpose(1, 2))
            dscores, seen = softmax_backward(probs, dseen, ctx.scale, ctx.dropout)
            if tanh is not None:
                dscores.mul_(1.0 - tanh * tanh)
            span = slice(start, start + g * length)
            _from_heads(torch.bmm(seen.transpose(1, 2), dout), g, dv[span], ctx.groups)
            _from_heads(torch.bmm(dscores, ks), g, dq[span])
            _from_heads(torch.bmm(dscores.transpose(1, 2), qs), g, dk[span], ctx.groups)
        return dq, dk, dv, None, None, None, None, None
