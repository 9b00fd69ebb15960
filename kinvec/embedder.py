"""A model folder opened: backbone → pooling → (dense) → normalise. Encode with it, train it, save it.

What the folder's files say is in `folder.py`.
Shapes: n = texts, d = embedding dimensions, T = tokens of a pack.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Float32
from torch import Tensor, nn

from kinvec import distributed
from kinvec.adapters import FewBits, frozen_layers, load_lora, merge_lora, round_weights, shortened
from kinvec.backbone import (
    Backbone,
    LanguageHead,
    fetch,
    fuse,
    language_head,
    load_backbone,
    quiet,
    resolve_device,
    resolve_precision,
    to_bf16,
    to_int8,
)
from kinvec.batching import Pack, Tokens, append_end, ends_texts, join, packs, shares, tokenize
from kinvec.console import progress as progress_bar
from kinvec.contracts import KinvecError, one_sentence
from kinvec.files import replace_folder, saying_full
from kinvec.files.reading import read_json, read_object
from kinvec.folder import OURS, head_module, optional_json, read_settings, refuse_damaged, said, write_folder
from kinvec.machine import ahead, keep_pages, set_threads
from kinvec.pooling import POOLINGS, Dense, Normalize, pool
from kinvec.vetting import inside, vet_folder, vet_tokenizer

WINDOW = 8192  # texts sorted by length at a time: enough to fill packs with equal lengths, little enough to hold
ENCODE_TOKENS = 8192  # tokens a pack when encoding: past the point where larger products are faster on CPUs


E = TypeVar("E")  # an encoder with prompts


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
        self.append_eos: bool = settings["append_eos"]
        self.precision = "fp32"
        self.language: LanguageHead | None = None
        self.loaded: Loaded | None = None  # how other processes open it, to help encoding

    @classmethod
    def load(
        cls, name_or_folder: str | Path, *, precision: str = "auto", device: str = "auto", max_length: int | None = None
    ) -> Embedder:
        """Open a sentence-transformers folder, a plain Hugging Face folder, a hub name or `pkg:NAME`, ready to encode.

        `precision` is fp32, bf16, auto (bf16 where the hardware multiplies it), or int8, which only encodes. Raises
        `KinvecError` with the folder and the remedy when something is missing, damaged or not supported.
        """
        place = resolve_device(device)
        embedder = open_folder(name_or_folder, max_length)
        embedder.precision = resolve_precision(precision, place)
        if embedder.precision == "bf16":
            to_bf16(embedder.backbone)
        if embedder.precision == "int8":
            to_int8(embedder.backbone)
        else:
            fuse(embedder.backbone)
        embedder.loaded = (str(name_or_folder), embedder.precision, device, max_length)
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
        """`causal` where a token sees only what precedes it, else `bidirectional`: measured."""
        return "bidirectional" if self.backbone.sees_ahead() else "causal"

    @property
    def fingerprint(self) -> str:
        """A hash of the weights and of all that changes vectors: pooling, prompts, maximum length, precision."""
        said = [self.pooling, self.include_prompt, self.prompts, self.max_length, self.lower_case, self.precision]
        return state_fingerprint(self, [*said, [type(module).__name__ for module in self.head]])

    def forward(self, texts: Pack) -> Float[Tensor, "n d"]:
        """Vectors of a pack's texts, in the pack's order, in float32."""
        try:
            hidden = self.backbone(texts)
        except IndexError:  # on a CPU; a GPU stops by itself
            what = "a token, or its place in the text, has no embedding"
            raise KinvecError(f"{self.name}: {what}; are tokenizer and weights of one model?") from None
        lengths = torch.tensor(texts.lengths, device=hidden.device)
        skip = torch.tensor(texts.skip, device=hidden.device) if any(texts.skip) else None
        with torch.autocast(hidden.device.type, enabled=False):
            vectors = pool(hidden, texts.starts, lengths, self.pooling, skip)
            for module in self.head:
                vectors = module(vectors)
        return vectors

    def tokenize(self, texts: Sequence[str], prompt: str | Sequence[str] = "") -> Tokens:
        """Token ids of the texts behind `prompt`, or each behind its own, cut at the model's maximum length.

        Raises `KinvecError` where a text lost the end-of-sequence token that the model's vector is read from.
        """
        tokens = tokenize(self.tokenizer, texts, self.max_length, prompt, not self.include_prompt)
        if self.append_eos and (tokens.last != self.tokenizer.eos_token_id).any():
            raise KinvecError(f"{self.name}: a text lost its end-of-sequence token; was the tokenizer changed?")
        return tokens

    def encode(self, texts: Sequence[str], *, prompt: str = "", progress: bool = True) -> Float[np.ndarray, "n d"]:
        """Vectors of the texts, float32, in their order. `prompt` is put before each."""
        if isinstance(texts, str):
            raise KinvecError("encode takes a list of texts; for one text write encode([text])")
        windows = (list(texts[start : start + WINDOW]) for start in range(0, len(texts), WINDOW))
        out, done = np.empty((len(texts), self.dimension), dtype=np.float32), 0
        with self._bar(len(texts), progress) as advance, closing(self._tokenized(windows, prompt)) as tokenized:
            for tokens in tokenized:
                self._encode_tokens(tokens, out[done : done + len(tokens)], advance)
                done += len(tokens)
        return out

    def encode_each(self, windows: Iterable[Sequence[str]], prompt: str = "") -> Iterator[Float[np.ndarray, "n d"]]:
        """Vectors of one window of texts after another, as `encode` gives them for each.

        Like a long list's, the next window is read and tokenized while the model computes this one.
        """
        with closing(self._tokenized(windows, prompt)) as tokenized:
            for tokens in tokenized:
                out = np.empty((len(tokens), self.dimension), dtype=np.float32)
                with self._bar(len(tokens), True) as advance:
                    self._encode_tokens(tokens, out, advance)
                yield out

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors of queries, with the model's query prompt."""
        return self.encode(texts, prompt=self.prompts.get("query", ""))

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors of documents, with the model's document prompt."""
        return self.encode(texts, prompt=self.prompts.get("document", ""))

    def _tokenized(self, windows: Iterable[Sequence[str]], prompt: str) -> Generator[Tokens, None, None]:
        """The windows' tokens: by all processes where others help, else on a GPU made while it computes."""
        tokenize = partial(self.tokenize, prompt=prompt)
        if distributed.leading and self._held is not None:
            helped = partial(_tokens_of, self._held, prompt)
            for window in windows:
                parts = [window[part] for part in shares(window, distributed.world())]
                yield join(list(distributed.shared(tokenize, parts, helped)))
        else:
            yield from ahead(tokenize, windows, self.device)

    def _encode_tokens(self, tokens: Tokens, out: Float32[np.ndarray, "n d"], advance: Callable[[int], None]) -> None:
        parts = list(packs(tokens, ENCODE_TOKENS))
        helped = partial(_vectors_of, self._held, torch.get_num_threads()) if self._held is not None else None
        with self._encoding():
            for texts, vectors in zip(parts, distributed.shared(self._vectors, parts, helped), strict=True):
                out[list(texts.rows)] = vectors
                advance(len(texts))

    def _vectors(self, texts: Pack) -> Float32[np.ndarray, "m d"]:
        return self(texts.to(self.device)).float().cpu().numpy()

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Without dropout and gradients, in the embedder's precision."""
        training = self.training
        self.eval()
        try:
            with torch.inference_mode(), self._autocast():
                yield
        finally:
            self.train(training)

    @property
    def _held(self) -> Loaded | None:
        """What other processes open to help encoding, where they can."""
        return self.loaded or (HELD if _holds(self) else None)

    @contextmanager
    def _bar(self, texts: int, progress: bool) -> Iterator[Callable[[int], None]]:
        """Advances a bar where there are texts enough for one."""
        with progress_bar("encoding", texts) if progress and texts > 256 else nullcontext() as bar:
            yield bar.advance if bar is not None else lambda n: None

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
        try:
            beside.mkdir(parents=True)
            with saying_full(beside, sum(value.nbytes for value in self.state_dict().values())):
                write_folder(self, self._unrounded(), beside)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        replace_folder(beside, final)

    def _unrounded(self) -> nn.Module:
        """What is saved: the transformer, with its prediction head where it has been trained as a language model.

        In float32: opening in bf16 or int8 has rounded the weights, so they are read again.
        """
        model: Any = self.language.whole if self.language else self.backbone.model
        rounded = self.precision == "int8" or model.dtype != torch.float32
        return open_folder(self.name).backbone.model if rounded else model


Loaded = tuple[str, str, str, int | None]
HELD: Loaded = ("", "", "", None)  # not opened for this, but what all processes hold: the model in training
_opened = lru_cache(maxsize=2)(lambda loaded: _open_again(*loaded))


def _open_again(name: str, precision: str, device: str, max_length: int | None) -> Embedder:
    return Embedder.load(name, precision=precision, device=device, max_length=max_length)


def _holds(embedder: Embedder) -> bool:
    return isinstance(distributed.model, Embedder) and embedder.backbone is distributed.model.backbone


def _model_of(loaded: Loaded) -> Embedder:
    return distributed.model if loaded == HELD else _opened(loaded)


def _tokens_of(loaded: Loaded, prompt: str, texts: Sequence[str]) -> Tokens:
    """Tokens of some texts of a window, for another process."""
    return _model_of(loaded).tokenize(texts, prompt)


def _vectors_of(loaded: Loaded, threads: int, texts: Pack) -> Float32[np.ndarray, "m d"]:
    """A pack's vectors for another process, as it would have computed them itself: threads change last bits."""
    set_threads(threads)
    embedder = _model_of(loaded)
    with embedder._encoding():
        return embedder._vectors(texts)


def open_folder(name_or_folder: str | Path, max_length: int | None = None) -> Embedder:
    """The embedder of a folder in float32, on the CPU, unfused: the state from which training starts.

    Raises `KinvecError` for what is no model, is damaged, or asks for what a folder may not (`vetting`).
    """
    keep_pages()
    folder = fetch(str(name_or_folder))
    vet_folder(folder)
    with one_sentence(f"{folder}: cannot open the model", "is the folder whole, and are its files of one model?"):
        refuse_damaged(folder)
        if (folder / "adapter_config.json").is_file() and not _has_modules(folder):
            return _open_adapter(folder, max_length)
        return _open_model(folder, str(name_or_folder), max_length)


def _open_model(folder: Path, name: str, max_length: int | None) -> Embedder:
    from transformers import AutoTokenizer

    modules = read_json(folder / "modules.json") if _has_modules(folder) else None
    inner = inside(folder, modules[0].get("path") or "") if modules else folder
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(inner, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise KinvecError(f"{inner}: cannot open the tokenizer: {str(error).splitlines()[0]}") from None
    files = list(type(tokenizer).vocab_files_names.values())
    if files and not any((inner / file).is_file() for file in files):  # transformers makes an empty one of nothing
        raise KinvecError(f"{inner}: there is no tokenizer ({' or '.join(files)}) beside the model")
    vet_tokenizer(tokenizer, inner)
    if optional_json(inner / "tokenizer_config.json").get("add_eos_token") and not ends_texts(tokenizer):
        append_end(tokenizer)  # some tokenizers of transformers ignore what the folder says
    model = load_backbone(inner)
    backbone = Backbone(model, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    settings = read_settings(folder, inner, modules, model, tokenizer) | {"name": name}
    if (switched := getattr(model.config, "is_causal", None)) is not None:  # some layers read only their own flag
        backbone.set_attention("causal" if switched else "bidirectional")
    if max_length is not None:
        settings["max_length"] = min(max_length, settings["max_length"])
    if settings["lower_case"]:
        _lower_case(tokenizer)
    head = [head_module(folder, module) for module in (modules or [])[2:]]
    embedder = Embedder(backbone, tokenizer, [module for module in head if module is not None], settings)
    _check_widths(embedder, folder)
    return embedder


def _check_widths(embedder: Embedder, folder: Path) -> None:
    """Raise `KinvecError` where a dense layer takes other vectors than it is given."""
    width = embedder.backbone.width * len(embedder.pooling)
    for module in embedder.head:
        if isinstance(module, Dense):
            if module.linear.in_features != width:
                raise KinvecError(
                    f"{folder}: a dense layer takes {module.linear.in_features} dimensions and gets {width}"
                )
            width = module.linear.out_features


def state_fingerprint(module: nn.Module, said: Sequence[Any]) -> str:
    """A hash of a module's weights, by name, and of what else is said of it."""
    digest = xxhash.xxh3_128()
    for key, value in sorted(module.state_dict().items()):
        flat = value.detach().cpu().contiguous()
        digest.update(key.encode())
        digest.update(flat.view(-1).view(torch.uint8).numpy())
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def with_prompts(encoder: E, prompts: Mapping[str, str]) -> E:
    """The same model with some prompts changed; the weights are shared."""
    changed = object.__new__(type(encoder))  # copy() cannot make one whose weights are spread
    changed.__dict__.update(encoder.__dict__)
    changed.prompts = encoder.prompts | dict(prompts)  # type: ignore[attr-defined]
    return changed


def _has_modules(folder: Path) -> bool:
    return (folder / "modules.json").is_file()


def _open_adapter(folder: Path, max_length: int | None) -> Embedder:
    """A PEFT folder: its base model with the adapters merged in, and what `kinvec.json` beside them says."""
    ours, config = said(folder / "kinvec.json", OURS), read_object(folder / "adapter_config.json")
    base = ours.get("base") or config.get("base_model_name_or_path")
    if not base:
        raise KinvecError(f"{folder / 'adapter_config.json'}: names no base model (base_model_name_or_path)")
    if (inner := fetch(str(base)) / "adapter_config.json").is_file() and not _has_modules(inner.parent):
        raise KinvecError(f"{folder}: its base model {base} is an adapter again; merge that one first")
    embedder = open_folder(str(base), max_length)
    load_lora(embedder.backbone, folder)
    merge_lora(embedder.backbone)
    if ours:
        configure(embedder, ours["attention"], ours["pooling"], ours["append_eos"])
        embedder.prompts, embedder.include_prompt, embedder.lineage = (
            ours[key] for key in ("prompts", "include_prompt", "lineage")
        )
        embedder.max_length = min(embedder.max_length, ours["max_length"])
        if ours["normalize"] and not any(isinstance(module, Normalize) for module in embedder.head):
            embedder.head.append(Normalize())
    embedder.name = str(folder)
    return embedder


@contextmanager
def unrounded(embedder: Embedder) -> Iterator[None]:
    """Inside, weights held in fewer bits are those of the model's folder again, in float32 and on the CPU.

    Adapters are put on and merged so: they start as on a float32 model, and merging into bf16 would lose a fiftieth of
    the change. Does nothing for a model that is not rounded.
    """
    backbone, device = embedder.backbone, embedder.device
    held = {name: one for name, one in frozen_layers(backbone).items() if shortened(one)}
    if not held:
        yield
        return
    embedder.cpu()
    whole = open_folder(embedder.name).backbone.model
    for name, layer in held.items():
        read = whole.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer"))  # PEFT's names
        if isinstance(layer, FewBits):
            backbone.model.set_submodule(name, read.requires_grad_(False))
        else:
            layer.weight.data = read.weight.data  # type: ignore[assignment]
    yield
    if embedder.precision == "bf16":
        round_weights(backbone)
    embedder.to(device)


def add_language_head(embedder: Embedder) -> LanguageHead:
    """Let the model predict tokens, with the head of the folder it was opened from; adapters go on afterwards."""
    folder = fetch(embedder.name)
    inner = inside(folder, read_json(folder / "modules.json")[0].get("path") or "") if _has_modules(folder) else folder
    embedder.language = language_head(inner, embedder.backbone.model)
    return embedder.language


def configure(
    embedder: Embedder,
    attention: str | None = None,
    pooling: Sequence[str] | None = None,
    append_eos: bool | None = None,
) -> None:
    """Change what a model is before it is trained; None leaves it.

    A decoder made bidirectional is pooled by the mean unless another pooling is named, and one whose last token is
    pooled ends its texts with the end-of-sequence token. Raises `KinvecError` for what the model cannot be.
    """
    if attention is not None:
        embedder.backbone.set_attention(attention)
        if attention == "bidirectional" and embedder.pooling == ("lasttoken",) and pooling is None:
            pooling = ("mean",)
    if pooling is not None:
        if unknown := [mode for mode in pooling if mode not in POOLINGS]:
            raise KinvecError(f"pooling '{unknown[0]}' is unknown; known are {', '.join(POOLINGS)}")
        if len(pooling) != len(embedder.pooling) and any(isinstance(module, Dense) for module in embedder.head):
            raise KinvecError(f"{embedder.name}: its dense layer takes {len(embedder.pooling)} poolings; keep as many")
        embedder.pooling = tuple(pooling)
    if append_eos or (append_eos is None and pooling is not None and "lasttoken" in pooling):
        append_end(embedder.tokenizer)
        embedder.append_eos = True


def _lower_case(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Chain

    backend = tokenizer.backend_tokenizer
    backend.normalizer = Chain([Lowercase(), backend.normalizer]) if backend.normalizer else Lowercase()
