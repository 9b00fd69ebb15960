"""Any Hugging Face encoder or decoder: found, opened, put on packed attention where it takes it.

Shapes: T = tokens of a pack, h = hidden width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kinvec.attention import install, packed, recomputing, set_direction
from kinvec.batching import Pack, lay, pack
from kinvec.console import say
from kinvec.contracts import KinvecError
from kinvec.fused import fuse_biases, fuse_output_blocks, fuse_projections
from kinvec.int8 import quantise
from kinvec.machine import multiplies_bf16
from kinvec.published import has_own_code, needs_own_code, open_config, reading, weight_files
from kinvec.vetting import vet_size

POSITIONS_AFTER_PADDING = {  # families whose first position is the padding index + 1 (RoBERTa's convention)
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod", "esm",
    "ibert", "longformer", "mpnet",
}  # fmt: skip


MODEL_FILES = ("modules.json", "config.json", "adapter_config.json")


def find_model(name: str) -> str:
    """A model's folder for a path or `pkg:NAME` (a model inside an installed package), else the hub name as it is.

    A package is located without importing it. Raises `KinvecError` when a package or path does not hold a model.
    """
    if name.startswith("pkg:"):
        return str(_package_model(name.removeprefix("pkg:")))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in MODEL_FILES):
            raise KinvecError(f"{name}: not a model folder (it has neither modules.json nor config.json)")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise KinvecError(f"{name}: there is no such model folder")
    return name


def _package_model(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if not places:
        hint = package.replace("_", "-")
        raise KinvecError(f"pkg:{package}: no such package is installed; try 'pip install {hint}'")
    for place in places:
        for folder in (place, place / "model", *sorted(child for child in place.iterdir() if child.is_dir())):
            if any((folder / file).is_file() for file in ("modules.json", "config.json")):
                return folder
    raise KinvecError(f"pkg:{package}: the package is installed but carries no model (no modules.json or config.json)")


def fetch(name: str) -> Path:
    """The model's folder on this machine; a hub name is downloaded, without any code it may carry."""
    found = find_model(name)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*_Dense/pytorch_model.bin"]
    other = ["onnx/*", "openvino/*"]
    try:
        folder = Path(snapshot_download(found, allow_patterns=patterns, ignore_patterns=other))
        if not any(path for place in (folder, folder / "0_Transformer") for path in place.glob("*.safetensors")):
            snapshot_download(found, allow_patterns=["pytorch_model*.bin", "0_Transformer/*.bin"])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise KinvecError(f"{name}: neither a model folder here nor reachable on the hub ({reason})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, tables and warnings: what matters of them is checked and said here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():  # torch of a file that is none of its own: refused below
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            yield
    finally:
        logging.set_verbosity(before)


def load_backbone(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Open the transformer of a folder with the given weight type; never runs code from the folder.

    Weights are safetensors, or torch's older files, read as tensors alone. Raises `KinvecError` when they are missing,
    incomplete or damaged, or the architecture is unknown.
    """
    from transformers import AutoModel, T5EncoderModel

    weights = weight_files(folder)
    try:
        config = open_config(folder)
        kind = T5EncoderModel if config.model_type in ("t5", "mt5") else AutoModel
        with quiet():
            vet_size(kind, config, weights)
        options = {"config": config, "dtype": dtype, "trust_remote_code": False}
        with quiet():
            model, info = kind.from_pretrained(folder, output_loading_info=True, **options, **reading(weights))
    except KinvecError:
        raise
    except (UnpicklingError, EOFError):
        raise KinvecError(
            f"{weights[0]}: damaged, or more than tensors, and not read; save the model as safetensors"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise KinvecError(f"{folder}: cannot open the model: {str(error).splitlines()[0]}") from None
    except Exception as error:  # safetensors' own error type is no ValueError
        if type(error).__name__ != "SafetensorError":
            raise
        raise KinvecError(f"{weights[0]}: the weights are damaged or cut short ({error})") from None
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing and has_own_code(folder):
        raise KinvecError(needs_own_code(folder))
    if missing:
        raise KinvecError(f"{folder}: the weights lack {len(missing)} tensors, {missing[0]} among them")
    if has_own_code(folder):
        say(
            f"{folder}: the code that came with this model is not run; it is opened as transformers' "
            f"{config.model_type}, so compare a few vectors with the authors' before you rely on it"
        )
    model.config.use_cache = False
    return model


class _Hidden:
    """What the inner model of a language model returns, with hidden states and nothing else in it."""

    def __init__(self, states: Float[Tensor, "1 m h"]) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class LanguageHead(nn.Module):
    """What turns a transformer's hidden states into predictions of tokens, with the weights it was pre-trained with."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, hidden: Float[Tensor, "m h"]) -> Float[Tensor, "m V"]:
        """Logits. The model computes them itself (scales, caps, transforms), from our hidden states for its own."""
        from transformers import PreTrainedModel

        given = _Hidden(hidden[None])
        base: Any = self.whole.base_model
        inner = [base, *(part for part in base.children() if isinstance(part, PreTrainedModel))]  # OPT asks its decoder
        try:
            for part in inner:
                part.forward = lambda *_, **__: given
            place = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.whole(input_ids=place, use_cache=False).logits[0]
        finally:
            for part in inner:
                del part.forward


def language_head(folder: Path, model: nn.Module) -> LanguageHead:
    """The prediction head of a folder's language model on top of `model`, its transformer already opened.

    Embeddings are shared with the head where the model ties them. A folder without a head's weights gives a new one,
    and says so. Raises `KinvecError` for an architecture that has no language model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    config: Any = model.config
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if not masked and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise KinvecError(f"{folder}: {config.model_type} has no language model to train; use a contrastive objective")
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with quiet():
        options = {"config": open_config(folder), "dtype": torch.float32, "output_loading_info": True}
        whole, info = kind.from_pretrained(folder, **options, **reading(weight_files(folder)))
    if new := [key for key in info["missing_keys"] if "pooler" not in key]:
        say(f"{folder}: there is no trained prediction head here; {len(new)} tensors of it begin anew ({new[0]}, …)")
    setattr(whole, whole.base_model_prefix, model)
    whole.config = config  # the attention's direction is kept in it
    whole.tie_weights()
    return LanguageHead(whole.to(next(model.parameters()).device).train(model.training))


class Backbone(nn.Module):
    """A transformer and the way texts go through it: packed where its code allows, padded otherwise."""

    def __init__(self, model: nn.Module, pad_token: int = 0) -> None:
        super().__init__()
        self.model = model
        self.pad_token = pad_token
        config: Any = model.config
        self.width = int(getattr(config.get_text_config(), "hidden_size", 0) or config.d_model)
        offset = config.model_type in POSITIONS_AFTER_PADDING
        self.first_position = int(config.pad_token_id) + 1 if offset and config.pad_token_id is not None else 0
        self.native = str(config._attn_implementation)
        fuse_biases(model)
        fuse_output_blocks(model)
        self._choose_way()

    def _choose_way(self) -> None:
        """Packed where that gives the same as padded, else padded."""
        self.packs = install(self.model) and self._agrees()
        if not self.packs:
            self.model.set_attn_implementation(self.native)  # type: ignore[operator]

    def forward(self, texts: Pack) -> Float[Tensor, "T h"]:
        """The last hidden states of all tokens of the pack."""
        if not self.packs:
            return self._padded(texts)
        fillers = _fillers(len(texts.input_ids)) if self.model.training else 0
        texts = texts.with_fillers(fillers)
        extra = {"token_type_ids": torch.zeros_like(texts.input_ids)[None]} if self._has_types() else {}
        with packed(texts):
            out = self.model(
                input_ids=texts.input_ids[None], position_ids=(texts.positions + self.first_position)[None], **extra
            )
        return out.last_hidden_state[0, fillers:]

    def _padded(self, texts: Pack) -> Float[Tensor, "T h"]:
        ids, mask = texts.padded(self.pad_token)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden[mask.bool()]

    def _has_types(self) -> bool:
        return bool(getattr(self.model.config, "type_vocab_size", 0))

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether this very model gives the same hidden states packed as padded through its own attention.

        Some architectures accept a custom attention and then ignore part of it (sinks, position biases); only a run
        of both ways tells. Costs two forward passes over 12 tokens.
        """
        self.packs = True
        vocabulary = int(self.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        texts = [[(7 * length + place) % (vocabulary - 5) + 5 for place in range(length)] for length in (3, 4, 5)]
        try:
            packed_states, padded_states = self._probe(texts), self._probe(texts, native=True)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return False
        tolerance = 1e-4 if next(self.model.parameters()).dtype == torch.float32 else 5e-2
        return bool((packed_states - padded_states).abs().max() <= tolerance * padded_states.abs().max())

    @torch.no_grad()
    def _probe(self, texts: list[list[int]], native: bool = False) -> Float[Tensor, "T h"]:
        """Hidden states without dropout, as texts go through the model, or padded through its own attention."""
        training, model = self.model.training, self.model
        probe = pack(lay(texts), range(len(texts))).to(next(model.parameters()).device)
        model.eval()
        try:
            if not native:
                return self(probe).float()
            model.set_attn_implementation(self.native)  # type: ignore[operator]
            return self._padded(probe).float()
        finally:
            if native and self.packs:
                install(model)
            model.train(training)

    def sees_ahead(self, native: bool = False, padded: bool = False) -> bool:
        """Whether the first token of a text of four knows its last: measured, whatever the configuration says."""
        texts = [[5, 6, 7, 8], [5, 6, 7, 9], *([[5, 6, 7, 8, 9, 8, 7]] if padded else [])]
        states = self._probe(texts, native)
        return bool((states[0] - states[4]).abs().max() > 1e-6 * states[0].abs().max())

    def set_attention(self, attention: str) -> None:
        """Make the model `causal` or `bidirectional`; what it is already stays as it was published.

        Raises `KinvecError` for an architecture that cannot, after the switch was thrown and looked at: a text's first
        token must see its last, packed, unpadded and padded, or must not.
        """
        wanted, kind = attention == "bidirectional", self.model.config.model_type  # type: ignore[union-attr]
        ways: tuple[dict[str, bool], ...] = ({}, {"native": True}, {"native": True, "padded": True})
        if all(self.sees_ahead(**way) == wanted for way in ways):
            return
        set_direction(self.model, causal=not wanted)
        self._choose_way()
        if not all(self.sees_ahead(**way) == wanted for way in ways):
            raise KinvecError(f"{kind}: this architecture does not become {attention}; leave `attention` as it is")


def _fillers(tokens: int) -> int:
    """Tokens that lack a round number, by at most a 32nd: steps of the same size use the same memory again.

    Were every step as large as its texts are long, nothing would fit where the last step's tensors have been: the
    process would grow, and pay for fresh pages (docs/experiments.md).
    """
    return -tokens % (1 << max(tokens.bit_length() - 6, 0))


def fuse(backbone: Backbone) -> None:
    """Join the query, key and value products of plain layers; call it after adapters are on."""
    if backbone.packs:
        fuse_projections(backbone.model)


@torch.no_grad()
def to_bf16(backbone: Backbone) -> None:
    """Round the weights, but no buffers: the angles of rotary positions would be off by radians far into a text."""
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def to_int8(backbone: Backbone) -> None:
    """Put the linear layers into int8, for encoding alone, and the rest into bf16 where the processor multiplies it.

    Raises `KinvecError` for an architecture that reads its layers' weights itself, or has no linear layers.
    """
    model, kind = backbone.model, backbone.model.config.model_type  # type: ignore[union-attr]
    quantise(model)
    if multiplies_bf16(torch.device("cpu")):
        to_bf16(backbone)
    try:
        finite = bool(backbone._probe([[5, 6, 7, 8]]).isfinite().all())
    except (TypeError, AttributeError, RuntimeError) as error:
        raise KinvecError(f"{kind}: cannot be encoded with in int8 ({str(error).splitlines()[0]}); use bf16") from None
    if not finite:
        raise KinvecError(f"{kind}: gives NaN or infinity in int8; use bf16")


def layers(backbone: Backbone) -> list[nn.Module]:
    """The transformer's layers, as far as transformers has marked them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(backbone: Backbone) -> None:
    """Gradient checkpointing (Chen et al. 2016): in training a layer keeps its input alone, and runs once more later.

    The second run draws the same dropout masks; loss and gradients are those without, to the bit. Raises `KinvecError`
    for an architecture whose layers transformers has not marked for it.
    """
    found: list[Any] = list(layers(backbone))
    if not found:
        kind = backbone.model.config.model_type  # type: ignore[union-attr]
        raise KinvecError(f"{kind}: its layers cannot be recomputed; leave trainer.gradient_checkpointing off")
    for layer in found:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=recomputing)


ATTENTION_DROPOUT = re.compile(r"(self|attention)\.dropout$|attn_dropout$|attention_dropout$")


def set_dropout(model: nn.Module, rate: float, on: str = "all") -> None:
    """Set the model's dropout rates: modules, and the attention rates that decoders keep as plain numbers.

    `on` is all, attention (of the attention weights) or hidden (of all else). The dropout of adapters is theirs
    (`lora.dropout`) and stays.
    """
    for name, module in model.named_modules():
        kind = "attention" if ATTENTION_DROPOUT.search(name) else "hidden"
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name and on in ("all", kind):
            module.p = rate
        if isinstance(getattr(module, "attention_dropout", None), float) and on != "hidden":
            module.attention_dropout = rate


def has_dropout(model: nn.Module) -> bool:
    """Whether two forward passes of the model in training differ."""
    modules = list(model.modules())
    rates: list[Any] = [getattr(module, "attention_dropout", 0.0) for module in modules]
    rates += [module.p for module in modules if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0.0 for rate in rates)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises `KinvecError` for a device that is not here."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # of several processes each has its own
    if device == "auto":
        return torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise KinvecError(f"device '{device}' is not available: {str(error).splitlines()[0]}") from None
    return torch.device(device)


PRECISIONS = ("auto", "fp32", "bf16", "int8")


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it (CUDA; AMX or AVX512-BF16 on a CPU), else fp32; never int8."""
    if precision not in PRECISIONS:
        raise KinvecError(f"precision '{precision}' is unknown; use one of {', '.join(PRECISIONS)}")
    if precision == "int8" and device.type != "cpu":
        raise KinvecError(f"precision int8 is for encoding on a CPU; on {device.type} use bf16, or add --device cpu")
    if precision == "int8" and not torch.backends.mkldnn.is_available():
        raise KinvecError("precision int8 needs oneDNN, which this torch is built without; use bf16 or fp32")
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def trainable(module: nn.Module) -> Sequence[tuple[str, nn.Parameter]]:
    """The named parameters that training changes."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
