"""The files of a model folder: what they say, and how they are written.

The folder is a sentence-transformers model plus `kinvec.json` (format, attention, prompts, maximum length, lineage).
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from kinvec.backbone import quiet, trainable
from kinvec.contracts import KinvecError
from kinvec.files import content_fingerprint, damaged, saying_full, write_json
from kinvec.files.reading import read_object
from kinvec.pooling import POOLINGS, Dense, Normalize
from kinvec.vetting import inside, refuse_bomb

FORMAT = 1
LONGEST_DEFAULT = 512  # where neither folder nor tokenizer names a maximum length


def read_settings(folder: Path, inner: Path, modules: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the files say of pooling, prompts, maximum length and so on, for `Embedder`."""
    texts = said(inner / "sentence_bert_config.json", {"max_seq_length": int, "do_lower_case": bool})
    whole = said(folder / "config_sentence_transformers.json", WHOLE)
    ours = said(folder / "kinvec.json", OURS)
    if (written := ours.get("format") or FORMAT) > FORMAT:
        raise KinvecError(f"{folder / 'kinvec.json'}: format {written} is newer than this kinvec; upgrade kinvec")
    pooling, include_prompt = _pooling(folder, modules, model)
    limits = [texts.get("max_seq_length"), tokenizer.model_max_length, _positions(model)]
    known = [int(limit) for limit in limits if limit is not None and limit < 10**9]
    if min(known, default=1) < 1:
        raise KinvecError(f"{folder}: its longest text has {min(known)} tokens (max_seq_length, model_max_length)")
    return {
        "pooling": pooling,
        "include_prompt": include_prompt,
        "prompts": _prompts(whole),
        "max_length": min(known) if known else LONGEST_DEFAULT,
        "lower_case": bool(texts.get("do_lower_case")),
        "similarity": whole.get("similarity_fn_name") or "cosine",
        "lineage": ours.get("lineage", []),
        "append_eos": ours.get("append_eos", False),
    }


WHOLE = {"prompts": dict[str, str | None], "default_prompt_name": str, "similarity_fn_name": str}
OURS = {
    "format": int, "attention": Literal["causal", "bidirectional"], "append_eos": bool, "prompts": dict[str, str],
    "max_length": PositiveInt, "lineage": list[dict[str, Any]], "base": str, "pooling": list[str], "normalize": bool,
    "include_prompt": bool,
}  # fmt: skip


def said(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """The file's object, empty where there is no file.

    Raises `KinvecError` where the value of one of these keys is there and is of another kind.
    """
    found = optional_json(path)
    for key, kind in kinds.items():
        try:
            TypeAdapter(kind | None).validate_python(found.get(key), strict=True)
        except ValidationError as error:
            raise KinvecError(f"{path}: '{key}' cannot be {found[key]!r} ({error.errors()[0]['msg']})") from None
    return found


def _prompts(whole: dict[str, Any]) -> dict[str, str]:
    """The prompts by name. A default prompt serves both sides; documents may have theirs as `passage` or `corpus`."""
    prompts = {key: text for key, text in (whole.get("prompts") or {}).items() if text}
    default = prompts.get(whole.get("default_prompt_name"))
    document = prompts.pop("passage", None) or prompts.pop("corpus", None)
    both = {"query": default, "document": default} if default else {}
    return both | ({"document": document} if document else {}) | prompts


def _positions(model: Any) -> int | None:
    """The longest text the position embeddings allow; learned tables after the padding index lose its places."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return int(positions) - (padding + 1 if padding is not None else 0)


POOLING_FLAGS = {  # pooling mode → its flag in `1_Pooling/config.json`
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
KNOWN_MODULES = {"Transformer", "Pooling", "Dense", "Normalize", "Dropout"}


def _pooling(folder: Path, modules: Any, model: Any) -> tuple[tuple[str, ...], bool]:
    if modules is None:  # a plain model: as sentence-transformers, the last token of a causal decoder, else the mean
        architecture = (getattr(model.config, "architectures", None) or [""])[0]
        causal = architecture.endswith("ForCausalLM") and getattr(model.config, "is_causal", True)
        return ("lasttoken",) if causal else ("mean",), True
    kinds = [_kind(module) for module in modules]
    unknown = [kind for kind in kinds if kind not in KNOWN_MODULES]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        what = unknown[0] if unknown else " → ".join(kinds)
        raise KinvecError(
            f"{folder / 'modules.json'}: module '{what}' is not supported (sentence-transformers' "
            f"{', '.join(sorted(KNOWN_MODULES))} are)"
        )
    place = inside(folder, modules[1]["path"]) / "config.json"
    config = read_object(place) | said(place, {"pooling_mode": str | list[str], "include_prompt": bool})
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, flag in POOLING_FLAGS.items() if config.get(flag)]
    chosen = (modes,) if isinstance(modes, str) else tuple(modes or ("mean",))
    if any(mode not in POOLINGS for mode in chosen):
        raise KinvecError(f"{folder / modules[1]['path']}: unknown pooling {chosen}; known are {', '.join(POOLINGS)}")
    return chosen, bool(config.get("include_prompt", True))


def _kind(module: dict[str, Any]) -> str:
    """A module's name; in full where it is the model's own code, which may do anything and is not run."""
    library, _, name = module["type"].rpartition(".")
    return name if library.split(".")[0] == "sentence_transformers" else module["type"]


def head_module(folder: Path, module: dict[str, Any]) -> nn.Module | None:
    """A module after pooling; nothing for dropout, which is for training only."""
    kind, place = _kind(module), inside(folder, module["path"])
    if kind == "Normalize":
        return Normalize()
    return _dense(place) if kind == "Dense" else None


def _dense(place: Path) -> Dense:
    file = place / "config.json"
    config = read_object(file)
    activation = config.get("activation_function") or "torch.nn.modules.linear.Identity"
    name = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.modules.") or name not in nn.modules.__all__:
        raise KinvecError(f"{file}: activation '{activation}' is not one of torch's own; it is not run")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise KinvecError(f"{file}: a Dense with a residual, or on another input than the embedding, is not supported")
    weights = {key.removeprefix("linear."): value.float() for key, value in _tensors(place).items()}
    try:
        inputs, outputs, activation = config["in_features"], config["out_features"], getattr(nn, name)()
        with torch.device("meta"):  # as large as the file says, until the weights say that they are
            dense = Dense(inputs, outputs, config.get("bias", True), activation)
        dense.linear.load_state_dict(weights, assign=True)
        if dense(torch.zeros(1, inputs)).shape != (1, outputs):
            raise TypeError(f"{name} changes the number of dimensions")
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise KinvecError(f"{file}: does not describe the weights beside it ({reason})") from None
    return dense


def _tensors(place: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, old = place / "model.safetensors", place / "pytorch_model.bin"
    try:
        if weights.is_file():
            return load_file(weights)
        if old.is_file():  # small, and read as tensors only: nothing in it is run
            refuse_bomb(old)
            with quiet():
                return torch.load(old, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise KinvecError(f"{place}: the weights are damaged, cut short or not tensors alone ({reason})") from None
    raise KinvecError(f"{place}: no weights (model.safetensors)")


def write_folder(embedder: Any, model: Any, folder: Path) -> None:
    """All files of the model folder: weights (those of `model`), tokenizer, modules, prompts, `kinvec.json` last."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, safe_serialization=True)
    if embedder.tokenizer.pad_token is None:
        embedder.tokenizer.pad_token = embedder.tokenizer.eos_token
    if embedder.tokenizer.is_fast:  # what the last call left in it is no property of the model
        embedder.tokenizer.backend_tokenizer.no_truncation()
    embedder.tokenizer.save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [
        (f"{place}_{type(module).__name__}", type(module).__name__) for place, module in enumerate(embedder.head, 2)
    ]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds)
    ]
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": embedder.max_length, "do_lower_case": embedder.lower_case},
    )
    write_json(folder / "1_Pooling" / "config.json", _pooling_config(embedder))
    for (path, _), module in zip(kinds[2:], embedder.head, strict=True):
        (folder / path).mkdir()
        if isinstance(module, Dense):
            _write_dense(folder / path, module)
    write_json(folder / "modules.json", modules)
    versions = _versions()
    prompts = {"query": "", "document": ""} | embedder.prompts
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": versions,
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": embedder.similarity,
        },
    )
    write_json(folder / "kinvec.json", describe(embedder))
    seal(folder)


def seal(folder: Path) -> None:
    """Note in `kinvec.json` the checksums of the files that nobody edits: weights and tokenizer."""
    checksums = {name: content_fingerprint(folder / name) for name in _sealed(folder)}
    write_json(folder / "kinvec.json", read_object(folder / "kinvec.json") | {"checksums": checksums})


def refuse_damaged(folder: Path) -> None:
    """Raise `KinvecError` where a file is not the one that was sealed. Folders of others are not sealed."""
    noted = optional_json(folder / "kinvec.json").get("checksums")
    if not isinstance(noted, dict):
        return
    if names := damaged(folder, {name: noted[name] for name in _sealed(folder) if name in noted}):
        raise KinvecError(
            f"{folder / names[0]}: damaged (its checksum is not the one in kinvec.json); make the model again or "
            "restore the file, and if you have replaced it yourself, take 'checksums' out of kinvec.json"
        )


def _sealed(folder: Path) -> list[str]:
    found = [*folder.rglob("*.safetensors"), *folder.rglob("tokenizer.json")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def describe(embedder: Any) -> dict[str, Any]:
    """What `kinvec.json` says of a model."""
    return {
        "format": FORMAT,
        "attention": embedder.attention,
        "append_eos": embedder.append_eos,
        "prompts": embedder.prompts,
        "max_length": embedder.max_length,
        "lineage": embedder.lineage,
    }


def save_adapter(embedder: Any, folder: Path, base: str) -> None:
    """Write the adapters as a PEFT folder, with what PEFT has no place for in `kinvec.json` (attention above all)."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = embedder.backbone.model
    with saying_full(folder, sum(parameter.nbytes for _, parameter in trainable(embedder.backbone))):
        model.save_pretrained(folder)
        beside = {"base": base, "pooling": embedder.pooling, "include_prompt": embedder.include_prompt}
        beside["normalize"] = any(isinstance(module, Normalize) for module in embedder.head)
        write_json(folder / "kinvec.json", describe(embedder) | beside)
        seal(folder)


def _pooling_config(embedder: Any) -> dict[str, Any]:
    """The pooling as flags, the spelling that every version of sentence-transformers reads."""
    chosen = {flag: mode in embedder.pooling for mode, flag in POOLING_FLAGS.items()}
    return {"word_embedding_dimension": embedder.backbone.width, **chosen, "include_prompt": embedder.include_prompt}


def _write_dense(place: Path, dense: Dense) -> None:
    from safetensors.torch import save_file

    save_file(
        {f"linear.{key}": value.contiguous() for key, value in dense.linear.state_dict().items()},
        place / "model.safetensors",
    )
    kind = type(dense.activation)
    config: dict[str, Any] = {"in_features": dense.linear.in_features, "out_features": dense.linear.out_features}
    config |= {"bias": dense.linear.bias is not None, "activation_function": f"{kind.__module__}.{kind.__name__}"}
    write_json(place / "config.json", config)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    names = {"sentence_transformers": "sentence-transformers", "transformers": "transformers", "pytorch": "torch"}
    found = {}
    for key, package in names.items():
        try:
            found[key] = version(package)
        except PackageNotFoundError:
            continue
    return found


def optional_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file."""
    return read_object(path) if path.is_file() else {}
