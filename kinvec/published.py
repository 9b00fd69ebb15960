"""A folder's configuration and weight files; of models that came with code of their own, in transformers' words.

Such code (`auto_map` in config.json) is never run. Where transformers has the architecture by now, under another name
or with other keys, the folder's settings are translated here; the weights go in as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError
from kinvec.files.reading import read_object
from kinvec.vetting import refuse_bomb

SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip


def open_config(folder: Path) -> Any:
    """The transformers configuration of a folder.

    Raises `KinvecError` for an architecture that only the model's own code knows; what transformers raises passes.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    said = _said(folder)
    kind = str(said.get("model_type"))
    if not has_own_code(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if kind in TRANSLATIONS and "rope_parameters" not in said:  # which only transformers writes
        name, translate = TRANSLATIONS[kind]
        settings = translate(said)
        if settings is None or name not in CONFIG_MAPPING:
            raise KinvecError(needs_own_code(folder))
        return AutoConfig.for_model(name, **settings)
    if kind not in CONFIG_MAPPING:
        raise KinvecError(needs_own_code(folder))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vars(config).pop("auto_map", None)  # what is saved is transformers' own
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: safetensors, or where there are none torch's older files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise KinvecError(f"{folder}: no weights at all (model.safetensors, or pytorch_model.bin)")
    for path in files:
        refuse_bomb(path)
    return files


def reading(files: Sequence[Path]) -> dict[str, bool]:
    """How transformers is to read the files: old ones as tensors alone, without running anything in them."""
    return {"use_safetensors": files[0].suffix == ".safetensors", "weights_only": True}


def needs_own_code(folder: Path) -> str:
    """The sentence for a model that cannot be opened without its authors' code."""
    names = _said(folder)["auto_map"]
    code = names.get("AutoModel") or next(iter(names.values()))
    return (
        f"{folder}: the model needs code of its authors ({code}), which kinvec does not run; take a model whose "
        "architecture transformers has (docs/models.md lists some)"
    )


def has_own_code(folder: Path) -> bool:
    """Whether the folder's configuration names code of its authors."""
    names = _said(folder).get("auto_map")
    return isinstance(names, dict) and bool(names)


def _said(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "config.json")
    except KinvecError:  # transformers says what is wrong with it
        return {}


def _gte(said: dict[str, Any]) -> dict[str, Any] | None:
    """Alibaba-NLP/new-impl's NewConfig (gte-multilingual-base, gte-base-en-v1.5, …) as transformers' GTE.

    Its "ntk" scaling by s multiplies the base of the rotary positions by s and divides all their frequencies by
    s^(2/d) (https://kexue.fm/archives/9706): that is transformers' "linear" scaling on the larger base.
    """
    scaling = said.get("rope_scaling") or {}
    plain = {
        "position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False,
        "pack_qkv": True, "hidden_act": "gelu",
    }  # fmt: skip
    other = scaling and (scaling.get("type") != "ntk" or scaling.get("mixed_b") is not None)
    if other or any(said.get(key, value) != value for key, value in plain.items()):
        return None
    factor, width = float(scaling.get("factor", 1.0)), said["hidden_size"] // said["num_attention_heads"]
    theta = float(said.get("rope_theta", 10000.0)) * factor
    rope = {"rope_type": "default", "rope_theta": theta}
    if factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor ** (2 / width)}
    return {key: said[key] for key in SHARED if key in said} | {"rope_parameters": rope}


NOMIC = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "layer_norm_eps": "layer_norm_epsilon",
    "vocab_size": "vocab_size", "type_vocab_size": "type_vocab_size", "initializer_range": "initializer_range",
    "hidden_dropout_prob": "resid_pdrop", "attention_probs_dropout_prob": "attn_pdrop",
}  # fmt: skip


def _nomic(said: dict[str, Any]) -> dict[str, Any] | None:
    """nomic-ai/nomic-bert-2048's NomicBertConfig, with GPT-2's key names, as transformers' NomicBERT."""
    plain = {
        "activation_function": "swiglu", "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
        "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None, "prenorm": False, "causal": False, "parallel_block": False,
    }  # fmt: skip
    if any(said.get(key, value) != value for key, value in plain.items()) or said.get("num_experts"):
        return None
    rope = {"rope_type": "default", "rope_theta": float(said.get("rotary_emb_base", 10000))}
    return {ours: said[theirs] for ours, theirs in NOMIC.items() if theirs in said} | {"rope_parameters": rope}


# model_type in config.json → transformers' name for it, and the translation of its settings (None: not all of it fits)
TRANSLATIONS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any] | None]]] = {
    "new": ("gte", _gte),
    "nomic_bert": ("nomic_bert", _nomic),
}
