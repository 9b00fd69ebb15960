"""The model folder on the other side of a `.nemo`: its tensors, its tokenizer, and what NeMo does not keep."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from kinvec.backbone import fetch, find_model
from kinvec.contracts import KinvecError
from kinvec.files import write_json
from kinvec.formats.nemo_bert import count_layers, expected
from kinvec.formats.nemo_config import Settings

OURS = "kinvec"  # the folder inside the archive that NeMo does not look at
_OURS = re.compile(r"(?:\d+_\w+/)?[\w-][\w.-]*\.(?:json|txt|model|jinja)|\d+_Dense/model\.safetensors")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of the first BERTs


def _inner(source: str) -> Path:
    """The folder of the transformer inside a model folder."""
    folder = fetch(source)
    modules = folder / "modules.json"
    return folder / (json.loads(modules.read_text("utf-8"))[0].get("path") or "") if modules.is_file() else folder


def encoder_tensors(source: str, config: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors of a BERT folder, as they are stored, and the names of those that are left out (heads)."""
    stored: dict[str, Tensor] = {}
    for path in sorted(_inner(source).glob("*.safetensors")):
        stored |= load_file(path)
    named = {}
    for name, tensor in stored.items():
        short = name.removeprefix("bert.")
        for old, new in _OLD_NAMES.items():
            short = short.removesuffix(old) + new if short.endswith(old) else short
        named[short] = tensor
    needed = expected(config.num_hidden_layers)
    if missing := [name for name in needed if name not in named]:
        raise KinvecError(f"{source}: the weights lack {len(missing)} of a BERT's tensors, '{missing[0]}' among them")
    wanted = [*needed, "pooler.dense.weight", "pooler.dense.bias"]
    left_out = sorted(set(named) - set(wanted) - {"embeddings.position_ids"})
    return {name: named[name] for name in wanted if name in named}, left_out


def tokenizer_name(source: str) -> str | None:
    """The hub name of a model's tokenizer: the source's own, or the one its files mention; None where there is none."""
    if not source.startswith("pkg:") and not Path(source).expanduser().is_dir():
        return source
    for file, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        path = _inner(source) / file
        name = json.loads(path.read_text("utf-8")).get(key) if path.is_file() else None
        if isinstance(name, str) and _HUB_NAME.fullmatch(name):
            return name
    return None


def lay_out(ours: Path, plain: Path, settings: Settings, tensors: Mapping[str, Tensor], tokenizer: str | None) -> None:
    """Make the folder `plain`, complete but for the weights.

    It is the folder `ours` of the archive where there is one, else made of the settings: NeMo's embedding models take
    the mean of the token vectors and scale it to length 1.
    """
    plain.mkdir()
    if ours.is_dir():
        if tokenizer is not None:
            raise KinvecError("it holds its own tokenizer, written by kinvec; leave --tokenizer out")
        _copy_ours(ours, plain)
        return
    from transformers import BertConfig

    words = _tokenizer(settings, ours.parent, tokenizer)
    words.save_pretrained(plain)
    positions, width = tensors["embeddings.position_embeddings.weight"].shape
    types = tensors.get("embeddings.token_type_embeddings.weight")
    BertConfig(
        architectures=["BertModel"],
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=count_layers(tensors),
        num_attention_heads=settings.heads,
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.bias"]),
        hidden_act=settings.activation,
        hidden_dropout_prob=settings.dropout,
        max_position_embeddings=positions,
        type_vocab_size=len(types) if types is not None else 1,
        layer_norm_eps=settings.epsilon,
        pad_token_id=words.pad_token_id,
    ).save_pretrained(plain)
    length = min(settings.length or positions, positions)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    write_json(plain / "modules.json", modules)
    write_json(
        plain / "1_Pooling" / "config.json", {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    )
    write_json(plain / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    write_json(plain / "config_sentence_transformers.json", {"prompts": settings.prompts, "default_prompt_name": None})


def _copy_ours(ours: Path, plain: Path) -> None:
    """Copy the archive's own model folder: the files that one is made of, and no path that leads out of it."""
    for path in sorted(ours.rglob("*")):
        name = path.relative_to(ours).as_posix()
        if path.is_file():
            if not _OURS.fullmatch(name):
                raise KinvecError(f"'{OURS}/{name}' is no file of a model folder; refused")
            (plain / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, plain / name)
    try:
        modules = json.loads((plain / "modules.json").read_text("utf-8"))
        places = [str(module["path"]) for module in modules if module["type"].isprintable()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise KinvecError(f"its folder {OURS}/ is damaged (modules.json)") from None
    if any(place and not re.fullmatch(r"\d+_\w+", place) for place in places):
        raise KinvecError(f"'{OURS}/modules.json' leads outside its folder; refused")


def _tokenizer(settings: Settings, content: Path, given: str | None) -> Any:
    """The tokenizer: the one given, the archive's own word list, or the one that its settings name on the hub."""
    from transformers import AutoTokenizer, BertTokenizerFast

    said = settings.tokenizer
    vocabulary = str(said.get("vocab_file") or "")
    if given is None and vocabulary.startswith("nemo:") and str(said.get("type", "")).startswith("BertWordPiece"):
        words = content / Path(vocabulary.removeprefix("nemo:")).name
        if words.is_file():
            return BertTokenizerFast(str(words), do_lower_case="LowerCase" in said["type"])
    name = given if given is not None else str(said.get("type") or "")
    if given is None and not _HUB_NAME.fullmatch(name):
        raise KinvecError(
            f"it holds no tokenizer, and its settings name none ('{name}'); add --tokenizer NAME or FOLDER"
        )
    try:
        return AutoTokenizer.from_pretrained(
            find_model(name) if name.startswith("pkg:") else name, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise KinvecError(
            f"its tokenizer '{name}' is neither here nor on the hub; add --tokenizer NAME or FOLDER ({reason})"
        ) from None
