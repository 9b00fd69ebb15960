"""The settings of a NeMo BERT, `model_config.yaml`: written as NVIDIA's converter writes them, read with care."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinvec.contracts import KinvecError
from kinvec.formats.nemo_archive import CONFIG, parse_config

TARGET = "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel"
NEMO_VERSION = "2.0.0"  # the release whose layout is written
PROMPTS = {"query": "query: ", "document": "passage: "}  # NeMo's embedding models put these before every text
GELUS = {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"}

# What NeMo 2.0.0's converter starts from (megatron_bert_config.yaml, the part `model`), resolved.
DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "position_embedding_type": "learned_absolute",
    "init_method_std": 0.02,
    "kv_channels": None,
    "make_vocab_size_divisible_by": 128,
    "pre_process": True,
    "add_lm_head": False,
    "bert_binary_head": False,
    "native_amp_init_scale": 2**32,
    "native_amp_growth_interval": 1000,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "megatron_amp_O2": False,
    "grad_allreduce_chunk_size_mb": 125,
    "grad_div_ar_fusion": False,
    "seed": 1234,
    "use_cpu_initialization": False,
    "onnx_safe": False,
    "gradient_as_bucket_view": True,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "num_micro_batches_with_partial_activation_checkpoints": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "sequence_parallel": False,
    "data": {
        "data_prefix": [],
        "index_mapping_dir": None,
        "data_impl": "mmap",
        "splits_string": "900,50,50",
        "skip_warmup": True,
        "num_workers": 0,
        "dataloader_type": "single",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "masked_lm_prob": 0.15,
        "short_seq_prob": 0.1,
    },
    "optim": {
        "name": "fused_adam",
        "lr": 2e-4,
        "weight_decay": 0.01,
        "betas": [0.9, 0.98],
        "sched": {"name": "CosineAnnealing", "warmup_steps": 500, "constant_steps": 50000, "min_lr": 2e-5},
    },
}


def refuse_others(config: Any, source: str) -> None:
    """Raise `KinvecError` for what NeMo's BERT cannot be: another architecture, a decoder, another activation."""
    if config.model_type != "bert" or config.is_decoder:
        raise KinvecError(f"{source}: a .nemo is written of BERT models; this is {config.model_type}")
    if config.hidden_act not in GELUS:
        raise KinvecError(f"{source}: NeMo's BERT computes with GELU; this model's activation is {config.hidden_act}")


def model_config(config: Any, tensors: Mapping[str, Tensor], mcore: bool, tokenizer: str) -> dict[str, Any]:
    """The settings of a Hugging Face BERT configuration, for `model_config.yaml`."""
    length = min(512, config.max_position_embeddings)
    types = {tensor.dtype for tensor in tensors.values()}
    short = {torch.float16: 16, torch.bfloat16: "bf16"}.get(types.pop(), 32) if len(types) == 1 else 32
    return {
        "mcore_bert": mcore,
        **DEFAULTS,
        "data": {**DEFAULTS["data"], "seq_length": length},
        "encoder_seq_length": length,
        "max_position_embeddings": config.max_position_embeddings,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_tokentypes": config.type_vocab_size,
        "hidden_dropout": config.hidden_dropout_prob,
        "layernorm_epsilon": config.layer_norm_eps,
        "normalization": "layernorm",
        "transformer_block_type": "post_ln",
        "apply_query_key_layer_scaling": False,
        "megatron_legacy": False,
        "post_process": True,
        "add_pooler": "pooler.dense.weight" in tensors,
        "precision": short,
        "tokenizer": {
            "library": "huggingface",
            "type": tokenizer,
            "use_fast": True,
            "model": None,
            "vocab_file": None,
            "merge_file": None,
        },
        "target": TARGET,
        "nemo_version": NEMO_VERSION,
    }


@dataclass(frozen=True)
class Settings:
    """What a model folder needs of a `.nemo`'s settings; sizes come from the tensors themselves."""

    target: str
    heads: int
    legacy: bool
    epsilon: float
    dropout: float
    activation: str
    length: int | None
    tokenizer: Mapping[str, Any]
    embeds: bool

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that NeMo's embedding models have in their code; none for other BERTs."""
        return PROMPTS if self.embeds else {}


def read_settings(folder: Path, archive: Path) -> Settings:
    """The settings of an unpacked archive. Raises `KinvecError` for a model that Hugging Face's BERT cannot be."""
    if not (folder / CONFIG).is_file():
        raise KinvecError(f"there is no {CONFIG} in it, so it is not a .nemo archive")
    config = parse_config((folder / CONFIG).read_bytes(), archive)
    target = str(config.get("target") or "")
    if target and "bert" not in target.lower():
        raise KinvecError(
            f"it holds a {target.rsplit('.', 1)[-1]}; of .nemo archives, BERT models are read (docs/from-nemo.md)"
        )
    block = "post_ln" if config.get("bert_type") == "huggingface" else config.get("transformer_block_type", "pre_ln")
    wanted = {
        "transformer_block_type": (block, "post_ln"),
        "position_embedding_type": (config.get("position_embedding_type", "learned_absolute"), "learned_absolute"),
        "normalization": (config.get("normalization", "layernorm"), "layernorm"),
        "activation": (config.get("activation", "gelu"), "gelu"),
    }
    for key, (value, needed) in wanted.items():
        if value != needed:
            raise KinvecError(
                f"its {key} is '{value}'; Hugging Face's BERT has {needed} alone, so it cannot be converted"
            )
    length, tokenizer = config.get("encoder_seq_length"), config.get("tokenizer")
    return Settings(
        target=target,
        heads=int(_number(config, "num_attention_heads", None)),
        legacy=bool(config.get("megatron_legacy", False)),
        epsilon=_number(config, "layernorm_epsilon", 1e-5),
        dropout=_number(config, "hidden_dropout", 0.1),
        activation="gelu_new" if config.get("openai_gelu") else "gelu",
        length=length if isinstance(length, int) and length > 0 else None,
        tokenizer=tokenizer if isinstance(tokenizer, dict) else {},
        embeds="information_retrieval" in target or "Embedding" in target,
    )


def _number(config: Mapping[str, Any], key: str, default: float | None) -> float:
    """A number of the settings; YAML reads `1e-12`, without a point, as text."""
    value = config.get(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not (0 <= number < 2**31) or (default is None and number < 1):
        raise KinvecError(f"its {CONFIG} has no usable {key} ({value!r})")
    return number
