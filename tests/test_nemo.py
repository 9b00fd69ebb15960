"""`.nemo` both ways: bit for bit through every form NeMo has written, and nothing hostile gets through."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import MINILM
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_plain
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import kinvec
from kinvec import checkpoint
from kinvec.contracts import KinvecError
from kinvec.formats import nemo_archive, nemo_bert

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the blood of a mouse shows a high level", "a trial", "insulin reduces glucose in men and women of any age"]
HEADS, WIDTH, LAYERS, VOCABULARY = 4, 32, 2, 300  # of the tiny model


def weights(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors, without the buffer that old versions of transformers stored beside them."""
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if "position_ids" not in k}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        v.dtype == theirs[k].dtype and torch.equal(v, theirs[k]) for k, v in ours.items()
    )


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "r:") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face BERT whose vocabulary is what its tokenizer has."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("nemo") / "bert"
    save_plain("bert", folder, "bert", max_length=32)
    words = len(AutoTokenizer.from_pretrained(folder))
    shutil.rmtree(folder)
    return save_plain("bert", folder, "bert", max_length=32, vocab_size=words)


@pytest.fixture(scope="session")
def archives(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The plain BERT as kinvec writes it: mcore and non-mcore."""
    folder = tmp_path_factory.mktemp("archives")
    made = {mcore: folder / f"{'mcore' if mcore else 'other'}.nemo" for mcore in (True, False)}
    for mcore, path in made.items():
        kinvec.convert(bert, path, mcore=mcore)
    return made


# ---- round trips ----


@pytest.mark.parametrize("mcore", [True, False])
def test_minilm_comes_back_bit_for_bit(minilm_folder: Path, tmp_path: Path, mcore: bool) -> None:
    kinvec.convert(MINILM, tmp_path / "m.nemo", mcore=mcore)
    kinvec.convert(tmp_path / "m.nemo", tmp_path / "back")
    assert len(weights(minilm_folder)) == 103
    assert same(weights(minilm_folder), weights(tmp_path / "back"))
    before, after = (kinvec.Embedder.load(m, precision="fp32").encode(TEXTS) for m in (MINILM, tmp_path / "back"))
    assert np.abs(before - after).max() <= 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m.nemo"]


@pytest.mark.parametrize("mcore", [True, False])
def test_what_nemo_has_no_place_for_survives(tmp_path: Path, tiny_folder: Path, mcore: bool) -> None:
    """Prompts, another pooling, a dense layer, the maximum length, the lineage: in the folder that NeMo ignores."""
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    (source / "2_Dense").mkdir()
    save_file(
        {"linear.weight": torch.randn(8, WIDTH), "linear.bias": torch.randn(8)}, source / "2_Dense/model.safetensors"
    )
    dense = {"in_features": WIDTH, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
    (source / "2_Dense/config.json").write_text(json.dumps(dense))
    modules = json.loads((source / "modules.json").read_text())[:2]
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (source / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "ask: "}}))
    lineage = [{"stage": 1, "objective": "contrastive", "base": "x", "seed": 0, "metrics": {"steps": 3}}]
    ours = json.loads((source / "kinvec.json").read_text()) | {"lineage": lineage}
    (source / "kinvec.json").write_text(json.dumps(ours))

    kinvec.convert(source, tmp_path / "m.nemo", mcore=mcore, tokenizer="bert-base-uncased")
    kinvec.convert(tmp_path / "m.nemo", tmp_path / "back")
    before, after = (kinvec.Embedder.load(tmp_path / name, precision="fp32") for name in ("source", "back"))
    assert np.abs(before.encode_queries(TEXTS) - after.encode_queries(TEXTS)).max() <= 1e-6
    assert after.dimension == 8 and after.prompts == before.prompts and after.max_length == before.max_length
    assert after.lineage == lineage and after.pooling == ("cls",)


def test_weights_keep_their_precision_unless_told(bert: Path, tmp_path: Path) -> None:
    said = kinvec.convert(bert, tmp_path / "half.nemo", precision="bf16")
    assert said["precision"] == "bfloat16"
    kinvec.convert(tmp_path / "half.nemo", tmp_path / "half")
    kinvec.convert(tmp_path / "half.nemo", tmp_path / "full", precision="fp32")
    rounded = {name: tensor.bfloat16() for name, tensor in weights(bert).items()}
    assert same(weights(tmp_path / "half"), rounded)
    assert same(weights(tmp_path / "full"), {name: tensor.float() for name, tensor in rounded.items()})
    kinvec.convert(tmp_path / "half", tmp_path / "again.nemo", mcore=False)
    state = torch.load(unpacked(tmp_path / "again.nemo", tmp_path / "x") / "model_weights.ckpt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_a_model_without_pooler_and_one_with_heads(bert: Path, tmp_path: Path) -> None:
    """As the first BERTs are stored: `bert.` before all names, gamma and beta, heads of pre-training."""
    source = shutil.copytree(bert, tmp_path / "source")
    old = {f"bert.{k}": v for k, v in weights(bert).items() if "pooler" not in k}
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in old.items()
    }
    save_file(old | {"cls.predictions.bias": torch.zeros(9)}, source / "model.safetensors", metadata={"format": "pt"})
    said = kinvec.convert(source, tmp_path / "m.nemo", tokenizer="bert-base-uncased")
    assert said["left_out"] == ["cls.predictions.bias"]
    kinvec.convert(tmp_path / "m.nemo", tmp_path / "back")
    assert same(weights(tmp_path / "back"), {k: v for k, v in weights(bert).items() if "pooler" not in k})


# ---- what is written is what NeMo writes ----


def test_the_settings_are_those_of_nvidias_converter(archives: dict[bool, Path], bert: Path, tmp_path: Path) -> None:
    for mcore, path in archives.items():
        config = yaml.safe_load((unpacked(path, tmp_path / path.stem) / "model_config.yaml").read_text())
        theirs = json.loads((bert / "config.json").read_text())
        assert config["mcore_bert"] is mcore
        assert config["num_layers"] == theirs["num_hidden_layers"] == LAYERS
        assert config["hidden_size"] == theirs["hidden_size"] == WIDTH
        assert config["ffn_hidden_size"] == theirs["intermediate_size"]
        assert config["num_attention_heads"] == theirs["num_attention_heads"] == HEADS
        assert config["max_position_embeddings"] == theirs["max_position_embeddings"]
        assert config["num_tokentypes"] == theirs["type_vocab_size"]
        assert config["layernorm_epsilon"] == theirs["layer_norm_eps"] == 1e-12
        assert (config["normalization"], config["transformer_block_type"]) == ("layernorm", "post_ln")
        assert (
            config["apply_query_key_layer_scaling"] is config["megatron_legacy"] is config["megatron_amp_O2"] is False
        )
        assert config["make_vocab_size_divisible_by"] == 128
        assert config["target"].endswith(".MegatronBertModel")
        assert (config["tokenizer"]["library"], config["tokenizer"]["use_fast"]) == ("huggingface", True)


def test_the_sharded_folder_is_laid_out_as_megatron_core_does(archives: dict[bool, Path], tmp_path: Path) -> None:
    with tarfile.open(archives[True], "r:") as tar:
        names = tar.getnames()
        assert all((member.uid, member.uname) == (0, "") for member in tar)
    assert "./model_config.yaml" in names or "model_config.yaml" in names
    place = unpacked(archives[True], tmp_path) / "model_weights"
    assert {path.name for path in place.iterdir()} == {".metadata", "__0_0.distcp", "common.pt", "metadata.json"}
    assert json.loads((place / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1,
    }  # fmt: skip
    assert torch.load(place / "common.pt", weights_only=True) == {}
    assert b".work" not in (place / ".metadata").read_bytes(), "the path on the writer's machine"
    entries = dcp.FileSystemReader(place).read_metadata().state_dict_metadata
    fused = entries["model.encoder.layers.self_attention.linear_qkv.weight"]
    assert isinstance(fused, TensorStorageMetadata) and fused.size == (LAYERS, 3 * WIDTH, WIDTH)
    for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        for layer in range(LAYERS):
            state = entries[f"model.encoder.layers.{module}._extra_state/shard_{layer}_{LAYERS}"]
            assert isinstance(state, BytesStorageMetadata)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_tensors_are_those_of_a_converter_written_as_a_loop(
    archives: dict[bool, Path], bert: Path, tmp_path: Path
) -> None:
    other = torch.load(unpacked(archives[False], tmp_path / "a") / "model_weights.ckpt", weights_only=True)
    assert same(other, rank_of_nemo(weights(bert), OTHER, "model.language_model."))
    place = unpacked(archives[True], tmp_path / "b") / "model_weights"
    numbered, state = rank_of_nemo(weights(bert), MCORE, "model."), {}
    for name, tensor in numbered.items():
        stacked = re.sub(r"layers\.\d+", "layers", name)
        shape = (LAYERS, *tensor.shape) if stacked != name else tensor.shape
        state[stacked] = torch.zeros(shape)
    dcp.load(state, checkpoint_id=place, no_dist=True)
    for name, tensor in numbered.items():
        layer = re.search(r"layers\.(\d+)", name)
        whole = state[re.sub(r"layers\.\d+", "layers", name)]
        assert torch.equal(whole[int(layer[1])] if layer else whole, tensor)


def test_the_vocabulary_is_padded_with_zeros(archives: dict[bool, Path], bert: Path, tmp_path: Path) -> None:
    state = torch.load(unpacked(archives[False], tmp_path) / "model_weights.ckpt", weights_only=True)
    table, words = (
        state["model.language_model.embedding.word_embeddings.weight"],
        weights(bert)["embeddings.word_embeddings.weight"],
    )
    assert len(table) % 128 == 0 and 0 < len(table) - len(words) < 128
    assert torch.equal(table[: len(words)], words) and not table[len(words) :].any()


@given(
    heads=st.integers(1, 5),
    size=st.integers(1, 4),
    width=st.integers(1, 6),
    texts=st.integers(1, 3),
    legacy=st.booleans(),
)
def test_the_fused_projection_is_split_as_megatrons_forward_splits_it(
    heads: int, size: int, width: int, texts: int, legacy: bool
) -> None:
    """Activations, not weights: Megatron multiplies once, views [texts, heads, 3 x size] and cuts it in three."""
    fused, x = torch.randn(3 * heads * size, width), torch.randn(texts, width)
    mixed = x @ fused.T
    if legacy:  # [texts, 3, heads, size] → [texts, heads, 3, size]
        mixed = mixed.view(texts, 3, heads, size).transpose(1, 2).contiguous()
    cut = mixed.view(texts, heads, 3 * size).split(size, dim=-1)
    for theirs, ours in zip(cut, nemo_bert.separate(fused, heads, legacy), strict=True):
        assert torch.allclose(theirs.reshape(texts, -1), x @ ours.T, atol=1e-5)
    if not legacy:
        assert torch.equal(nemo_bert.interleave(*nemo_bert.separate(fused, heads, False), heads), fused)


# ---- every form that NeMo has written ----

MCORE = {
    "attention.output.dense": "self_attention.linear_proj", "attention.output.LayerNorm": "post_att_layernorm",
    "intermediate.dense": "mlp.linear_fc1", "output.dense": "mlp.linear_fc2", "output.LayerNorm": "post_mlp_layernorm",
    "qkv": "self_attention.linear_qkv",
}  # fmt: skip
OTHER = {
    "attention.output.dense": "self_attention.dense", "attention.output.LayerNorm": "input_layernorm",
    "intermediate.dense": "mlp.dense_h_to_4h", "output.dense": "mlp.dense_4h_to_h",
    "output.LayerNorm": "post_attention_layernorm", "qkv": "self_attention.query_key_value",
}  # fmt: skip
AROUND = {
    "embeddings.word_embeddings.weight": "embedding.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "embedding.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "embedding.tokentype_embeddings.weight",
    "embeddings.LayerNorm.weight": "encoder.initial_layernorm.weight",
    "embeddings.LayerNorm.bias": "encoder.initial_layernorm.bias",
    "pooler.dense.weight": "pooler.dense.weight", "pooler.dense.bias": "pooler.dense.bias",
}  # fmt: skip


def share(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    return tensor.chunk(ranks, dim=axis)[rank].clone()


def rank_of_nemo(
    hf: Mapping[str, Tensor], names: Mapping[str, str], prefix: str, rank: int = 0, ranks: int = 1,
    legacy: bool = False, layers: Iterable[int] = range(LAYERS),
) -> dict[str, Tensor]:  # fmt: skip
    """One rank's tensors, written head by head as a loop: another way to the same layout than kinvec's."""
    words = hf["embeddings.word_embeddings.weight"]
    padded = torch.cat([words, torch.zeros(-len(words) % (128 * ranks), words.shape[1])])
    state = {f"{prefix}{AROUND[name]}": hf[name] for name in AROUND}
    state[f"{prefix}embedding.word_embeddings.weight"] = share(padded, 0, rank, ranks)
    size, own = WIDTH // HEADS, range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    for number, layer in enumerate(layers):
        inside = f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            three = [hf[f"{inside}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            if legacy:
                rows = [part[head * size : (head + 1) * size] for part in three for head in own]
            else:
                rows = [part[head * size : (head + 1) * size] for head in own for part in three]
            state[f"{prefix}encoder.layers.{number}.{names['qkv']}.{kind}"] = torch.cat(rows)
            for module in set(names) - {"qkv"}:
                tensor = hf[f"{inside}{module}.{kind}"]
                if module == "intermediate.dense":
                    tensor = share(tensor, 0, rank, ranks)
                elif module.endswith("output.dense") and kind == "weight":
                    tensor = share(tensor, 1, rank, ranks)
                state[f"{prefix}encoder.layers.{number}.{names[module]}.{kind}"] = tensor
    return state


CONFIG = {
    "num_attention_heads": HEADS, "num_layers": LAYERS, "hidden_size": WIDTH, "layernorm_epsilon": "1e-12",
    "transformer_block_type": "post_ln", "encoder_seq_length": 24,
    "tokenizer": {"library": "huggingface", "type": "a/b"},
    "target": "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel",
}  # fmt: skip


def archive_of(path: Path, files: Mapping[str, Any], zipped: bool = False, **config: Any) -> Path:
    """A foreign `.nemo`: state dictionaries (saved by torch), bytes, or folders by name, and the settings."""
    content = path.with_suffix(".content")
    for name, value in files.items():
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            (content / name).write_bytes(value)
        elif isinstance(value, Path):
            shutil.copytree(value, content / name)
        else:
            torch.save(value, content / name)
    content.mkdir(exist_ok=True)
    (content / "model_config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    with tarfile.open(path, "w:gz" if zipped else "w:") as tar:
        tar.add(content, arcname=".")
    return path


def one_file(hf: Mapping[str, Tensor], **how: Any) -> dict[str, Any]:
    names = how.pop("names", OTHER)
    prefix = how.pop("prefix", "model.language_model.")
    return {"model_weights.ckpt": rank_of_nemo(hf, names, prefix, **how)}


def ranks_of_nemo(hf: Mapping[str, Tensor], width: int, stages: int, legacy: bool = False) -> dict[str, Any]:
    files = {}
    for stage in range(stages):
        layers = list(range(LAYERS))[stage * LAYERS // stages : (stage + 1) * LAYERS // stages]
        for rank in range(width):
            state = rank_of_nemo(hf, OTHER, "model.language_model.", rank, width, legacy, layers)
            if stages > 1:
                first, last = ("pooler.",), ("embedding.", "encoder.initial")  # what the other stage has
                state = {k: v for k, v in state.items() if not any(n in k for n in (last if stage else first))}
                if stage:
                    state["model.word_embeddings.weight"] = torch.zeros(3, WIDTH)
            place = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if stages > 1 else f"mp_rank_{rank:02d}"
            files[f"{place}/model_weights.ckpt"] = state
    return files


def sharded(hf: Mapping[str, Tensor], folder: Path, prefix: str = "model.", stacked: bool = True) -> dict[str, Any]:
    numbered = rank_of_nemo(hf, MCORE, prefix)
    state: dict[str, Any] = {k: v for k, v in numbered.items() if not stacked or ".layers." not in k}
    for name in [k for k in numbered if stacked and ".layers.0." in k]:
        layers = [numbered[name.replace(".0.", f".{layer}.")] for layer in range(LAYERS)]
        state[name.replace(".0.", ".")] = torch.stack(layers)
    state[f"{prefix}encoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = [io.BytesIO(b"x")]
    checkpoint.write_state(folder, state)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return {"model_weights": folder}


EXTRA = {
    "model.lm_head.dense.weight": torch.zeros(3, 3), "model.binary_head.bias": torch.zeros(2),
    "model.output_layer.bias": torch.zeros(2),
    "model.encoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(b"scale"),
    "model.encoder.layers.1.mlp.linear_fc1._extra_state": None,
}  # fmt: skip

FORMS: dict[str, Callable[[dict[str, Tensor], Path], dict[str, Any]]] = {
    "one file": lambda hf, _: one_file(hf),
    "half precision's wrapper": lambda hf, _: one_file(hf, prefix="model.module.language_model."),
    "legacy": lambda hf, _: one_file(hf, legacy=True),
    "mcore in one file": lambda hf, _: one_file(hf, names=MCORE, prefix="model."),
    "mcore's wrapper": lambda hf, _: one_file(hf, names=MCORE, prefix="model.module."),
    "heads and extra states": lambda hf, _: {"model_weights.ckpt": rank_of_nemo(hf, MCORE, "model.") | EXTRA},
    "2 ranks": lambda hf, _: ranks_of_nemo(hf, 2, 1),
    "4 ranks, legacy": lambda hf, _: ranks_of_nemo(hf, 4, 1, legacy=True),
    "2 stages": lambda hf, _: ranks_of_nemo(hf, 1, 2),
    "2 ranks by 2 stages": lambda hf, _: ranks_of_nemo(hf, 2, 2),
    "sharded": lambda hf, folder: sharded(hf, folder),
    "sharded, wrapped": lambda hf, folder: sharded(hf, folder, prefix="model.module."),
    "sharded, whatever is said of legacy": lambda hf, folder: sharded(hf, folder),
    "no token types": lambda hf, _: changed(hf, drop="tokentype"),
    "sharded, layers apart": lambda hf, folder: sharded(hf, folder, stacked=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_bit_for_bit(bert: Path, tmp_path: Path, form: str) -> None:
    hf = weights(bert)
    (tmp_path / "shards").mkdir()
    legacy = "legacy" in form
    archive = archive_of(
        tmp_path / "m.nemo", FORMS[form](hf, tmp_path / "shards"), megatron_legacy=legacy, zipped="2 r" in form
    )
    said = kinvec.convert(archive, tmp_path / "back", tokenizer=str(bert))
    if form == "no token types":
        types = torch.zeros(1, WIDTH)
        bert = shutil.copytree(bert, tmp_path / "bert")
        hf["embeddings.token_type_embeddings.weight"] = types
        save_file(hf, bert / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((bert / "config.json").read_text()) | {"type_vocab_size": 1}
        (bert / "config.json").write_text(json.dumps(config))
    assert same(weights(tmp_path / "back"), hf)
    assert said["pooling"] == "mean" and said["prompts"] == {}
    ours, theirs = (kinvec.Embedder.load(folder, precision="fp32") for folder in (tmp_path / "back", bert))
    unit = theirs.encode(TEXTS) / np.linalg.norm(theirs.encode(TEXTS), axis=1, keepdims=True)
    assert np.abs(ours.encode(TEXTS) - unit).max() <= 1e-6
    assert ours.max_length == 24


def test_an_embedding_model_brings_its_prompts_and_a_word_list_its_tokenizer(bert: Path, tmp_path: Path) -> None:
    words = sorted(
        json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"].items(), key=lambda pair: pair[1]
    )
    files = one_file(weights(bert)) | {"0123_vocab.txt": "\n".join(word for word, _ in words).encode()}
    archive = archive_of(
        tmp_path / "m.nemo", files,
        target="nemo.collections.nlp.models.information_retrieval.megatron_bert_embedding_model.MegatronBertEmbeddingModel",
        tokenizer={"library": "megatron", "type": "BertWordPieceCase", "vocab_file": "nemo:0123_vocab.txt"},
    )  # fmt: skip
    kinvec.convert(archive, tmp_path / "back")
    back, plain = kinvec.Embedder.load(tmp_path / "back"), kinvec.Embedder.load(bert)
    assert back.prompts == {"query": "query: ", "document": "passage: "}
    assert back.tokenize(["The blood, a mouse"]).ids == plain.tokenize(["The blood, a mouse"]).ids


def test_info_says_what_an_archive_is(archives: dict[bool, Path], main: Callable[..., tuple[int, str]]) -> None:
    said = kinvec.info(str(archives[True]))
    assert said["form"] == "mcore, a sharded folder" and said["layers"] == LAYERS and said["written_by_kinvec"]
    code, text = main("info", str(archives[False]))
    assert code == 0 and "one file" in text


# ---- what cannot be converted says so ----


def refused(archive: Path, bert: Path | None, says: str) -> None:
    """Converting raises one sentence with these words, and leaves nothing behind."""
    before = sorted(archive.parent.iterdir())
    with pytest.raises(KinvecError, match=says) as caught:
        kinvec.convert(archive, archive.parent / "back", tokenizer=str(bert) if bert else None)
    said = str(caught.value)
    assert said.startswith(str(archive)) and "\n" not in said and ".work" not in said
    assert sorted(archive.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"},
            "MegatronGPTModel",
        ),
        ({"transformer_block_type": "pre_ln"}, "pre_ln"),
        ({"position_embedding_type": "rope"}, "rope"),
        ({"activation": "swiglu"}, "swiglu"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "5 attention heads do not share"),
        ({"layernorm_epsilon": {}}, "layernorm_epsilon"),
    ],
)
def test_another_model_is_named(bert: Path, tmp_path: Path, config: dict[str, Any], says: str) -> None:
    refused(archive_of(tmp_path / "m.nemo", one_file(weights(bert)), **config), bert, says)


QKV = "encoder.layers.0.self_attention.query_key_value.weight"


def changed(hf: Mapping[str, Tensor], drop: str = "-", more: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    state = rank_of_nemo(hf, OTHER, "model.language_model.")
    added = {f"model.language_model.{name}": tensor for name, tensor in (more or {}).items()}
    return {"model_weights.ckpt": {k: v for k, v in state.items() if drop not in k} | added}


def misfit(hf: Mapping[str, Tensor]) -> dict[str, Any]:
    files = ranks_of_nemo(hf, 2, 1)
    first = files["mp_rank_00/model_weights.ckpt"]
    name = "model.language_model.encoder.layers.1.mlp.dense_4h_to_h.weight"
    return files | {"mp_rank_00/model_weights.ckpt": first | {name: first[name][:5].clone()}}


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "no weights": (lambda hf: {}, "no weights"),
    "a tensor lacks": (lambda hf: changed(hf, drop="1.mlp.dense_4h_to_h.bias"), "encoder.layer.1.output.dense.bias"),
    "no layer": (lambda hf: changed(hf, drop=".layers."), "lack 16 tensors"),
    "an adapter": (lambda hf: changed(hf, more={"encoder.layers.0.adapter.weight": torch.ones(2)}), "adapter"),
    "last layer norm": (lambda hf: changed(hf, more={"encoder.final_layernorm.weight": torch.ones(2)}), "final_layer"),
    "other shapes": (lambda hf: changed(hf, more={QKV: torch.ones(7)}), "7.*do not share"),
    "no shape": (lambda hf: changed(hf, more={QKV: torch.tensor(1.0)}), "do not share"),
    "ranks that do not fit": (lambda hf: misfit(hf), "do not fit each other"),
    "a rank lacks": (lambda hf: dict(list(ranks_of_nemo(hf, 2, 2).items())[1:]), "stage 0, rank 0 is missing"),
    "integers": (lambda hf: changed(hf, more={"pooler.dense.bias": torch.arange(2)}), "floating-point"),
    "zarr": (lambda hf: {"model_weights/metadata.json": b'{"sharded_backend": "zarr"}'}, "zarr"),
    "cut short": (lambda hf: {"model_weights.ckpt": b"PK\x03\x04 and no more"}, "damaged or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_wrong_weights_are_named(bert: Path, tmp_path: Path, what: str) -> None:
    make, says = WRONG_WEIGHTS[what]
    refused(archive_of(tmp_path / "m.nemo", make(weights(bert))), bert, says)


def test_a_tokenizer_is_asked_for(bert: Path, minilm_folder: Path, tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "m.nemo", one_file(weights(bert)))
    refused(archive, None, "'a/b' is neither here nor on the hub; add --tokenizer")
    refused(archive, minilm_folder, "30,522 tokens.*only 128 have an embedding.*--tokenizer")
    nameless = archive_of(tmp_path / "n.nemo", one_file(weights(bert)), tokenizer={"type": "/data/my-model"})
    refused(nameless, None, "name none .'/data/my-model'.; add --tokenizer")


def test_only_berts_are_written(tmp_path: Path) -> None:
    save_plain("roberta", tmp_path / "roberta", "roberta")
    save_plain("llama", tmp_path / "llama", "decoder")
    save_plain("bert", tmp_path / "relu", "bert", hidden_act="relu")
    for name, says in (("roberta", "this is roberta"), ("llama", "this is llama"), ("relu", "activation is relu")):
        with pytest.raises(KinvecError, match=says):
            kinvec.convert(tmp_path / name, tmp_path / "m.nemo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "relu", "roberta"]


def test_one_side_is_a_nemo(main: Callable[..., tuple[int, str]]) -> None:
    for arguments, says in (
        (("a", "b"), "neither is"),
        (("a.nemo", "b.nemo"), "both are"),
        (("a.nemo", "b", "--precision", "fp8"), "fp8"),
    ):
        code, text = main("convert", *arguments)
        assert code == 2 and says in text


def test_a_destination_of_another_kind_stays(archives: dict[bool, Path], bert: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "file.nemo").write_text("dear")
    for source, target in ((archives[True], "notes"), (archives[True], "file"), (bert, "file.nemo")):
        with pytest.raises(KinvecError, match=f"{target}: it is there and is n"):
            kinvec.convert(source, tmp_path / target)
    assert (tmp_path / "notes/diary.txt").read_text() == (tmp_path / "file.nemo").read_text() == "dear"
    kinvec.convert(archives[True], tmp_path / "model")
    kinvec.convert(archives[False], tmp_path / "model")  # one of ours is replaced
    shutil.copyfile(archives[True], tmp_path / "m.nemo")
    kinvec.convert(bert, tmp_path / "m.nemo", mcore=False)
    assert kinvec.info(str(tmp_path / "m.nemo"))["form"] == "one file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.nemo", "m.nemo", "model", "notes"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns where there are threads
@pytest.mark.parametrize("reads", [True, False])
def test_a_kill_leaves_nothing_that_counts_and_the_next_run_sweeps(
    archives: dict[bool, Path], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    source, target = (archives[True], tmp_path / "out") if reads else (bert, tmp_path / "out.nemo")

    def killed(*_: object, **__: object) -> None:
        os._exit(9)

    child = os.fork()
    if child == 0:  # dies just before the end, without a chance to tidy up
        monkeypatch.setattr(
            "kinvec.formats.nemo.replace_folder" if reads else "kinvec.formats.nemo_archive.pack", killed
        )
        kinvec.convert(source, target)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not target.exists() and list(tmp_path.iterdir())
    kinvec.convert(source, target)
    assert list(tmp_path.iterdir()) == [target]


# ---- hostile archives ----


class Surprise:
    """Pickled, it asks to run a command when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch surprised",)


def member(
    name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def tar_of(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for info, content in [member("./model_config.yaml", yaml.safe_dump(CONFIG).encode()), *members]:
            tar.addfile(info, io.BytesIO(content) if len(content) >= info.size else None)
    return path


def sized(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A header that claims more than follows."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info, b"\0" * 512


HOSTILE_MEMBERS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "an absolute path": ([member("/tmp/out")], "outside the target folder"),
    "a path upwards": ([member("a/../../out")], "outside the target folder"),
    "a windows path": ([member("..\\out")], "outside the target folder"),
    "a drive": ([member("C:out")], "outside the target folder"),
    "a control character": ([member("a\x1b[2Jb")], "outside the target folder"),
    "a symbolic link": ([member("a", b"", tarfile.SYMTYPE, "/etc/passwd")], "is a link to '/etc/passwd'"),
    "a hard link": ([member("a", b"", tarfile.LNKTYPE, "model_config.yaml")], "is a link"),
    "a device": ([member("a", b"", tarfile.CHRTYPE)], "neither a plain file nor a folder"),
    "a pipe": ([member("a", b"", tarfile.FIFOTYPE)], "neither a plain file nor a folder"),
    "a name twice": ([member("model_weights.ckpt"), member("./model_weights.ckpt")], "is in the archive twice"),
    "a name twice but for case": ([member("A/b"), member("a/B")], "is in the archive twice"),
    "a file as folder": ([member("a"), member("a/b")], "is in the archive twice"),
    "too deep": ([member("a/" * 30 + "b")], "deeper than"),
    "too large": ([sized("a", 40 << 30)], "too large"),
    "too many": ([member(f"f{i}") for i in range(60)], "more than 50 members"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_hostile_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(nemo_archive, "MOST_MEMBERS", 50)
    members, says = HOSTILE_MEMBERS[kind]
    refused(tar_of(tmp_path / "m.nemo", members), None, says)
    assert not Path("/tmp/out").exists()


def test_all_members_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_archive, "MOST_BYTES", 10_000)
    refused(tar_of(tmp_path / "m.nemo", [member(f"f{i}", b"x" * 4000) for i in range(3)]), None, "too large")


def test_a_bomb_is_not_unfolded(tmp_path: Path) -> None:
    """A gzipped archive of kilobytes whose extended header would be read into memory in one piece: 64 MiB."""
    info = tarfile.TarInfo("bomb")
    info.type, info.size = tarfile.XHDTYPE, 64 << 20
    with gzip.open(tmp_path / "m.nemo", "wb") as file:
        file.write(info.tobuf())
        for _ in range(64):
            file.write(b"\0" * (1 << 20))
    refused(tmp_path / "m.nemo", None, "claims 67,108,864 bytes")


@pytest.mark.parametrize("cut", [0, 100, 600, 5000])
def test_an_archive_cut_short_is_refused(archives: dict[bool, Path], tmp_path: Path, cut: int) -> None:
    (tmp_path / "m.nemo").write_bytes(archives[True].read_bytes()[:cut])
    refused(tmp_path / "m.nemo", None, "cut short|no model_config.yaml|no weights|damaged")


@pytest.mark.parametrize("noise", [b"not an archive" * 100, b"\x1f\x8bnot gzip either" * 50])
def test_what_is_no_archive_is_refused(tmp_path: Path, noise: bytes) -> None:
    (tmp_path / "m.nemo").write_bytes(noise)
    refused(tmp_path / "m.nemo", None, "not a .nemo archive")


def settings_archive(path: Path, raw: bytes) -> Path:
    with tarfile.open(path, "w:") as tar:
        info, content = member("model_config.yaml", raw)
        tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"a: !!python/object/apply:os.system ['touch surprised']", "not plain YAML"),
        (b"[" * 2000, "not plain YAML"),
        (b"\xff\xfe\x00", "not plain YAML"),
        (b"- a\n- b", "holds no settings"),
        (b"a: " + b"x" * (5 << 20), "larger than 4 MiB"),
    ],
)
def test_settings_are_plain_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(settings_archive(tmp_path / "m.nemo", raw), None, says)
    with pytest.raises(KinvecError, match=says):
        kinvec.info(str(tmp_path / "m.nemo"))


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain pickle"])
def test_a_pickled_surprise_in_the_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    if protocol == "plain pickle":
        pickle.dump({"model.x": Surprise()}, buffer)
    else:
        torch.save({"model.x": Surprise()}, buffer, _use_new_zipfile_serialization=protocol == "zip")
    refused(archive_of(tmp_path / "m.nemo", {"model_weights.ckpt": buffer.getvalue()}), None, "refused")


def test_a_pickled_surprise_in_the_metadata_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    files = sharded(weights(bert), tmp_path / "shards")
    (tmp_path / "shards/.metadata").write_bytes(pickle.dumps(Surprise()))
    refused(archive_of(tmp_path / "m.nemo", files), bert, "posix.system.*refused")


def test_a_pickled_surprise_in_a_shard_is_refused(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    files = sharded(weights(bert), tmp_path / "shards")
    surprise = io.BytesIO()
    torch.save(Surprise(), surprise)

    def point(metadata: Metadata) -> None:
        size = (tmp_path / "shards/__0_0.distcp").stat().st_size
        for place in metadata.storage_data.values():
            place.offset, place.length = size, surprise.getbuffer().nbytes

    edited(tmp_path / "shards", point)
    with open(tmp_path / "shards/__0_0.distcp", "ab") as file:
        file.write(surprise.getvalue())
    refused(archive_of(tmp_path / "m.nemo", files), bert, "does not fit")
    assert not (tmp_path / "surprised").exists()


def test_a_surprise_among_the_extra_states_is_never_opened(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    state = {name: tensor for name, tensor in rank_of_nemo(weights(bert), MCORE, "model.").items()}
    checkpoint.write_state(tmp_path / "shards", state | {"model.a._extra_state/shard_0_1": Surprise()})
    kinvec.convert(
        archive_of(tmp_path / "m.nemo", {"model_weights": tmp_path / "shards"}), tmp_path / "back", tokenizer=str(bert)
    )
    assert same(weights(tmp_path / "back"), weights(bert))
    assert not (tmp_path / "surprised").exists()


def edited(folder: Path, edit: Callable[[Metadata], object]) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _elsewhere(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../model_config.yaml"


def _endless(metadata: Metadata) -> None:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.size = torch.Size([1 << 20, *entry.size])


def _holes(metadata: Metadata) -> None:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.chunks = []


def _nonsense(metadata: Metadata) -> None:
    metadata.state_dict_metadata = [1, 2]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_elsewhere, "not one of theirs"),
        (_endless, "promise at least"),
        (_holes, "do not make up"),
        (_nonsense, "cannot be read"),
    ],
)
def test_metadata_that_lies_is_refused(
    bert: Path, tmp_path: Path, edit: Callable[[Metadata], object], says: str
) -> None:
    (tmp_path / "shards").mkdir()
    files = sharded(weights(bert), tmp_path / "shards")
    edited(tmp_path / "shards", edit)
    refused(archive_of(tmp_path / "m.nemo", files), bert, says)


def test_tensors_cannot_pretend_a_size(tmp_path: Path, bert: Path) -> None:
    state = rank_of_nemo(weights(bert), OTHER, "model.language_model.")
    state["model.language_model.pooler.dense.weight"] = torch.zeros(1).expand(1 << 20, 1 << 10)
    refused(archive_of(tmp_path / "m.nemo", {"model_weights.ckpt": state}), bert, "claims more bytes than the file has")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("kinvec/modules.json", b'[{"type": "x.Transformer", "path": "../../.."}]', "leads outside its folder"),
        ("kinvec/modules.json", b"{}", "modules.json"),
        ("kinvec/code.py", b"import os", "no file of a model folder"),
        ("kinvec/pytorch_model.bin", b"x", "no file of a model folder"),
    ],
)
def test_our_own_folder_is_not_trusted_either(
    archives: dict[bool, Path], tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    folder = unpacked(archives[True], tmp_path / "x")
    (folder / name).write_bytes(content)
    with tarfile.open(tmp_path / "m.nemo", "w:") as tar:
        tar.add(folder, arcname=".")
    refused(tmp_path / "m.nemo", None, says)


@settings(max_examples=30, deadline=None)
@given(
    mcore=st.booleans(),
    part=st.floats(0, 1, exclude_max=True),
    flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_a_damaged_archive_is_read_or_refused_in_one_sentence(
    archives: dict[bool, Path], mcore: bool, part: float, flips: list[tuple[int, int]]
) -> None:
    """Bytes changed anywhere in the header or the content of one member."""
    raw = bytearray(archives[mcore].read_bytes())
    with tarfile.open(archives[mcore], "r:") as tar:
        members = tar.getmembers()
    hit = members[int(part * len(members))]
    start, end = hit.offset, hit.offset_data + hit.size
    for place, change in flips:
        raw[start + place % (end - start)] ^= change
    with tempfile.TemporaryDirectory() as folder:
        archive, back = Path(folder) / "m.nemo", Path(folder) / "back"
        archive.write_bytes(raw)
        try:
            kinvec.convert(archive, back)
        except KinvecError as error:
            assert str(error).startswith(str(archive)) and "\n" not in str(error)
        assert set(Path(folder).iterdir()) <= {archive, back}


def test_a_plan_in_the_metadata_is_read(tmp_path: Path) -> None:
    """Megatron Core's newer metadata keeps the plans of the save beside the tensors' places."""
    checkpoint.write_state(tmp_path, {"a": torch.arange(6.0)})
    whole = torch.Size([6])
    chunk = ChunkStorageMetadata(torch.Size([0]), whole)

    def add(metadata: Metadata) -> None:
        data = TensorWriteData(chunk, metadata.state_dict_metadata["a"].properties, whole)  # type: ignore[union-attr]
        item = WriteItem(next(iter(metadata.storage_data)), WriteItemType.TENSOR, tensor_data=data)
        metadata.all_local_plans = [SavePlan([item])]  # type: ignore[attr-defined]

    edited(tmp_path, add)
    state = {"a": torch.zeros(6)}
    checkpoint.load_into(tmp_path, state)
    assert torch.equal(state["a"], torch.arange(6.0))
