"""The fifty most used embedding models on the hub, and what a folder of each holds: read by `models.py`.

Each model has a `Form`: everything of its folder that changes vectors or how it is opened, with sizes that are tiny.
Forms are written down from the models' own files and cards; equal forms are built and measured once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

AS_OF = "November 2026"
SOURCE = """\
The hub's own ranking cannot be asked either. The list was drawn up in {as_of} from copies of hub pages of 2026, which
print a model's downloads of the last thirty days (the column *downloads*), and for models without a number from general
knowledge of what is used; among those the order means nothing. Counted are models of texts with one dense vector a
text."""


IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class Dense:
    """A linear layer after pooling."""

    width: int
    bias: bool = True
    activation: str = "torch.nn.modules.activation.Tanh"


@dataclass(frozen=True)
class Form:
    """What a model's folder holds. `settings` are those of the transformers configuration class `config`."""

    config: str
    settings: dict[str, Any]
    tokenizer: str  # a style of tests/tiny_models.py
    tokenizer_class: str
    pooling: str = "mean"
    after: tuple[Dense | str, ...] = ("Normalize",)
    prompts: dict[str, str] = field(default_factory=dict)
    max_length: int = 40  # of 72 places: most models are cut well below their table; 72 (or 70) means at its end
    include_prompt: bool = True
    weights: str = "safetensors"  # or "bin": torch's older file, all that the repository has
    published: dict[str, Any] = field(default_factory=dict)  # what config.json says otherwise than transformers writes
    modules: tuple[str, ...] = ()  # module types, where they are not Transformer, Pooling and what is in `after`
    renamed: dict[str, str] = field(default_factory=dict)  # parts of tensors' names, as the authors' code has them
    tokenizer_says: dict[str, Any] = field(default_factory=dict)  # more of tokenizer_config.json
    native: Form | None = None  # the same model in transformers' words, which is what the peer opens


@dataclass(frozen=True)
class Model:
    """A row of the table. `downloads` as printed by a copy of a hub page, or nothing."""

    name: str
    form: Form
    downloads: str = ""


TINY = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 72, "pad_token_id": 0,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
PAD_1 = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DECODER = TINY | PAD_1 | {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
SEARCH = {"query": "query: ", "document": "passage: "}
NOMIC = {"query": "search_query: ", "document": "search_document: "}
REPRESENT = {"query": "Represent this sentence for searching relevant passages: ", "document": ""}
INSTRUCT = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
    "document": "",
}


def code(**classes: Any) -> dict[str, Any]:
    """The entry of a config.json that names classes of the authors' own code."""
    return {"auto_map": classes}


BERT = Form("BertConfig", TINY | DROPOUT, "bert", "BertTokenizer")
BGE = replace(BERT, pooling="cls", max_length=72)
BERT_END = replace(BERT, max_length=72)
MULTILINGUAL_MINILM = replace(BERT, tokenizer="xlm-roberta", tokenizer_class="XLMRobertaTokenizer", after=())
ROBERTA = Form("RobertaConfig", TINY | DROPOUT | PAD_1, "roberta", "RobertaTokenizer", max_length=70)
XLMR = Form("XLMRobertaConfig", TINY | DROPOUT | PAD_1, "xlm-roberta", "XLMRobertaTokenizer", max_length=70)
MPNET = Form("MPNetConfig", TINY | DROPOUT | PAD_1, "mpnet", "MPNetTokenizer")
DISTILBERT = Form(
    "DistilBertConfig",
    {"vocab_size": 300, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 72},
    "bert", "BertTokenizer", after=(Dense(24),),
)  # fmt: skip
NOMIC_NATIVE = Form(
    "NomicBertConfig", TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, "bert",
    "BertTokenizer", prompts=NOMIC, max_length=72,
)  # fmt: skip
NOMIC_BERT = replace(
    NOMIC_NATIVE, native=NOMIC_NATIVE,
    published={
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 72, "layer_norm_epsilon": 1e-12,
        "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_scaling_factor": None, "prenorm": False,
        "activation_function": "swiglu", "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
        "resid_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_size": None, "num_hidden_layers": None, "rope_parameters": None,
        "num_attention_heads": None, "intermediate_size": None, "max_position_embeddings": None, "head_dim": None,
        "layer_norm_eps": None,
    } | code(
        AutoConfig="nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
        AutoModel="nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel",
    ),
)  # fmt: skip
NOMIC_MOE = replace(
    NOMIC_BERT, tokenizer="xlm-roberta", tokenizer_class="XLMRobertaTokenizer", native=None,
    published=NOMIC_BERT.published | {"moe_every_n_layers": 2, "num_experts": 8, "moe_top_k": 2},
)  # fmt: skip
GTE = Form(
    "GteConfig", TINY | {"pad_token_id": 1, "type_vocab_size": 1}, "xlm-roberta", "XLMRobertaTokenizer", pooling="cls",
    max_length=72,
)  # fmt: skip


def ntk(theta: float, factor: float, width: int = 8) -> dict[str, Any]:
    """NTK scaling of rotary positions, fixed, as transformers says it: a larger base, and slower by a constant."""
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / width)}


def gte_new(theta: int, factor: float, **settings: Any) -> Form:
    """A GTE as Alibaba's own code has it, and the same in transformers' words."""
    native = replace(GTE, settings=GTE.settings | settings | {"rope_parameters": ntk(theta, factor)})
    published = {
        "model_type": "new", "position_embedding_type": "rope", "rope_theta": theta, "pack_qkv": True,
        "rope_scaling": {"type": "ntk", "factor": factor}, "rope_parameters": None, "layer_norm_type": "layer_norm",
        "logn_attention_scale": False, "unpad_inputs": False, "use_memory_efficient_attention": False,
    } | code(
        AutoConfig="Alibaba-NLP/new-impl--configuration.NewConfig", AutoModel="Alibaba-NLP/new-impl--modeling.NewModel"
    )  # fmt: skip
    return replace(native, native=native, published=published)


def english(form: Form, **changes: Any) -> Form:
    """With the word pieces of BERT, which its English models have, and no normalisation."""
    native = form.native and english(form.native, **changes)
    changes = {"after": ()} | changes
    return replace(form, tokenizer="bert", tokenizer_class="BertTokenizer", native=native, **changes)


GTE_MULTILINGUAL = gte_new(20000, 8.0)
GTE_LARGE = english(gte_new(160000, 2.0, pad_token_id=0, type_vocab_size=2))
STELLA = english(
    gte_new(160000, 2.0, pad_token_id=0, type_vocab_size=2), pooling="mean", after=(Dense(24, True, IDENTITY),)
)
GTE_BASE = english(gte_new(500000, 2.0, pad_token_id=0, type_vocab_size=0))
GTE_SNOWFLAKE = replace(
    GTE, prompts={"query": "query: ", "document": ""},
    published={"rope_theta": 160000, "rope_scaling": None, "rope_parameters": None} | code(
        AutoConfig="configuration_hf_alibaba_nlp_gte.GteConfig", AutoModel="modeling_hf_alibaba_nlp_gte.GteModel",
    ),
)  # fmt: skip
JINA_V2 = Form(
    "BertConfig", TINY | DROPOUT, "bert", "BertTokenizer", after=(), max_length=72,
    published={"position_embedding_type": "alibi"} | code(
        AutoConfig="jinaai/jina-bert-implementation--configuration_bert.JinaBertConfig",
        AutoModel="jinaai/jina-bert-implementation--modeling_bert.JinaBertModel",
    ),
    renamed={"intermediate.dense": "mlp.gated_layers", "output.dense": "mlp.wo", "position_embeddings": "unused"},
)  # fmt: skip
JINA_V3_NATIVE = Form(
    "JinaEmbeddingsV3Config", TINY | DROPOUT | PAD_1, "xlm-roberta", "XLMRobertaTokenizer", max_length=72
)
JINA_V3 = replace(
    JINA_V3_NATIVE,
    published={"model_type": "xlm-roberta"} | code(
        AutoConfig="jinaai/xlm-roberta-flash-implementation--configuration_xlm_roberta.XLMRobertaFlashConfig",
        AutoModel="jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA",
    ),
    modules=("custom_st.Transformer", "sentence_transformers.models.Pooling", "sentence_transformers.models.Normalize"),
)  # fmt: skip
MODERNBERT = Form(
    "ModernBertConfig",
    TINY | PAD_1 | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2},
    "roberta", "PreTrainedTokenizerFast", max_length=72,
)  # fmt: skip
T5 = Form(
    "T5Config",
    {
        "vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1,
        "pad_token_id": 0, "eos_token_id": 1, "relative_attention_num_buckets": 8,
    },
    "t5", "T5Tokenizer", after=(Dense(24, False, IDENTITY), "Normalize"),
)  # fmt: skip
QWEN3 = Form(
    "Qwen3Config", DECODER | {"tie_word_embeddings": True}, "qwen", "Qwen2Tokenizer", pooling="lasttoken",
    prompts=INSTRUCT, max_length=72, published={"architectures": ["Qwen3ForCausalLM"]},
)  # fmt: skip
QWEN2_NATIVE = Form(
    "Qwen2Config",
    DECODER,
    "ended",
    "Qwen2Tokenizer",
    pooling="lasttoken",
    prompts=INSTRUCT,
    max_length=72,
    published={"architectures": ["Qwen2ForCausalLM"], "is_causal": False},
)
QWEN2 = replace(
    QWEN2_NATIVE, native=QWEN2_NATIVE, tokenizer="decoder",
    published=QWEN2_NATIVE.published | code(
        AutoModel="modeling_qwen.Qwen2Model", AutoModelForCausalLM="modeling_qwen.Qwen2ForCausalLM"
    ),
    tokenizer_says={"add_eos_token": True} | code(AutoTokenizer=["tokenization_qwen.Qwen2Tokenizer", None]),
)  # fmt: skip
MISTRAL = Form(
    "MistralConfig", DECODER | {"sliding_window": 24}, "roberta", "PreTrainedTokenizerFast", pooling="lasttoken",
    prompts=INSTRUCT, max_length=72, published={"architectures": ["MistralModel"]},
)  # fmt: skip
GEMMA = Form(
    "Gemma3TextConfig",
    DECODER | {
        "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
        "use_bidirectional_attention": True,
    },
    "roberta", "PreTrainedTokenizerFast", max_length=72,
    prompts={"query": "task: search result | query: ", "document": "title: none | text: ", "STS": "task: sentence: "},
    after=(
        Dense(64, False, IDENTITY), Dense(32, False, IDENTITY),
        "Normalize",
    ),
)  # fmt: skip
STATIC = Form(
    "BertConfig", TINY, "static", "PreTrainedTokenizerFast", after=(),
    modules=("sentence_transformers.models.StaticEmbedding",),
)  # fmt: skip
NV_EMBED = replace(
    MISTRAL, pooling="mean",
    published={"model_type": "nvembed"} | code(
        AutoConfig="configuration_nvembed.NVEmbedConfig", AutoModel="modeling_nvembed.NVEmbedModel"
    ),
)  # fmt: skip
FIFTY = [
    Model("sentence-transformers/all-MiniLM-L6-v2", BERT, "249M"),
    Model("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", MULTILINGUAL_MINILM, "55.5M"),
    Model("BAAI/bge-small-en-v1.5", BGE, "53.6M"),
    Model("BAAI/bge-m3", replace(XLMR, pooling="cls", weights="bin"), "35.6M"),
    Model("sentence-transformers/all-mpnet-base-v2", MPNET, "24.4M"),
    Model(
        "intfloat/multilingual-e5-small",
        replace(MULTILINGUAL_MINILM, after=("Normalize",), prompts=SEARCH, max_length=72), "15M",
    ),
    Model("BAAI/bge-large-en-v1.5", BGE, "14.2M"),
    Model("nomic-ai/nomic-embed-text-v1.5", replace(NOMIC_BERT, after=()), "12.1M"),
    Model(
        "sentence-transformers/paraphrase-multilingual-mpnet-base-v2", replace(XLMR, after=(), max_length=40), "11.2M"
    ),
    Model("Qwen/Qwen3-Embedding-0.6B", QWEN3, "10.7M"),
    Model("intfloat/multilingual-e5-base", replace(XLMR, prompts=SEARCH), "6.1M"),
    Model("mixedbread-ai/mxbai-embed-large-v1", replace(BGE, after=(), prompts=REPRESENT), "6.1M"),
    Model("sentence-transformers/all-MiniLM-L12-v2", BERT, "5.7M"),
    Model("BAAI/bge-small-zh-v1.5", BGE, "4.4M"),
    Model("Qwen/Qwen3-Embedding-8B", replace(QWEN3, settings=QWEN3.settings | {"tie_word_embeddings": False}), "2.4M"),
    Model("intfloat/e5-large-v2", replace(BERT_END, prompts=SEARCH), "1.9M"),
    Model("Alibaba-NLP/gte-large-en-v1.5", GTE_LARGE, "1.9M"),
    Model("thenlper/gte-small", BERT_END, "1.9M"),
    Model("jinaai/jina-embeddings-v3", JINA_V3, "1.6M"),
    Model("sentence-transformers/multi-qa-MiniLM-L6-cos-v1", BERT_END, "1.4M"),
    Model("intfloat/e5-base-v2", replace(BERT_END, prompts=SEARCH), "1.3M"),
    Model("Alibaba-NLP/gte-multilingual-base", GTE_MULTILINGUAL, "1.3M"),
    Model("jinaai/jina-embeddings-v2-small-en", JINA_V2, "1.2M"),
    Model("nomic-ai/nomic-embed-text-v1", NOMIC_BERT, "1.1M"),
    Model("intfloat/e5-small-v2", replace(BERT_END, prompts=SEARCH), "1.1M"),
    Model("nomic-ai/nomic-embed-text-v2-moe", NOMIC_MOE, "0.9M"),
    Model("shibing624/text2vec-base-chinese", replace(BERT, after=()), "0.6M"),
    Model("Alibaba-NLP/gte-base-en-v1.5", GTE_BASE, "0.5M"),
    Model("Snowflake/snowflake-arctic-embed-m-v1.5", replace(BGE, prompts=REPRESENT), "0.4M"),
    Model("Snowflake/snowflake-arctic-embed-m", replace(BGE, prompts=REPRESENT), "0.4M"),
    Model("Snowflake/snowflake-arctic-embed-xs", replace(BGE, prompts=REPRESENT), "0.3M"),
    Model("Snowflake/snowflake-arctic-embed-m-v2.0", GTE_SNOWFLAKE, "0.2M"),
    Model("BAAI/bge-base-en-v1.5", BGE),
    Model("intfloat/multilingual-e5-large", replace(XLMR, prompts=SEARCH)),
    Model("intfloat/multilingual-e5-large-instruct", replace(XLMR, prompts=INSTRUCT)),
    Model("google/embeddinggemma-300m", GEMMA),
    Model("Qwen/Qwen3-Embedding-4B", QWEN3),
    Model("sentence-transformers/LaBSE", replace(BERT, pooling="cls", after=(Dense(32), "Normalize"))),
    Model("sentence-transformers/all-distilroberta-v1", ROBERTA),
    Model("sentence-transformers/paraphrase-MiniLM-L6-v2", replace(BERT, after=())),
    Model("sentence-transformers/multi-qa-mpnet-base-dot-v1", replace(MPNET, pooling="cls", after=(), max_length=70)),
    Model("sentence-transformers/distiluse-base-multilingual-cased-v2", DISTILBERT),
    Model("Alibaba-NLP/gte-modernbert-base", replace(MODERNBERT, pooling="cls", after=())),
    Model(
        "Snowflake/snowflake-arctic-embed-l-v2.0",
        replace(XLMR, pooling="cls", prompts={"query": "query: ", "document": ""}),
    ),
    Model("jinaai/jina-embeddings-v2-base-en", JINA_V2),
    Model("minishlab/potion-base-8M", STATIC),
    Model("sentence-transformers/gtr-t5-base", T5),
    Model(
        "hkunlp/instructor-large",
        replace(T5, include_prompt=False, prompts={
            "query": "Represent the question for retrieving supporting documents: ",
            "document": "Represent the document for retrieval: ",
        }),
    ),
    Model("intfloat/e5-mistral-7b-instruct", MISTRAL),
    Model("Alibaba-NLP/gte-Qwen2-1.5B-instruct", QWEN2),
]  # fmt: skip

OTHERS = [
    Model("jinaai/jina-embeddings-v3-hf", JINA_V3_NATIVE),
    Model("sentence-transformers/sentence-t5-base", T5),
    Model("sentence-transformers/paraphrase-albert-small-v2", Form(
        "AlbertConfig", TINY | {"embedding_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "albert", "AlbertTokenizer", after=(),
    )),
    Model(
        "sentence-transformers/msmarco-distilbert-base-tas-b",
        replace(DISTILBERT, pooling="cls", after=(), max_length=72),
    ),
    Model("sentence-transformers/clip-ViT-B-32-multilingual-v1", replace(
        DISTILBERT, after=(Dense(24, False, IDENTITY),)
    )),
    Model("ibm-granite/granite-embedding-30m-english", replace(ROBERTA, pooling="cls")),
    Model("nomic-ai/modernbert-embed-base", replace(MODERNBERT, prompts=NOMIC)),
    Model("nvidia/NV-Embed-v2", NV_EMBED),
    Model("NovaSearch/stella_en_400M_v5", STELLA),
    Model("sentence-transformers/clip-ViT-B-32", replace(STATIC, modules=("sentence_transformers.models.CLIPModel",))),
    Model("naver/splade-v3", replace(STATIC, modules=(
        "sentence_transformers.sparse_encoder.models.MLMTransformer",
        "sentence_transformers.sparse_encoder.models.SpladePooling",
    ))),
]  # fmt: skip
