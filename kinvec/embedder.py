"""A model folder opened: backbone → pooling → (dense) → normalise. Encode with it, train it, save it.

The folder is a sentence-transformers model plus `kinvec.json` (format, attention, prompts, maximum length, lineage).
Shapes: n = texts, d = embedding dimensions, T = tokens of a pack.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor, nn

from kinvec.backbone import Backbone, fetch, fuse, keep_pages, load_backbone, resolve_device, resolve_precision
from kinvec.batching import Pack, Tokens, packs, tokenize
from kinvec.console import progress as progress_bar
from kinvec.contracts import KinvecError
from kinvec.files import replace_folder, saying_full
from kinvec.pooling import POOLINGS, pool

FORMAT = 1
WINDOW = 8192  # texts sorted by length at a time: enough to fill packs with equal lengths, little enough to hold
ENCODE_TOKENS = 8192  # tokens a pack when encoding: past the point where larger products are faster on CPUs
LONGEST_DEFAULT = 512  # where neither folder nor tokenizer names a maximum length


class Dense(nn.Module):
    """A linear layer with an activation after pooling, as sentence-transformers' `Dense`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "n a"]) -> Float[Tensor, "n b"]:
        return self.activation(self.linear(x))


class Normalize(nn.Module):
    """Scale every vector to length 1."""

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return nn.functional.normalize(x, dim=-1)


class Embedder(nn.Module):
    """Texts → vectors, with everything the folder says: pooling, prompts, maximum length, normalisation."""

    def __init__(self, backbone: Backbone, tokenizer: Any, head: Sequence[nn.Module], settings: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.head = nn.ModuleList(head)
        self.name: str = settings["name"]
        self.pooling: tuple[str, ...] = tuple(settings["pooling"])
        self.include_prompt: bool = settings["include_prompt"]
        self.prompts: dict[str, str] = dict(settings["prompts"])
        self.max_length: int = settings["max_length"]
        self.lower_case: bool = settings["lower_case"]
        self.similarity: str = settings["similarity"]
        self.lineage: list[dict[str, Any]] = list(settings["lineage"])
        self.precision = "fp32"

    @classmethod
    def load(
        cls, name_or_folder: str | Path, *, precision: str = "auto", device: str = "auto", max_length: int | None = None
    ) -> Embedder:
        """Open a sentence-transformers folder, a plain Hugging Face folder, a hub name or `pkg:NAME`, ready to encode.

        `precision` is fp32, bf16 or auto (bf16 where the hardware multiplies it). Raises `KinvecError` with the folder
        and the remedy when something is missing, damaged or not supported.
        """
        place = resolve_device(device)
        embedder = open_folder(name_or_folder, max_length)
        embedder.precision = resolve_precision(precision, place)
        if embedder.precision == "bf16":
            embedder.backbone.to(torch.bfloat16)
        fuse(embedder.backbone)
        return embedder.to(place).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dimension(self) -> int:
        """Number of dimensions of the vectors."""
        width = self.backbone.width * len(self.pooling)
        for module in self.head:
            width = module.linear.out_features if isinstance(module, Dense) else width
        return width

    @property
    def attention(self) -> str:
        """`causal` where a token sees only what precedes it, else `bidirectional`."""
        model: Any = self.backbone.model
        causal = getattr(model.config, "is_causal", None)
        if causal is None:  # the class names do not tell: a saved LlamaForCausalLM is a LlamaModel
            causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
        return "causal" if causal else "bidirectional"

    @property
    def fingerprint(self) -> str:
        """A hash of the weights and of all that changes vectors: pooling, prompts, maximum length, precision."""
        digest = xxhash.xxh3_128()
        for key, value in sorted(self.state_dict().items()):
            flat = value.detach().cpu().contiguous()
            digest.update(key.encode())
            digest.update(flat.view(-1).view(torch.uint8).numpy())
        said = [self.pooling, self.include_prompt, self.prompts, self.max_length, self.lower_case, self.precision]
        digest.update(json.dumps([*said, [type(module).__name__ for module in self.head]], sort_keys=True).encode())
        return digest.hexdigest()

    def forward(self, texts: Pack) -> Float[Tensor, "n d"]:
        """Vectors of a pack's texts, in the pack's order, in float32."""
        hidden = self.backbone(texts)
        lengths = torch.tensor(texts.lengths, device=hidden.device)
        skip = torch.tensor(texts.skip, device=hidden.device) if any(texts.skip) else None
        with torch.autocast(hidden.device.type, enabled=False):
            vectors = pool(hidden, texts.starts, lengths, self.pooling, skip)
            for module in self.head:
                vectors = module(vectors)
        return vectors

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> Tokens:
        """Token ids of the texts behind `prompt`, cut at the model's maximum length."""
        return tokenize(self.tokenizer, texts, self.max_length, prompt, not self.include_prompt)

    def encode(self, texts: Sequence[str], *, prompt: str = "", progress: bool = True) -> Float[np.ndarray, "n d"]:
        """Vectors of the texts, float32, in their order. `prompt` is put before each."""
        if isinstance(texts, str):
            raise KinvecError("encode takes a list of texts; for one text write encode([text])")
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        training = self.training
        self.eval()
        show = progress and len(texts) > 256
        with (
            torch.inference_mode(),
            self._autocast(),
            progress_bar("encoding", len(texts)) if show else nullcontext() as bar,
        ):
            for start in range(0, len(texts), WINDOW):
                window = self.tokenize(list(texts[start : start + WINDOW]), prompt)
                for rows, vectors in self._encode_tokens(window):
                    out[start + rows] = vectors
                    if bar is not None:
                        bar.advance(len(rows))
        self.train(training)
        return out

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors of queries, with the model's query prompt."""
        return self.encode(texts, prompt=self.prompts.get("query", ""))

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors of documents, with the model's document prompt."""
        return self.encode(texts, prompt=self.prompts.get("document", ""))

    def _encode_tokens(self, tokens: Tokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for texts in packs(tokens, ENCODE_TOKENS):
            yield np.array(texts.rows), self(texts.to(self.device)).float().cpu().numpy()

    def _autocast(self) -> AbstractContextManager[Any]:
        mixed = self.precision == "bf16" and next(self.backbone.parameters()).dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def save(self, folder: str | Path) -> None:
        """Write the model folder, beside and renamed: one of ours of that name is replaced, never half-written.

        Raises `KinvecError` when the folder holds something else.
        """
        final = Path(folder)
        if final.is_dir() and any(final.iterdir()) and not (final / "kinvec.json").is_file():
            raise KinvecError(f"{final}: the folder is not empty and not a model saved by kinvec; choose another name")
        beside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            with saying_full(beside, sum(value.nbytes for value in self.state_dict().values())):
                write_folder(self, beside)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        replace_folder(beside, final)


def open_folder(name_or_folder: str | Path, max_length: int | None = None) -> Embedder:
    """The embedder of a folder in float32, on the CPU, unfused: the state from which training starts."""
    from transformers import AutoTokenizer

    keep_pages()
    folder = fetch(str(name_or_folder))
    modules = _read_json(folder / "modules.json") if (folder / "modules.json").is_file() else None
    inner = folder / (modules[0].get("path") or "") if modules else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(inner, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise KinvecError(f"{inner}: cannot open the tokenizer: {str(error).splitlines()[0]}") from None
    files = list(type(tokenizer).vocab_files_names.values())
    if files and not any((inner / file).is_file() for file in files):  # transformers makes an empty one of nothing
        raise KinvecError(f"{inner}: there is no tokenizer ({' or '.join(files)}) beside the model")
    model = load_backbone(inner)
    backbone = Backbone(model, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    settings = _settings(folder, inner, modules, model, tokenizer) | {"name": str(name_or_folder)}
    if max_length is not None:
        settings["max_length"] = min(max_length, settings["max_length"])
    if settings["lower_case"]:
        _lower_case(tokenizer)
    head = [_head_module(folder, module) for module in (modules or [])[2:]]
    return Embedder(backbone, tokenizer, [module for module in head if module is not None], settings)


def _settings(folder: Path, inner: Path, modules: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    texts = _optional_json(inner / "sentence_bert_config.json")
    whole = _optional_json(folder / "config_sentence_transformers.json")
    ours = _optional_json(folder / "kinvec.json")
    if ours.get("format", FORMAT) > FORMAT:
        raise KinvecError(
            f"{folder / 'kinvec.json'}: format {ours['format']} is newer than this kinvec; upgrade kinvec"
        )
    pooling, include_prompt = _pooling(folder, modules, model)
    limits = [texts.get("max_seq_length"), tokenizer.model_max_length, _positions(model)]
    known = [int(limit) for limit in limits if limit is not None and limit < 10**9]
    return {
        "pooling": pooling,
        "include_prompt": include_prompt,
        "prompts": _prompts(whole),
        "max_length": min(known) if known else LONGEST_DEFAULT,
        "lower_case": bool(texts.get("do_lower_case")),
        "similarity": whole.get("similarity_fn_name") or "cosine",
        "lineage": ours.get("lineage", []),
    }


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
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    unknown = [kind for kind in kinds if kind not in KNOWN_MODULES]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        what = unknown[0] if unknown else " → ".join(kinds)
        raise KinvecError(
            f"{folder / 'modules.json'}: module '{what}' is not supported ({', '.join(sorted(KNOWN_MODULES))} are)"
        )
    config = _read_json(folder / modules[1]["path"] / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, flag in POOLING_FLAGS.items() if config.get(flag)]
    chosen = (modes,) if isinstance(modes, str) else tuple(modes or ("mean",))
    if any(mode not in POOLINGS for mode in chosen):
        raise KinvecError(f"{folder / modules[1]['path']}: unknown pooling {chosen}; known are {', '.join(POOLINGS)}")
    return chosen, bool(config.get("include_prompt", True))


def _head_module(folder: Path, module: dict[str, Any]) -> nn.Module | None:
    kind, place = module["type"].rsplit(".", 1)[-1], folder / module["path"]
    if kind == "Normalize":
        return Normalize()
    return _dense(place) if kind == "Dense" else None  # Dropout is for training only


def _dense(place: Path) -> Dense:
    file = place / "config.json"
    config = _read_json(file)
    activation = config.get("activation_function") or "torch.nn.modules.linear.Identity"
    name = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.modules.") or name not in nn.modules.__all__:
        raise KinvecError(f"{file}: activation '{activation}' is not one of torch's own; it is not run")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise KinvecError(f"{file}: a Dense with a residual, or on another input than the embedding, is not supported")
    weights = {key.removeprefix("linear."): value for key, value in _tensors(place).items()}
    try:
        dense = Dense(config["in_features"], config["out_features"], config.get("bias", True), getattr(nn, name)())
        dense.linear.load_state_dict(weights)
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
            return torch.load(old, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise KinvecError(f"{place}: the weights are damaged, cut short or not tensors alone ({reason})") from None
    raise KinvecError(f"{place}: no weights (model.safetensors)")


def _lower_case(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Chain

    backend = tokenizer.backend_tokenizer
    backend.normalizer = Chain([Lowercase(), backend.normalizer]) if backend.normalizer else Lowercase()


def write_folder(embedder: Embedder, folder: Path) -> None:
    """All files of the model folder: weights, tokenizer, modules, prompts, and `kinvec.json` last."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = embedder.backbone.model
    if model.dtype != torch.float32:  # opened in bf16, which has rounded the weights: they are read again
        model = open_folder(embedder.name).backbone.model
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
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": embedder.max_length, "do_lower_case": embedder.lower_case},
    )
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(embedder))
    for (path, _), module in zip(kinds[2:], embedder.head, strict=True):
        (folder / path).mkdir()
        if isinstance(module, Dense):
            _write_dense(folder / path, module)
    _write_json(folder / "modules.json", modules)
    versions = _versions()
    prompts = {"query": "", "document": ""} | embedder.prompts
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": versions,
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": embedder.similarity,
        },
    )
    _write_json(
        folder / "kinvec.json",
        {
            "format": FORMAT,
            "attention": embedder.attention,
            "prompts": embedder.prompts,
            "max_length": embedder.max_length,
            "lineage": embedder.lineage,
        },
    )


def _pooling_config(embedder: Embedder) -> dict[str, Any]:
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
    _write_json(place / "config.json", config)


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise KinvecError(f"{path}: the file is missing from the model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KinvecError(f"{path}: not valid JSON ({error})") from None


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
