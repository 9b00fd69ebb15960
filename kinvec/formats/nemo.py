"""NeMo's `.nemo` archives of BERT models ↔ model folders, bit for bit.

A `.nemo` is a tar of settings and weights (nemo_archive.py); its tensors have names and layouts of their own
(nemo_bert.py) in one of several forms (nemo_weights.py). It embeds no Hugging Face tokenizer; what kinvec writes holds
one nevertheless, with pooling, prompts and lineage, in a folder `kinvec/` that NeMo does not look at.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from kinvec.console import say
from kinvec.contracts import KinvecError
from kinvec.embedder import Embedder, open_folder
from kinvec.files import replace_folder, saying_full, sweep_beside
from kinvec.files.writing import beside_path
from kinvec.folder import seal
from kinvec.formats import nemo_archive as archives
from kinvec.formats.nemo_bert import count_layers, to_nemo
from kinvec.formats.nemo_config import model_config, read_settings, refuse_others
from kinvec.formats.nemo_folder import OURS, encoder_tensors, lay_out, tokenizer_name
from kinvec.formats.nemo_weights import read_weights, write_sharded, write_whole

PRECISIONS = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_nemo(source: str, archive: Path, *, mcore: bool, tokenizer: str | None, precision: str) -> dict[str, Any]:
    """Write the BERT of a model folder, hub name or `pkg:NAME` as a `.nemo`; what was written, by name.

    `tokenizer` is the hub name under which NeMo will look for the tokenizer, found in the folder unless given.
    Raises `KinvecError` for a model that is no BERT, and when `archive` is there and is no `.nemo`.
    """
    if archive.exists():
        _refuse_other(archive)
    embedder = open_folder(source)
    config: Any = embedder.backbone.model.config
    refuse_others(config, source)
    tensors, left_out = encoder_tensors(source, config)
    if (dtype := PRECISIONS[precision]) is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    settings = model_config(config, tensors, mcore, _named_tokenizer(source, tokenizer))
    with _workplace(archive, 3 * _bytes(tensors)) as work:
        content = work / "content"
        embedder.save(content / OURS)
        (content / OURS / "model.safetensors").unlink()
        seal(content / OURS)
        (content / archives.CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
        theirs = to_nemo(tensors, config.num_hidden_layers, config.num_attention_heads, mcore)
        if mcore:
            write_sharded(content, theirs, config.num_hidden_layers)
        else:
            write_whole(content, theirs)
        archives.pack(content, work / archive.name)
        (work / archive.name).replace(archive)
    return {
        "written": str(archive),
        "form": "mcore (sharded folder)" if mcore else "non-mcore (model_weights.ckpt)",
        "tensors": len(tensors),
        "precision": _types(tensors),
        "tokenizer": settings["tokenizer"]["type"],
        "left_out": left_out,
    }


def read_nemo(archive: Path, folder: Path, *, tokenizer: str | None, precision: str) -> dict[str, Any]:
    """Write the BERT of a `.nemo` as a model folder; what was written, by name.

    `tokenizer` (hub name, folder or `pkg:NAME`) serves for archives that were not written by kinvec; without it the
    name in the archive's settings is used. Raises `KinvecError` for an archive that means harm (before anything of it
    is used), that holds something else than a BERT, and when `folder` is there and was not saved by kinvec.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "kinvec.json").is_file())):
        raise KinvecError(f"{folder}: it is there and is not a model saved by kinvec; choose another name")
    if archive.is_dir():
        raise KinvecError(f"{archive}: a folder, as NeMo 2 writes them, is not read; only .nemo archives are")
    with _workplace(folder, 3 * archive.stat().st_size) as work:
        content, plain = work / "content", work / OURS
        content.mkdir()
        archives.unpack(archive, content)
        with _naming(archive, work):
            settings = read_settings(content, archive)
            tensors = read_weights(content, settings.heads, settings.legacy)
            lay_out(content / OURS, plain, settings, tensors, tokenizer)
            tensors = _fitted(tensors, plain)
            if (dtype := PRECISIONS[precision]) is not None:
                tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
            embedder = _opened(plain)
        embedder.save(work / "model")
        (plain / "model.safetensors").replace(work / "model" / "model.safetensors")  # in its own precision
        seal(work / "model")
        replace_folder(work / "model", folder)
    return {
        "written": str(folder),
        "from": settings.target or "BERT",
        "tensors": len(tensors),
        "precision": _types(tensors),
        "pooling": " + ".join(embedder.pooling),
        "prompts": embedder.prompts,
    }


def describe(archive: Path) -> dict[str, Any]:
    """What a `.nemo` holds, from its settings and its members' names alone; nothing is unpacked."""
    config, names = archives.read_config(archive)
    tokenizer = config.get("tokenizer")
    return {
        "archive": str(archive),
        "target": config.get("target"),
        "nemo_version": config.get("nemo_version"),
        "form": _form(names),
        "layers": config.get("num_layers"),
        "dimension": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "max_length": config.get("max_position_embeddings"),
        "tokenizer": tokenizer.get("type") if isinstance(tokenizer, dict) else tokenizer,
        "written_by_kinvec": any(name.startswith(f"{OURS}/") for name in names),
        "files": len(names),
    }


def _form(names: list[str]) -> str:
    tops = {name.split("/")[0] for name in names}
    if "model_weights" in tops:
        return "mcore, a sharded folder"
    ranks = sorted(top for top in tops if re.match(r"(mp|tp)_rank_", top))
    return f"one file for each of {len(ranks)} ranks" if ranks else "one file"


def _named_tokenizer(source: str, given: str | None) -> str:
    """The tokenizer's name for NeMo to look up; says so where none is known."""
    if name := given or tokenizer_name(source):
        return name
    name = Path(source).resolve().name
    say(f"{source}: its files name no tokenizer on the hub; NeMo will look for '{name}': --tokenizer NAME sets it")
    return name


def _refuse_other(archive: Path) -> None:
    try:
        archives.read_config(archive)
    except (KinvecError, OSError):
        raise KinvecError(f"{archive}: it is there and is no .nemo archive; choose another name") from None


@contextmanager
def _workplace(destination: Path, size: int) -> Iterator[Path]:
    """A fresh folder beside the destination, gone afterwards; a full disk is said as such.

    What a killed conversion to the same destination left there is swept.
    """
    work = beside_path(destination.absolute()).with_suffix(".work")  # replace_folder has the name with .tmp
    for left in work.parent.glob(f".{glob.escape(destination.name)}.*.work"):
        shutil.rmtree(left, ignore_errors=True)
    sweep_beside(destination)
    try:  # a signal may come as soon as the folder is there
        work.mkdir(parents=True)
        with saying_full(work, size):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _opened(folder: Path) -> Embedder:
    """The model folder opened, which shows that it is whole."""
    try:
        return open_folder(folder)
    except KinvecError:
        raise
    except Exception as error:  # of damaged files the tokenizers library says so in plain exceptions
        raise KinvecError(f"its folder {OURS}/ cannot be opened ({str(error).splitlines()[0]})") from None


@contextmanager
def _naming(archive: Path, work: Path) -> Iterator[None]:
    """Let errors name the archive instead of the place where it was unpacked."""
    try:
        yield
    except KinvecError as error:
        said = str(error).replace(f"{work}/", "").removeprefix(f"{archive}: ")
        raise type(error)(f"{archive}: {said}") from None


def _fitted(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors as the folder's `config.json` wants them: the vocabulary trimmed to its size."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        vocabulary, layers = int(config["vocab_size"]), int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        raise KinvecError(f"{OURS}/config.json is damaged") from None
    if layers != count_layers(tensors):
        raise KinvecError(f"{OURS}/config.json tells of {layers} layers, the weights of {count_layers(tensors)}")
    words = "embeddings.word_embeddings.weight"
    if len(tensors[words]) < vocabulary:
        raise KinvecError(
            f"the tokenizer has {config['vocab_size']:,} tokens, but only {len(tensors[words]):,} have an embedding; "
            "name the tokenizer it was trained with: --tokenizer NAME"
        )
    return {**tensors, words: tensors[words][:vocabulary].contiguous()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _types(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
