"""Decoders that see the whole text: turned by transformers' own switch, looked at, kept through every reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from test_attention import packed_states, padded_states, random_tokens
from tiny_models import DECODER, SLIDING, save_plain

from kinvec import Embedder
from kinvec.adapters import LoraSettings, add_lora, load_lora, merge_lora
from kinvec.backbone import Backbone
from kinvec.contracts import KinvecError
from kinvec.embedder import configure, open_folder
from kinvec.folder import save_adapter
from kinvec.pooling import Normalize

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
TEXTS = ["cell", "the blood of a mouse", "insulin and glucose in human trial patients", "risk of heart infection"]

GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 72, "vocab_size": 300, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
GEMMA4 = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300}

PACKED: dict[str, dict[str, Any]] = {  # configuration class → what it needs besides DECODER
    "LlamaConfig": {}, "MistralConfig": {"sliding_window": 6}, "MinistralConfig": {}, "Qwen2Config": {},
    "Qwen3Config": {}, "Qwen3MoeConfig": EXPERTS | {"decoder_sparse_step": 1},
    "Qwen2MoeConfig": EXPERTS | {"shared_expert_intermediate_size": 24}, "GemmaConfig": {},
    "Gemma2Config": SLIDING | {"query_pre_attn_scalar": 8}, "Gemma3TextConfig": SLIDING | {"query_pre_attn_scalar": 8},
    "Gemma4TextConfig": SLIDING | GEMMA4 | {"global_head_dim": 8}, "PhiConfig": {}, "Phi3Config": {}, "OlmoConfig": {},
    "Olmo2Config": {}, "Olmo3Config": SLIDING, "SmolLM3Config": {}, "GraniteConfig": {}, "CohereConfig": {},
    "Cohere2Config": SLIDING, "Exaone4Config": SLIDING, "GlmConfig": {}, "Glm4Config": {}, "DeepseekV3Config": LATENT,
    "GPT2Config": GPT, "GPTNeoXConfig": {}, "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "NemotronConfig": {}, "Starcoder2Config": {}, "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "PersimmonConfig": {}, "SeedOssConfig": {}, "HeliumConfig": {}, "ArceeConfig": {}, "Ernie4_5Config": {},
    "HunYuanDenseV1Config": {},
}  # fmt: skip
PADDED: dict[str, dict[str, Any]] = {  # their code has no place for a custom attention, or ignores part of it
    "GptOssConfig": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    "GPTJConfig": GPT | {"rotary_dim": 8}, "CodeGenConfig": GPT | {"rotary_dim": 8}, "StableLmConfig": {},
    "BloomConfig": {"n_layer": 2, "n_head": 4}, "BioGptConfig": {},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Llama4TextConfig": ({"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8}, "llama4"),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, "lfm2"),
    "Qwen3NextConfig": (EXPERTS | LINEAR | {"shared_expert_intermediate_size": 24}, "qwen3_next"),
    "Qwen3_5TextConfig": (LINEAR, "qwen3_5"),
    "GPTNeoConfig": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}, "gpt_neo",
    ),
}  # fmt: skip


def decoder(kind: str, settings: dict[str, Any]) -> Any:
    """A tiny decoder with weights random enough that a wrong mask shows."""
    torch.manual_seed(0)
    arguments = settings if "n_embd" in settings else DECODER | settings
    config = getattr(transformers, kind)(**arguments)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_a_decoder_becomes_bidirectional_and_back(kind: str) -> None:
    backbone = Backbone(decoder(kind, (PACKED | PADDED)[kind]), pad_token=1)
    assert not backbone.sees_ahead()
    backbone.set_attention("bidirectional")
    assert backbone.packs == (kind in PACKED)
    tokens = random_tokens()
    if backbone.packs:
        with torch.no_grad():
            ours = packed_states(backbone, tokens)
            backbone.model.set_attn_implementation(backbone.native)  # type: ignore[operator]
            theirs = padded_states(backbone.model, tokens)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    backbone.set_attention("causal")
    assert not any(backbone.sees_ahead(native, padded) for native in (False, True) for padded in (False, True))


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_that_cannot_is_refused_by_name(kind: str) -> None:
    settings, name = REFUSED[kind]
    with pytest.raises(KinvecError, match=rf"^{name}.*(stay causal|does not become bidirectional)"):
        Backbone(decoder(kind, settings), pad_token=1).set_attention("bidirectional")


def test_an_encoder_is_bidirectional_and_cannot_be_causal(tmp_path: Path) -> None:
    bert = open_folder(save_plain("bert", tmp_path, "bert"))
    before = bert.encode(TEXTS)
    configure(bert, attention="bidirectional")
    assert np.array_equal(bert.encode(TEXTS), before)
    with pytest.raises(KinvecError, match="bert: this architecture does not become causal"):
        configure(bert, attention="causal")


def agrees(folder: Path) -> Embedder:
    """The folder gives the same vectors by sentence-transformers and by us."""
    ours, peer = Embedder.load(folder, precision="fp32"), SentenceTransformer(str(folder), device="cpu")
    together, alone = peer.encode(TEXTS), np.stack([peer.encode(text) for text in TEXTS])
    for theirs in (together, alone):  # padded, and one by one without padding
        np.testing.assert_allclose(ours.encode(TEXTS), theirs, atol=1e-5)
    return ours


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_bidirectional_survives_saving_and_every_reload(tmp_path: Path, name: str) -> None:
    model = open_folder(save_plain(name, tmp_path / "plain", "decoder"))
    causal = model.encode(TEXTS)
    configure(model, attention="bidirectional", pooling=["mean"])
    expected = model.encode(TEXTS)
    assert np.abs(expected - causal).max() > 1e-2
    model.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "kinvec.json").read_text())["attention"] == "bidirectional"
    ours = agrees(tmp_path / "model")
    assert ours.attention == "bidirectional" and ours.pooling == ("mean",)
    np.testing.assert_allclose(ours.encode(TEXTS), expected, atol=1e-6)


def test_an_adapter_keeps_its_direction_beside_it_and_merged_equals_adapted(tmp_path: Path) -> None:
    base = save_plain("llama", tmp_path / "plain", "decoder")
    model = open_folder(base)
    configure(model, attention="bidirectional", pooling=["mean"])
    model.head.append(Normalize())
    model.prompts = {"query": "find: "}
    plain = model.encode(TEXTS)
    add_lora(model.backbone, LoraSettings(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    adapted = model.encode(TEXTS)
    save_adapter(model, tmp_path / "adapter", str(base))
    merge_lora(model.backbone)
    assert np.abs(adapted - plain).max() > 1e-2
    np.testing.assert_allclose(model.encode(TEXTS), adapted, atol=1e-5)
    again = Embedder.load(tmp_path / "adapter", precision="fp32")
    np.testing.assert_allclose(again.encode(TEXTS), adapted, atol=1e-5)
    assert again.attention == "bidirectional" and again.prompts == {"query": "find: "}
    model.save(tmp_path / "model")
    agrees(tmp_path / "model")
    by_hand = open_folder(base)  # as PEFT's own users do: its adapter on its base, and the switch
    configure(by_hand, attention="bidirectional", pooling=["mean"])
    load_lora(by_hand.backbone, tmp_path / "adapter")
    by_hand.head.append(Normalize())
    np.testing.assert_allclose(by_hand.encode(TEXTS), adapted, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_angles_of_positions_are_not_rounded(tmp_path: Path, precision: str) -> None:
    """In bf16 a frequency is off by up to 0.4 %: by two radians at position 500."""
    model = save_plain("llama", tmp_path / "base", "decoder")
    whole, rounded = (dict(Embedder.load(model, precision=one).backbone.named_buffers()) for one in ("fp32", precision))
    assert any("inv_freq" in name for name in whole)
    assert all(torch.equal(value, rounded[name]) for name, value in whole.items())


def test_a_broken_adapter_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(KinvecError, match=r"adapter_config.json: names no base model"):
        Embedder.load(folder)
    base = save_plain("llama", tmp_path / "plain", "decoder")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(base)})
    )
    with pytest.raises(KinvecError, match=r"there are no adapter weights \(adapter_model.safetensors\)"):
        Embedder.load(folder)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_end_of_sequence_token_is_appended_and_never_cut_away(tmp_path: Path, name: str) -> None:
    model = open_folder(save_plain(name, tmp_path / "plain", "decoder", max_length=8))
    configure(model, pooling=["lasttoken"])
    long = "the blood of a mouse shows high risk of heart infection " * 4
    tokens = model.tokenize([*TEXTS, long, ""])
    end = model.tokenizer.eos_token_id
    assert all(row[-1] == end and row.count(end) == 1 for row in tokens.rows) and max(tokens.lengths) == 8
    model.save(tmp_path / "model")
    again = agrees(tmp_path / "model")
    assert again.append_eos and again.tokenize([long]).rows[0] == tokens.rows[4]


def test_a_lost_end_of_sequence_token_is_refused(tmp_path: Path) -> None:
    model = open_folder(save_plain("llama", tmp_path / "plain", "decoder"))
    configure(model, pooling=["lasttoken"])
    model.save(tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    ours = json.loads((tmp_path / "model" / "kinvec.json").read_text())
    (tmp_path / "model" / "kinvec.json").write_text(json.dumps(ours | {"checksums": {}}))
    with pytest.raises(KinvecError, match="a text lost its end-of-sequence token"):
        Embedder.load(tmp_path / "model").encode(TEXTS)


def test_an_unknown_pooling_is_named(tmp_path: Path) -> None:
    model = open_folder(save_plain("llama", tmp_path, "decoder"))
    with pytest.raises(KinvecError, match="pooling 'median' is unknown"):
        configure(model, pooling=["median"])
