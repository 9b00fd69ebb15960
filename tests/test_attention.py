"""Packed attention: states and gradients as of padded transformers, no text sees another, fusing changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import PACKED, PADDED, VOCABULARY, build
from torch import Tensor, nn

from kinvec import attention
from kinvec.adapters import LoraSettings, add_lora, merge_lora
from kinvec.attention import (
    EqualLengthAttention,
    TextMask,
    packed,
    packed_attention,
)
from kinvec.backbone import Backbone, _fillers, fuse
from kinvec.batching import Pack, Tokens, lay, pack
from kinvec.fused import Dropout, fuse_projections, replace_dropout

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (40, 1, 5, 13, 1, 5, 34, 2, 5, 8, 21, 40, 3)
TOLERANCE = 1e-4  # of the design, in float32


def random_tokens(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return lay(ids)


def everything(tokens: Tokens) -> Pack:
    return pack(tokens, range(len(tokens)))


def backbone_of(name: str) -> Backbone:
    model = build(name)
    return Backbone(model, pad_token=model.config.pad_token_id)


def padded_states(model: Any, tokens: Tokens) -> list[Tensor]:
    """Each text's hidden states from transformers itself: right padding and a two-dimensional mask."""
    width = int(max(tokens.lengths))
    pad = model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in tokens.rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens.rows])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [states[: len(row)] for states, row in zip(hidden, tokens.rows, strict=True)]


def packed_states(backbone: Backbone, tokens: Tokens) -> list[Tensor]:
    """The same from our backbone, put back into the order of the texts."""
    texts = everything(tokens)
    states = backbone(texts).split(list(texts.lengths))
    return [states[texts.rows.index(row)] for row in range(len(tokens))]


def gradients(model: Any, states: list[Tensor]) -> dict[str, Tensor]:
    """Parameter gradients of a fixed random projection of all states."""
    draw = torch.Generator().manual_seed(1)
    model.zero_grad(set_to_none=True)
    torch.stack([(s * torch.randn(s.shape, generator=draw)).sum() for s in states]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_padded_forward_and_gradients(name: str) -> None:
    tokens = random_tokens()
    plain = build(name)
    plain.set_attn_implementation("eager")
    backbone = backbone_of(name)
    assert backbone.packs

    ours, reference = packed_states(backbone, tokens), padded_states(plain, tokens)
    for mine, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0)
    with torch.no_grad():  # without gradients another kernel runs
        for mine, other in zip(packed_states(backbone, tokens), reference, strict=True):
            torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0)

    mine_by_name, other_by_name = gradients(backbone.model, ours), gradients(plain, reference)
    assert mine_by_name.keys() == other_by_name.keys() and len(mine_by_name) > 10
    for key, other in other_by_name.items():
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine_by_name[key] / scale, other / scale, atol=TOLERANCE, rtol=0, msg=key)


@pytest.mark.parametrize("name", PACKED)
def test_fillers_are_seen_by_no_text_and_leave_no_gradient(name: str) -> None:
    """In training a pack is filled up to a round number; without dropout its texts are those of encoding."""
    tokens, backbone = random_tokens(), backbone_of(name)
    counts: list[int] = []
    backbone.model.get_input_embeddings().register_forward_hook(lambda _, given, __: counts.append(given[0].numel()))
    plain = packed_states(backbone, tokens)
    expected = gradients(backbone.model, plain)
    filled = packed_states(backbone.train(), tokens)
    assert counts == [sum(LENGTHS), 180]
    for mine, other in zip(filled, plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    found = gradients(backbone.model, filled)
    for key, other in expected.items():
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(found[key] / scale, other / scale, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 2049, 8547, 16384])
def test_a_pack_is_filled_up_by_a_32nd_at_most(tokens: int) -> None:
    fillers = _fillers(tokens)
    assert 0 <= fillers <= tokens / 32
    assert (tokens + fillers) % (2 ** (math.floor(math.log2(tokens)) - 5) if tokens >= 64 else 1) == 0


@pytest.mark.parametrize("name", PADDED)
def test_models_without_custom_attention_give_what_transformers_gives(name: str) -> None:
    """Their texts go through padded; the reference is each text alone, unpadded."""
    tokens = random_tokens()
    plain, backbone = build(name), backbone_of(name)
    assert not backbone.packs
    ours = packed_states(backbone, tokens)
    for mine, ids in zip(ours, tokens.rows, strict=True):
        alone = plain(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(mine, alone, atol=TOLERANCE, rtol=0)
    mine_by_name = gradients(backbone.model, ours)
    reference = gradients(plain, padded_states(plain, tokens))
    for key, other in reference.items():
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine_by_name[key] / scale, other / scale, atol=TOLERANCE, rtol=0, msg=key)


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_no_text_sees_another(name: str) -> None:
    tokens = random_tokens()
    rows = tokens.rows
    rows[3] = [(i + 7 - 5) % (VOCABULARY - 5) + 5 for i in rows[3]]
    changed = lay(rows)
    backbone = backbone_of(name)
    with torch.no_grad():
        before, after = packed_states(backbone, tokens), packed_states(backbone, changed)
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        if row == 3:
            assert (old - new).abs().max() > 0.01
        else:
            torch.testing.assert_close(new, old, atol=1e-6, rtol=0)


def test_a_sliding_window_is_shorter_than_the_texts_and_is_felt() -> None:
    """In one layer with a window of 6 the first token must not reach the last of a long text."""
    tokens = random_tokens((20,))
    (text,) = tokens.rows
    changed = lay([[text[0] % 200 + 20, *text[1:]]])
    backbone = Backbone(build("mistral", num_hidden_layers=1), 0)
    with torch.no_grad():
        before, after = packed_states(backbone, tokens)[0], packed_states(backbone, changed)[0]
    moved = (before - after).abs().amax(1)
    assert (moved[:6] > 1e-4).all() and (moved[6:] == 0).all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_decoders_stay_causal_and_is_causal_false_makes_them_bidirectional(name: str) -> None:
    tokens = random_tokens((12, 5))
    first, second = tokens.rows
    changed = lay([[*first[:-1], first[-1] % 200 + 20], second])
    moved = {}
    for causal in (True, False):
        model = build(name)
        model.config.is_causal = causal
        backbone = Backbone(model, model.config.pad_token_id)
        with torch.no_grad():
            before, after = packed_states(backbone, tokens)[0], packed_states(backbone, changed)[0]
        moved[causal] = (before - after).abs().amax(1)
    assert (moved[True][:-1] == 0).all() and moved[True][-1] > 1e-3
    assert (moved[False][-5:] > 1e-5).all()


@pytest.mark.parametrize("name", ["bert", "modernbert", "nomic-bert", "llama", "gemma2", "gemma3"])
def test_bf16_autocast_is_close_to_float32_with_and_without_gradients(name: str) -> None:
    tokens = random_tokens((1, 7, 7, 12))
    model = build(name, spread=0.1)
    backbone = Backbone(model, model.config.pad_token_id)
    with torch.no_grad():
        exact = packed_states(backbone, tokens)
    exact_gradients = gradients(model, packed_states(backbone, tokens))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            rough = packed_states(backbone, tokens)
        trained = packed_states(backbone, tokens)
    for a, b, c in zip(exact, rough, trained, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.999
        assert torch.cosine_similarity(a.flatten(), c.float().flatten(), dim=0) > 0.999
    rough_gradients = gradients(model, trained)
    a, b = (torch.cat([g[key].flatten() for key in exact_gradients]) for g in (exact_gradients, rough_gradients))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99


# ---- the attention function itself ----

MASKS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,
    "causal": lambda b, h, i, j: j <= i,
    "window": lambda b, h, i, j: (i - j).abs() <= 1,
}
SHAPE = Pack(torch.arange(6), torch.arange(6), (1, 1, 4), (0, 0, 0), (0, 1, 2))


def heads() -> list[Tensor]:
    """Queries, keys and values in float64: two query heads to each of two key heads, values wider than keys."""
    draw = torch.Generator().manual_seed(3)
    sizes = ((6, 4, 2), (6, 2, 2), (6, 2, 3))
    return [torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes]


def text_mask(name: str) -> TextMask:
    rule = MASKS[name]
    return TextMask(rule if rule is not None else lambda b, h, i, j: (i >= 0) & (j >= 0))


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: str, softcap: float | None) -> Tensor:
    """Softmax attention written out text by text and head by head."""
    out, start, rule = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype), 0, MASKS[mask]
    for length in SHAPE.lengths:
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            for i in range(start, start + length):
                seen = [
                    j
                    for j in range(start, start + length)
                    if rule is None or rule(0, 0, torch.tensor(i), torch.tensor(j))
                ]
                scores = torch.stack([q[i, head] @ k[j, shared] * 0.4 for j in seen])
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                shares = torch.exp(scores) / torch.exp(scores).sum()
                out[i, head] = sum(shares[n] * v[j, shared] for n, j in enumerate(seen))
        start += length
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_loops_and_its_gradient_is_right(mask: str, softcap: float | None) -> None:
    """Grouped queries, values wider than keys, every mask, capped scores; gradients by finite differences."""
    q, k, v = heads()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return EqualLengthAttention.apply(q, k, v, SHAPE, text_mask(mask), 0.4, 0.0, softcap)

    expected = by_loops(q.detach(), k.detach(), v.detach(), mask, softcap)
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q, k, v))
        with packed(SHAPE):
            out, _ = packed_attention(nn.Identity().eval(), qs, ks, vs, text_mask(mask), 0.0, 0.4, softcap)
    torch.testing.assert_close(out[0], expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_gradient_with_dropout_is_that_of_the_masks_drawn() -> None:
    q, k, v = heads()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return EqualLengthAttention.apply(q, k, v, SHAPE, text_mask("causal"), 0.4, 0.5, 1.5)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    without = EqualLengthAttention.apply(q, k, v, SHAPE, text_mask("causal"), 0.4, 0.0, 1.5)
    assert (attend(q, k, v) - without).abs().max() > 0.1


def test_attention_dropout_replays_under_a_saved_random_state_and_keeps_the_mean() -> None:
    q, k, v = heads()
    state = torch.get_rng_state()
    draws = [EqualLengthAttention.apply(q, k, v, SHAPE, text_mask("none"), 0.4, 0.3, None) for _ in range(200)]
    torch.set_rng_state(state)
    again = EqualLengthAttention.apply(q, k, v, SHAPE, text_mask("none"), 0.4, 0.3, None)
    assert torch.equal(again, draws[0]) and not torch.equal(draws[1], draws[0])
    whole = EqualLengthAttention.apply(q, k, v, SHAPE, text_mask("none"), 0.4, 0.0, None)
    error = (torch.stack(draws).mean(0) - whole).abs().max()  # rescaling keeps the expectation
    spread = torch.stack(draws).std(0).max() / math.sqrt(len(draws))
    assert error < 5 * spread


def test_replaced_dropout_changes_no_name_and_no_weight() -> None:
    model = build("bert", hidden_dropout_prob=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    replace_dropout(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}


# ---- fused projections ----


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "qwen2", "gemma2"])
def test_fused_projections_change_neither_values_nor_gradients_nor_names(name: str) -> None:
    tokens = random_tokens()
    apart, joined = backbone_of(name), backbone_of(name)
    assert fuse_projections(joined.model) == 2
    assert apart.state_dict().keys() == joined.state_dict().keys()
    states, fused = packed_states(apart, tokens), packed_states(joined, tokens)
    for a, b in zip(states, fused, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    reference, ours = gradients(apart.model, states), gradients(joined.model, fused)
    assert reference.keys() == ours.keys()
    for key, other in reference.items():
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(ours[key] / scale, other / scale, atol=1e-5, rtol=0, msg=key)


def test_fused_projections_follow_changed_weights() -> None:
    tokens, backbone = random_tokens((4, 6)), backbone_of("bert")
    fuse(backbone)
    before = packed_states(backbone, tokens)
    with torch.no_grad():
        for key, parameter in backbone.model.named_parameters():
            if key.endswith("query.weight"):
                parameter.mul_(2.0)
    fresh = build("bert")
    fresh.load_state_dict(backbone.model.state_dict())
    expected = packed_states(Backbone(fresh, 0), tokens)
    after = packed_states(backbone, tokens)
    assert (before[1] - after[1]).abs().max() > 1e-3
    torch.testing.assert_close(after[1], expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_a_layer_with_an_adapter_is_never_fused(targets: str | list[str]) -> None:
    """Fusing would read the frozen weight and drop the adapter: its effect and its gradient must be there."""
    tokens, backbone = random_tokens((4, 9)), backbone_of("bert")
    base = packed_states(backbone, tokens)
    add_lora(backbone, LoraSettings(rank=2, alpha=8.0, targets=targets))
    assert fuse_projections(backbone.model) == 0
    start = packed_states(backbone, tokens)
    torch.testing.assert_close(start[1], base[1], atol=1e-6, rtol=0)  # adapters begin at zero
    moved = [p for key, p in backbone.model.named_parameters() if "lora_B" in key and ".query." in key]
    with torch.no_grad():
        for parameter in moved:
            parameter.normal_(0.0, 0.3)
    adapted = packed_states(backbone, tokens)
    assert len(moved) == 2 and (adapted[1] - base[1]).abs().max() > 1e-2
    found = gradients(backbone.model, adapted)
    assert found and all("lora_" in key for key in found)
    assert all(value.abs().max() > 0 for key, value in found.items() if "lora_A" in key and ".query." in key)
    merge_lora(backbone)
    torch.testing.assert_close(packed_states(backbone, tokens)[1], adapted[1], atol=1e-5, rtol=0)


def test_a_packed_model_outside_of_a_pack_is_our_mistake() -> None:
    backbone = backbone_of("bert")
    with pytest.raises(AssertionError, match="outside of packed"):
        backbone.model(input_ids=torch.tensor([[5, 6, 7]]))
    config: Any = backbone.model.config
    assert attention.IMPLEMENTATION == config._attn_implementation
