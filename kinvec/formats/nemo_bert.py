"""NeMo's names and layouts of a BERT's tensors, both ways: mcore and non-mcore, fused projections, ranks, padding.

Shapes: h = hidden width, f = width of the feed-forward layer, v = vocabulary, L = layers, R = tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinvec.contracts import KinvecError

VOCABULARY_MULTIPLE = 128  # NeMo's make_vocab_size_divisible_by


@dataclass(frozen=True)
class Part:
    """A module: its names, and the axis along which tensor-parallel ranks share its weight (None: each has it all)."""

    hf: str
    mcore: str
    other: str
    axis: int | None = None


OUTSIDE = (
    Part("embeddings.word_embeddings", *2 * ("embedding.word_embeddings",), axis=0),
    Part("embeddings.position_embeddings", *2 * ("embedding.position_embeddings",)),
    Part("embeddings.token_type_embeddings", *2 * ("embedding.tokentype_embeddings",)),
    Part("embeddings.LayerNorm", *2 * ("encoder.initial_layernorm",)),
    Part("pooler.dense", *2 * ("pooler.dense",)),
)
FUSED = Part("attention.self.query_key_value", "self_attention.linear_qkv", "self_attention.query_key_value", axis=0)
INSIDE = (  # of a layer
    FUSED,
    Part("attention.output.dense", "self_attention.linear_proj", "self_attention.dense", axis=1),
    Part("attention.output.LayerNorm", "post_att_layernorm", "input_layernorm"),
    Part("intermediate.dense", "mlp.linear_fc1", "mlp.dense_h_to_4h", axis=0),
    Part("output.dense", "mlp.linear_fc2", "mlp.dense_4h_to_h", axis=1),
    Part("output.LayerNorm", "post_mlp_layernorm", "post_attention_layernorm"),
)
SEPARATE = tuple(Part(f"attention.self.{name}", "", "", axis=0) for name in ("query", "key", "value"))
EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

# Heads of pre-training, and what Transformer Engine keeps beside its weights: no embedding depends on them.
LEFT_OUT = re.compile(r"_extra_state|position_ids$|^(lm_head|binary_head|output_layer|word_embeddings|cls)\.")
_LAYER = re.compile(r"(?:encoder|transformer)\.layers?\.(?:(\d+)\.)?(.+)\.(weight|bias)")
_NUMBER = re.compile(r"encoder\.layer\.(\d+)\.")
_OUTSIDE_BY_NAME = {part.mcore: part.hf for part in OUTSIDE}
_INSIDE_BY_NAME = {name: part.hf for part in INSIDE for name in (part.mcore, part.other)}
_AXES = {part.hf: part.axis for part in (*OUTSIDE, *INSIDE, *SEPARATE)}


def expected(layers: int) -> list[str]:
    """Hugging Face's names of all tensors of a BERT, but for the pooler, which not every one has."""
    kinds = ("weight", "bias")
    outside = [f"embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")]
    norms = [f"embeddings.LayerNorm.{kind}" for kind in kinds]
    inside = [part.hf for part in (*SEPARATE, *INSIDE) if part is not FUSED]
    return (
        outside + norms + [f"encoder.layer.{n}.{hf}.{kind}" for n in range(layers) for hf in inside for kind in kinds]
    )


def count_layers(tensors: Iterable[str]) -> int:
    """How many layers tensors of these Hugging Face names make up: the highest number counts."""
    return 1 + max((int(match[1]) for name in tensors if (match := _NUMBER.match(name))), default=-1)


def interleave(
    query: Float[Tensor, "h *w"], key: Float[Tensor, "h *w"], value: Float[Tensor, "h *w"], heads: int
) -> Float[Tensor, "h3 *w"]:
    """The fused projection [3h, …] as Megatron lays it out: head by head its query, key and value rows."""
    rows = [part.reshape(heads, 1, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(rows, dim=1).reshape(-1, *query.shape[1:])


def separate(fused: Float[Tensor, "h3 *w"], heads: int, legacy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each [h, …], of a fused projection [3h, …].

    `legacy` (NeMo before March 2024) has all query rows, then all key rows, then all value rows.
    """
    if legacy:
        query, key, value = fused.chunk(3)
    else:
        query, key, value = fused.reshape(heads, 3, -1, *fused.shape[1:]).unbind(1)
    width = fused.shape[0] // 3
    return tuple(part.reshape(width, *fused.shape[1:]) for part in (query, key, value))  # type: ignore[return-value]


def pad_vocabulary(table: Float[Tensor, "v h"]) -> Float[Tensor, "padded h"]:
    """The word embeddings with rows of zeros up to a multiple of 128."""
    return torch.nn.functional.pad(table, (0, 0, 0, -len(table) % VOCABULARY_MULTIPLE))


def to_nemo(tensors: Mapping[str, Tensor], layers: int, heads: int, mcore: bool) -> dict[str, Tensor]:
    """NeMo's tensors by name (with layer numbers) of Hugging Face's, which must be complete but for the pooler."""
    prefix = "model." if mcore else "model.language_model."
    found = {}
    for part in OUTSIDE:
        for kind in ("weight", "bias"):
            if (tensor := tensors.get(f"{part.hf}.{kind}")) is not None:
                padded = pad_vocabulary(tensor) if part.hf.endswith("word_embeddings") else tensor
                found[f"{prefix}{part.mcore}.{kind}"] = padded
    for layer in range(layers):
        inner = f"encoder.layer.{layer}."
        for part in INSIDE:
            for kind in ("weight", "bias"):
                name = f"{prefix}encoder.layers.{layer}.{part.mcore if mcore else part.other}.{kind}"
                if part is FUSED:
                    query, key, value = (tensors[f"{inner}{one.hf}.{kind}"] for one in SEPARATE)
                    found[name] = interleave(query, key, value, heads)
                else:
                    found[name] = tensors[f"{inner}{part.hf}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def stack_layers(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """As the sharded folder has them: one tensor [L, …] for all layers, under the name without the layer's number."""
    first = "model.encoder.layers.0."
    stacked = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.encoder.layers.")}
    for inner in (name.removeprefix(first) for name in tensors if name.startswith(first)):
        every = [tensors[f"model.encoder.layers.{layer}.{inner}"] for layer in range(layers)]
        stacked[f"model.encoder.layers.{inner}"] = torch.stack(every)
    return stacked


def shorten(name: str) -> str:
    """A tensor's name without the wrappers' prefixes (`model.`, `module.` of half precision, `language_model.`)."""
    return re.sub(r"^(?:model\.|module\.|language_model\.)+", "", name)


def from_nemo(tensors: Mapping[str, Tensor], heads: int, legacy: bool, first_layer: int = 0) -> dict[str, Tensor]:
    """Hugging Face's tensors of one rank's NeMo tensors, layers numbered or stacked; the vocabulary stays padded.

    `heads` are the rank's own. Raises `KinvecError` for a tensor that no BERT of NeMo has, an adapter's for example.
    """
    found: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name = shorten(full)
        if LEFT_OUT.search(name):
            continue
        for where, kind, value in _translated(name, tensor, first_layer, full):
            if where.endswith(FUSED.hf):
                in_thirds = legacy and FUSED.mcore not in name  # mcore has never had the old order
                for part, one in zip(SEPARATE, _separated(value, heads, in_thirds, full), strict=True):
                    found[f"{where.removesuffix(FUSED.hf)}{part.hf}.{kind}"] = one
            else:
                found[f"{where}.{kind}"] = value
    return found


def _separated(fused: Tensor, heads: int, legacy: bool, name: str) -> tuple[Tensor, Tensor, Tensor]:
    if not fused.ndim or fused.shape[0] % (3 * heads):
        raise KinvecError(f"'{name}' of shape {tuple(fused.shape)} has rows that {heads} attention heads do not share")
    return separate(fused, heads, legacy)


def _translated(name: str, tensor: Tensor, first_layer: int, full: str) -> Iterable[tuple[str, str, Tensor]]:
    """(Hugging Face module, weight or bias, tensor) of a NeMo tensor; several where it holds all layers."""
    outside, _, kind = name.rpartition(".")
    if outside in _OUTSIDE_BY_NAME and kind in ("weight", "bias"):
        return [(_OUTSIDE_BY_NAME[outside], kind, tensor)]
    match = _LAYER.fullmatch(name)
    inner = _INSIDE_BY_NAME.get(re.sub(r"^attention\.", "self_attention.", match[2])) if match else None
    if match is None or inner is None:
        raise KinvecError(
            f"the weights hold '{full}', which no BERT as Hugging Face builds it has; it cannot be converted"
        )
    if match[1] is not None:
        return [(f"encoder.layer.{first_layer + int(match[1])}.{inner}", match[3], tensor)]
    return [(f"encoder.layer.{layer}.{inner}", match[3], one) for layer, one in enumerate(tensor)]


def join_ranks(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors of those that R tensor-parallel ranks share, by Hugging Face's names.

    Biases are shared where the weight's rows are; what is not shared, every rank has, and the first one's is taken.
    """
    joined = {}
    for name, first in ranks[0].items():
        module, _, kind = re.sub(r"^encoder\.layer\.\d+\.", "", name).rpartition(".")
        axis = _AXES[module]
        shared = axis == 0 or (axis == 1 and kind == "weight")
        if any(name not in rank for rank in ranks):
            raise KinvecError(f"the tensor-parallel ranks hold different tensors: '{name}' is not in all of them")
        joined[name] = torch.cat([rank[name] for rank in ranks], dim=axis) if shared and axis is not None else first
    return joined
