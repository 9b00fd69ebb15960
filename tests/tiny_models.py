"""Tiny models with random weights on real transformers configurations, and tiny tokenizers for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY = 300
WORDS = (
    "a the of in cell blood gene protein mouse human trial drug risk heart lung brain infection vaccine virus bacteria "
    "cancer tumour growth rate high low found shows reduces increases causes patients study treatment response immune "
    "inflammation receptor binding expression level acid insulin glucose diet exercise age women men children birth"
).split()


@cache
def byte_tokenizer_json() -> str:
    """A byte-level BPE tokenizer (any text, no unknown token) trained on the words above, as decoders have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    return tokenizer.to_str()


BYTES = "<s> <pad> </s> <unk> <mask>"
STYLES = {  # style → kind of tokens, special tokens in the order of their ids, what a text is put in
    "bert": ("pieces", "[PAD] [UNK] [CLS] [SEP] [MASK]", "[CLS] $A [SEP]"),
    "mpnet": ("pieces", "<s> <pad> </s> [UNK] <mask>", "<s> $A </s>"),
    "static": ("pieces", "[PAD] [UNK]", "$A"),
    "roberta": ("bytes", BYTES, "<s> $A </s>"),
    "decoder": ("bytes", BYTES, "$A"),
    "ended": ("bytes", BYTES, "$A </s>"),
    "qwen": ("bytes", BYTES, "$A <pad>"),  # the token that ends a text is the padding too
    "xlm-roberta": ("unigram", BYTES, "<s> $A </s>"),
    "albert": ("unigram", "<pad> <unk> [CLS] [SEP] [MASK]", "[CLS] $A [SEP]"),
    "t5": ("unigram", "<pad> </s> <unk>", "$A </s>"),
}
ROLES = {
    "pad": ("[PAD]", "<pad>"), "unk": ("[UNK]", "<unk>"), "mask": ("[MASK]", "<mask>"), "bos": ("<s>",),
    "eos": ("</s>",), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"),
}  # fmt: skip


@cache
def unigram_tokenizer_json(special: str) -> str:
    """A SentencePiece-like tokenizer (pieces of a text with marked word starts), as multilingual models and T5 have."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special.split(), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 2, trainer)
    return tokenizer.to_str()


def tokenizer_of(style: str, max_length: int = 64) -> Any:
    """A fast tokenizer of one of the STYLES, that never gives an id above the vocabulary of the tiny models."""
    from transformers import PreTrainedTokenizerFast

    kind, names, template = STYLES[style]
    special = names.split()
    if kind == "pieces":
        pieces = [*special, *WORDS, *(chr(c) for c in range(97, 123)), *("##" + chr(c) for c in range(97, 123))]
        vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        backend = Tokenizer.from_str(byte_tokenizer_json() if kind == "bytes" else unigram_tokenizer_json(names))
    if template != "$A":
        used = [(token, special.index(token)) for token in template.split() if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    roles = {
        f"{role}_token": token
        for role, tokens in ROLES.items()
        for token in tokens
        if token in special and not (kind == "bytes" and role in ("cls", "sep"))
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **roles)


ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 72, "pad_token_id": 0,
}  # fmt: skip
PADDING_1 = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # as RoBERTa has it
DECODER = ENCODER | PADDING_1 | {"num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 72,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {  # name → configuration class, its arguments
    "bert": ("BertConfig", ENCODER | NO_DROPOUT),
    "roberta": ("RobertaConfig", ENCODER | NO_DROPOUT | PADDING_1),
    "xlm-roberta": ("XLMRobertaConfig", ENCODER | NO_DROPOUT | PADDING_1),
    "electra": ("ElectraConfig", ENCODER | NO_DROPOUT | {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", DISTIL | {"dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0}),
    "modernbert": ("ModernBertConfig", ENCODER | PADDING_1 | {
        "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2,
    }),
    "nomic-bert": ("NomicBertConfig", ENCODER | {
        "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    }),
    "eurobert": ("EuroBertConfig", DECODER | {"mask_token_id": 4}),
    "llama": ("LlamaConfig", DECODER),
    "mistral": ("MistralConfig", DECODER | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", DECODER),
    "qwen3": ("Qwen3Config", DECODER),
    "gemma": ("GemmaConfig", DECODER),
    "gemma2": ("Gemma2Config", DECODER | SLIDING | {
        "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma3": ("Gemma3TextConfig", DECODER | SLIDING | {"query_pre_attn_scalar": 8}),
    "llama-bidirectional": ("LlamaConfig", DECODER | {"is_causal": False}),
    "mistral-bidirectional": ("MistralConfig", DECODER | {"sliding_window": 6, "is_causal": False}),
}  # fmt: skip

PADDED: dict[str, tuple[str, dict[str, Any]]] = {  # architectures whose code has no place for a custom attention
    "mpnet": ("MPNetConfig", ENCODER | NO_DROPOUT | PADDING_1),
    "deberta-v2": ("DebertaV2Config", ENCODER | NO_DROPOUT | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "type_vocab_size": 0,
    }),
    "t5": ("T5Config", {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "pad_token_id": 1, "eos_token_id": 2, "relative_attention_num_buckets": 8,
    }),
}  # fmt: skip


def config_of(name: str) -> Any:
    """The transformers configuration of a tiny model."""
    import transformers

    kind, arguments = (PACKED | PADDED)[name]
    arguments = dict(arguments)
    causal = arguments.pop("is_causal", None)
    config = getattr(transformers, kind)(**arguments)
    if causal is not None:
        config.is_causal = causal
    return config


def build(name: str, seed: int = 0, spread: float = 0.3, **changes: Any) -> Any:
    """A tiny model with weights random enough (standard deviation `spread`) that a wrong mask shows."""
    config = config_of(name)
    for key, value in changes.items():
        setattr(config, key, value)
    return random_model(config, seed, spread)


def random_model(config: Any, seed: int = 0, spread: float = 0.3) -> Any:
    """The encoder or decoder of a configuration with random weights, matrices of standard deviation `spread`."""
    from transformers import AutoModel, T5EncoderModel

    torch.manual_seed(seed)
    model = (T5EncoderModel if config.model_type == "t5" else AutoModel.from_config)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.config.use_cache = False  # as backbone.py opens every model
    return model.eval()


def save_plain(name: str, folder: Path, style: str, max_length: int = 64, **changes: Any) -> Path:
    """A plain Hugging Face folder: weights and tokenizer, nothing of sentence-transformers."""
    build(name, **changes).save_pretrained(folder)
    tokenizer_of(style, max_length).save_pretrained(folder)
    return folder
