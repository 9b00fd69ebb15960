"""Every form of `.nemo` that NeMo has written is read bit for bit; what cannot be converted is named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nemo_archives import (
    LAYERS,
    MCORE,
    WIDTH,
    archive_of,
    changed,
    one_file,
    rank_of_nemo,
    ranks_of_nemo,
    refused,
    same,
    sharded,
    weights,
)
from safetensors.torch import save_file
from torch import Tensor

import kinvec

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the blood of a mouse shows a high level", "a trial", "insulin reduces glucose in men and women of any age"]

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
    assert back.tokenize(["The blood, a mouse"]).rows == plain.tokenize(["The blood, a mouse"]).rows


def test_info_says_what_an_archive_is(archives: dict[bool, Path], main: Callable[..., tuple[int, str]]) -> None:
    said = kinvec.info(str(archives[True]))
    assert said["form"] == "mcore, a sharded folder" and said["layers"] == LAYERS and said["written_by_kinvec"]
    code, text = main("info", str(archives[False]))
    assert code == 0 and "one file" in text


# ---- what cannot be converted says so ----


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
