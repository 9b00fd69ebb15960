"""A stranger's model folder, looked at before any library opens it.

Nothing in a folder is run: weights are read as tensors alone, modules are known by name, a model's own code is left
where it is. What remains is what a few words in a file can make a library do, and is refused here: open files
elsewhere, fetch code from the hub, build a million layers, reserve more memory than the weights could ever fill.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from kinvec.contracts import KinvecError
from kinvec.files.reading import read_object

COUNTS = re.compile(r"(layers?|labels|experts|groups?|heads|blocks?|stages?|depths?|num|buckets|langs|codebooks)$")
MOST_COUNTED = 10_000  # of what a library makes one by one
MOST_BUFFERS = 1 << 30  # bytes that a model's tables (positions, masks) may take beyond its weights
CODE_NAMES = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
ADAPTER_KEYS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "fan_in_fan_out", "use_rslora",
    "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "rank_pattern", "alpha_pattern",
}  # fmt: skip
HIGHEST_RANK = 4096
MOST_GROWTH = 10_000  # characters that a tokenizer may make of one, and tokens that it may add to a text
SLOW_PATTERN = re.compile(r"\)[*+{]|([*+][^*+]*){7}")  # regular expressions that can take for ever on a short name


def vet_folder(folder: Path) -> None:
    """Raise `KinvecError` where a part of a model folder is no file, or one of its files asks for what it may not."""
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if not path.is_file() and not path.is_dir():
            raise KinvecError(f"{path}: a broken link, a pipe or a device; a model folder has files alone")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        for path in (folder / name, *folder.glob(f"*/{name}")):
            if path.is_file():
                _vet_index(path)
    for path in (folder / "config.json", *folder.glob("*/config.json")):
        if path.is_file():
            _vet_config(path, read_object(path))
    if (folder / "adapter_config.json").is_file():
        _vet_adapter(folder / "adapter_config.json")


def inside(folder: Path, name: Any) -> Path:
    """A place in the folder that a file of it names. Raises `KinvecError` for a path that leads out of the folder."""
    if not isinstance(name, str) or not name.isprintable():
        raise KinvecError(f"{folder / 'modules.json'}: a path in it is no text")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise KinvecError(f"{folder / 'modules.json'}: '{name}' leads outside the folder; refused")
    return folder / name


def _vet_index(path: Path) -> None:
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise KinvecError(f"{path}: its weight_map does not say which tensor is in which file")
    for name in set(names.values()):
        if PurePosixPath(name).name != name or not (path.parent / name).is_file():
            raise KinvecError(f"{path}: '{name}' is no file beside it; refused")


def _vet_config(path: Path, said: dict[str, Any]) -> None:
    """All groups of a configuration, the outer ones first."""
    for key, value in said.items():
        if isinstance(value, dict):
            _vet_config(path, value)
        if key in CODE_NAMES and "/" in str(value):
            raise KinvecError(f"{path}: '{key}' names code on the hub ('{value}'), which is not run")
        counted = value if isinstance(value, list) else [value]
        if COUNTS.search(key) and any(isinstance(n, int | float) and n > MOST_COUNTED for n in counted):
            raise KinvecError(f"{path}: '{key}' is more than {MOST_COUNTED:,}, which no model has")


def _vet_adapter(path: Path) -> None:
    from peft import LoraConfig

    said = read_object(path)
    if said.get("peft_type") != "LORA":
        raise KinvecError(f"{path}: its peft_type is {said.get('peft_type')!r}; of adapters, LORA is read")
    defaults = LoraConfig().to_dict()
    for key, value in said.items():
        if value and key not in ADAPTER_KEYS and value != defaults.get(key):
            raise KinvecError(f"{path}: '{key}' is set, and adapters with it are not read; merge it with PEFT first")
    ranks = [said.get("r"), *_patterns(path, said, "rank_pattern").values()]
    if not all(isinstance(rank, int) and 0 < rank <= HIGHEST_RANK for rank in ranks):
        raise KinvecError(f"{path}: a rank (r, rank_pattern) is no number between 1 and {HIGHEST_RANK:,}")
    names = [said.get(key) for key in ("target_modules", "exclude_modules")]
    patterns = [*_patterns(path, said, "rank_pattern"), *_patterns(path, said, "alpha_pattern")]
    for pattern in (*patterns, *(name for name in names if isinstance(name, str))):
        if len(pattern) > 1000 or SLOW_PATTERN.search(pattern):
            raise KinvecError(f"{path}: the pattern '{pattern[:80]}' could take for ever; name the modules in a list")


def _patterns(path: Path, said: dict[str, Any], key: str) -> dict[str, Any]:
    found = said.get(key) or {}
    if not isinstance(found, dict):
        raise KinvecError(f"{path}: '{key}' is no object with named values")
    return found


def vet_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise `KinvecError` for a tokenizer that makes a short text longer than any memory, step by step."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of those in plain Python, none
    parts = [getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer", "post_processor")]
    growth, added = 1.0, 0
    for step in _steps([json.loads(part.__getstate__()) for part in parts if part is not None]):
        replaced = (step.get("pattern") or {}).get("String") or "x"  # a regular expression may stand for one character
        growth *= max(1, len(step.get("content") or "") / len(replaced))
        added += len(step.get("prepend") or "")
        special = step.get("special_tokens") or {}
        for piece in step.get("single") or ():
            added += len(special[piece["SpecialToken"]["id"]]["ids"]) if "SpecialToken" in piece else 0
    if growth > MOST_GROWTH or added > MOST_GROWTH:
        times = f"{max(growth, added):,.0f} times as long"
        raise KinvecError(f"{folder}: its tokenizer makes a short text up to {times}; refused")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within lists and objects."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _steps(inner)


def refuse_bomb(path: Path) -> None:
    """Raise `KinvecError` for a file of torch that is compressed: torch writes none, and one may unfold without end."""
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise KinvecError(f"{path}: compressed, as no checkpoint of torch is; refused")


def vet_size(kind: Any, config: Any, weights: Sequence[Path]) -> None:
    """Raise `KinvecError` for a configuration of a model that the weights cannot be those of: it has too many numbers.

    The model is built without memory (torch's device `meta`): some hundredths of a second.
    """
    stored = sum(path.stat().st_size for path in weights)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    tensors = sum(map(_tensors, weights))
    if layers > tensors:
        raise KinvecError(
            f"{weights[0].parent}: config.json tells of {layers:,} layers, the weights of {tensors:,} tensors"
        )
    with torch.device("meta"):
        model = kind(config) if isinstance(kind, type) and hasattr(kind, "forward") else kind.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if numbers > 2 * stored + (1 << 20) or tables > stored + MOST_BUFFERS:  # 4 bits a number, and a new pooler
        what = f"config.json tells of {numbers:,} numbers and {tables:,} bytes of tables"
        raise KinvecError(
            f"{weights[0].parent}: {what}, but the weights have {stored:,} bytes; they do not belong together"
        )


def _tensors(path: Path) -> int:
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return len(zipfile.ZipFile(path).infolist()) if zipfile.is_zipfile(path) else 64 + path.stat().st_size // 64
    with safe_open(path, "pt") as file:
        return len(list(file.keys()))
