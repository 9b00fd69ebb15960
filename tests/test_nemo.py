"""`.nemo` both ways: there and back bit for bit, and written as NeMo's converter writes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import MINILM
from hypothesis import given
from hypothesis import strategies as st
from nemo_archives import HEADS, LAYERS, MCORE, OTHER, WIDTH, rank_of_nemo, same, unpacked, weights
from safetensors.torch import save_file
from tiny_models import save_plain
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

import kinvec
from kinvec.contracts import KinvecError
from kinvec.formats import nemo_bert

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the blood of a mouse shows a high level", "a trial", "insulin reduces glucose in men and women of any age"]


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


# ---- the command ----


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
