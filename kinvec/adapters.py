"""Low-rank adapters on a frozen base: put on, merged, taken from a folder; the base in fewer bits while they train."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import field_validator
from torch import Tensor, nn

from kinvec.backbone import Backbone
from kinvec.config import Settings
from kinvec.contracts import KinvecError

BLOCK = 64  # weights that share a scale in nf4, as in the paper


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021) through PEFT. Off unless `rank` is above 0."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] | str = "all-linear"
    """Names of the linear layers that carry an adapter, or `all-linear`."""
    base: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    """How the frozen weights lie in memory while adapters train: bf16 takes half, int8 a quarter, nf4 (QLoRA) an eighth
    (int8 and nf4: install the extra `qlora`). What is saved is not rounded."""

    @field_validator("base")
    @classmethod
    def _is_frozen(cls, value: str, given: Any) -> str:
        if value != "fp32" and not given.data.get("rank"):
            raise ValueError(
                f"only a frozen model is held in {value}, and without adapters all of it is trained; set lora.rank"
            )
        return value

    @property
    def few_bits(self) -> bool:
        """Whether the frozen weights are codes (`FewBits`) instead of numbers."""
        return self.base in ("int8", "nf4")


def add_lora(backbone: Backbone, settings: LoraSettings) -> None:
    """Put adapters on and freeze the rest. Raises `KinvecError` when a target names no layer of the model."""
    try:
        with _peft() as peft:
            config = peft.LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
                target_modules=settings.targets, bias="none", task_type="FEATURE_EXTRACTION",
            )  # fmt: skip
            backbone.model = peft.get_peft_model(backbone.model, config)
    except ValueError as error:
        raise KinvecError(f"lora.targets: {str(error).splitlines()[0]}") from None


def load_lora(backbone: Backbone, adapter: Path) -> None:
    """Put the adapters of a PEFT folder on. Raises `KinvecError` where they do not fit or are not safetensors."""
    if not (adapter / "adapter_model.safetensors").is_file():
        raise KinvecError(f"{adapter}: there are no adapter weights (adapter_model.safetensors)")
    try:
        with _peft() as peft:
            backbone.model = peft.PeftModel.from_pretrained(backbone.model, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        raise KinvecError(f"{adapter}: the adapter does not fit its base: {str(error).splitlines()[0]}") from None


@contextmanager
def _peft() -> Iterator[Any]:
    """PEFT, imported after bitsandbytes, which it would import its own way; without a warning of its own making."""
    bitsandbytes()
    import peft

    with warnings.catch_warnings():  # it asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield peft


def merge_lora(backbone: Backbone) -> None:
    """Fold the adapters, if there are any, into the weights."""
    if not hasattr(backbone.model, "merge_and_unload"):
        return
    backbone.model = backbone.model.merge_and_unload()  # type: ignore[operator]


def round_weights(backbone: Backbone) -> None:
    """Freeze the model and hold in bf16 what its linear layers multiply by; adapters are left as they are.

    Embeddings, norms and biases stay in float32, and so do the sums between the layers. Under autocast, which rounds
    the same weights at every product, not a bit of the result changes.
    """
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for layer in frozen_layers(backbone).values():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)


def frozen_layers(backbone: Backbone) -> dict[str, nn.Linear | FewBits]:
    """The linear layers that are not trained, by name, but for those that share the weights of a table."""
    tables = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in backbone.model.named_modules()
        if isinstance(module, FewBits)
        or (isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in tables)
    }


def shortened(layer: nn.Linear | FewBits) -> bool:
    """Whether the layer's weights lie in fewer bits than in the model's folder."""
    return isinstance(layer, FewBits) or layer.weight.dtype != torch.float32


def shorten(backbone: Backbone, base: str, device: torch.device) -> None:
    """Hold the frozen linear layers in few bits, on `device`. Raises `KinvecError` where bitsandbytes is not there."""
    if bitsandbytes() is None:
        raise KinvecError(f"lora.base={base} needs bitsandbytes, which is not installed; pip install 'kinvec[qlora]'")
    for name, layer in frozen_layers(backbone).items():
        if isinstance(layer, nn.Linear):
            backbone.model.set_submodule(name, FewBits(layer.to(device), base))


class FewBits(nn.Module):
    """A frozen linear layer whose weights lie in 8 bits or 4, and are opened for each product and closed after it.

    `base` is int8, with a scale for each output (Dettmers et al. 2022, without their rounding of inputs); or nf4, the
    quantiles of a normal distribution with a scale for each `BLOCK` weights (QLoRA, Dettmers et al. 2023, section 3).
    The products are those of the rest of the model, in fp32 or bf16.
    """

    def __init__(self, layer: nn.Linear, base: str) -> None:
        super().__init__()
        library, weight = bitsandbytes(), layer.weight.data
        self.base, self.shape = base, weight.shape
        self.bias: Tensor | None = layer.bias
        if base == "int8":
            codes, scales, _ = library.int8_vectorwise_quant(weight.half())
        else:
            codes, state = library.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
            scales = state.absmax
        self.codes: Tensor = nn.Buffer(codes)
        self.scales: Tensor = nn.Buffer(scales)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)

    def opened(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """The weights, as near as their codes tell them."""
        if self.base == "int8":
            return (self.codes * (self.scales / 127)[:, None]).to(dtype)
        return torch.ops.bitsandbytes.dequantize_4bit(self.codes, self.scales, BLOCK, "nf4", self.shape, dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ. Its graph keeps the codes alone: the weights are opened again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FewBits) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.opened(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.opened(gradient.dtype), None


@cache
def bitsandbytes() -> Any:
    """The library's functions; None where it is not installed.

    Imported here before PEFT does it: where it finds the package `kernels`, it takes compiled code from the hub, which
    nobody has asked for.
    """
    before, sys.modules["kernels"] = sys.modules.get("kernels"), None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it would regret it on every machine
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        return None
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before
