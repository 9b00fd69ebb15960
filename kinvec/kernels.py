"""Attention in bfloat16, and what lies between a model's products in one pass over memory; on CPUs.

They are the C files of `csrc`, compiled at first use for this very processor and kept in the cache. On a GPU, for
float64, and where there is no C compiler (`library()` is None), torch's operations do the same in several passes; on a
CPU a training step then takes up to a third longer (docs/experiments.md).

Shapes: r = rows (texts × heads × queries of a run), L = keys of a row.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ctypes import c_float, c_int, c_long, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from threadpoolctl import threadpool_info
from torch import Tensor

from kinvec.console import say
from kinvec.files import cache_folder
from kinvec.files.writing import replacing

SOURCES = sorted(Path(__file__).with_name("csrc").glob("*.[ch]"))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11", "-fno-strict-aliasing")
LANES = 16  # numbers of a vector in `csrc`
SECONDS = 60  # a compiler that takes longer is given up
ROWS, CHANCE = (c_long, c_long, c_int), (c_uint32, c_float, c_uint64)  # rows, width, half; `draw`
ARGUMENTS = {
    "softmax": (*3 * [c_void_p], c_float, *ROWS, *CHANCE),
    "softmax_backward": (*3 * [c_void_p], c_float, *ROWS, c_float),
    "dropout": (*2 * [c_void_p], *ROWS, *CHANCE),
    "round_rows": (*4 * [c_void_p], *ROWS, c_int, c_int, c_float),
    "scale_rows": (*3 * [c_void_p], *ROWS),
    "attention": (*7 * [c_void_p],),
    "attention_backward": (*11 * [c_void_p],),
    "add_norm": (*7 * [c_void_p], *ROWS, c_int, c_int, c_float, *CHANCE),
    "add_norm_backward": (*8 * [c_void_p], c_int, *ROWS, c_int, c_int, *CHANCE),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled C files of `csrc`; None where it cannot be compiled. `CC` names a compiler other than `cc`."""
    compiler, openmp = shutil.which(os.environ.get("CC") or "cc"), _openmp()
    if compiler is None:
        why = "no C compiler was found (gcc or clang; CC may name it)"
    elif openmp is None:
        why = "this torch uses no OpenMP library"
    elif found := _kept_or_made(compiler, openmp):
        return found
    else:
        why = f"{compiler} cannot compile kinvec/csrc here"
    say(f"{why}: on a CPU, training takes up to a third longer without")
    return None


def _kept_or_made(compiler: str, openmp: str) -> ctypes.CDLL | None:
    kept = cache_folder("kernels") / f"{_fingerprint(compiler, openmp)}.so"
    with suppress(OSError):
        if kept.stat().st_uid == os.getuid() and not kept.stat().st_mode & 0o022:
            return _declared(kept)
    with tempfile.TemporaryDirectory() as folder, suppress(OSError, subprocess.SubprocessError):
        made = _declared(_compile(compiler, openmp, Path(folder)))
        with suppress(OSError):  # a cache that cannot be written to costs half a second the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept, "wb") as file:
                os.fchmod(file.fileno(), 0o600)  # whoever could write to it could have us run anything
                file.write(Path(made._name).read_bytes())
        return made
    return None


def _openmp() -> str | None:
    """The OpenMP library that torch uses; other packages may have loaded theirs before it."""
    loaded = [pool["filepath"] for pool in threadpool_info() if pool["internal_api"] == "openmp"]
    own = str(Path(torch.__file__).parent)
    return min(loaded, key=lambda path: not path.startswith(own), default=None)


def _fingerprint(compiler: str, openmp: str) -> str:
    """Of all that the compiled file depends on; a cache may be shared by machines of different processors."""
    processor = platform.processor() + platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    parts = (*(source.read_text() for source in SOURCES), *FLAGS, compiler, openmp, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(compiler: str, openmp: str, folder: Path) -> Path:
    """In two steps, so that it is linked with the OpenMP that torch uses: a second one would fight for the cores."""
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    parts, whole = [Path(source).with_suffix(".o").name for source in sources], folder / "kernels.so"
    for command in ([*FLAGS, "-c", *sources], ["-shared", *parts, openmp, "-lm", "-o", str(whole)]):
        subprocess.run([compiler, *command], check=True, capture_output=True, timeout=SECONDS, cwd=folder)
    return whole


def _declared(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = None
    return found


def compiled_for(x: Tensor) -> bool:
    """Whether the compiled functions are there and can take x."""
    fits = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous()
    return fits and x.numel() > 0 and library() is not None


def _in_c() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask `compiled_for` first"
    return found


def _layout(x: Tensor) -> tuple[int, int, bool]:
    """Rows, their width, and whether they hold bfloat16."""
    return x.numel() // x.shape[-1], x.shape[-1], x.dtype == torch.bfloat16


def draw(dropout: float) -> tuple[int, float, int]:
    """Below which 32-bit word a number is dropped, what the others are multiplied by, and a seed from torch."""
    seed = int(torch.randint(2**63 - 1, ())) if dropout else 0
    return round(dropout * 2**32), rescale(dropout), seed


def rescale(dropout: float) -> float:
    """What dropout multiplies the numbers by that it keeps: their expectation stays."""
    return 1.0 / (1.0 - dropout)


def softmax(
    scores: Float[Tensor, "*r L"], bias: Float[Tensor, "L L"] | None, scale: float, dropout: float
) -> tuple[Float[Tensor, "*r L"], Float[Tensor, "*r L"]]:
    """Probabilities from scores, which are overwritten: what the backward pass needs, and what multiplies the values.

    Both are softmax(scale · scores + bias). With dropout the first has a minus sign where a probability is dropped (no
    mask has to be kept); the second has 0 there, and all else is divided by 1 − dropout.
    """
    if compiled_for(scores):
        seen = torch.empty_like(scores) if dropout else scores
        added = None if bias is None else bias.data_ptr()
        place = seen.data_ptr() if dropout else None
        _in_c().softmax(scores.data_ptr(), place, added, scale, *_layout(scores), *draw(dropout))
        return scores, seen
    scores = scores.mul_(scale) if bias is None else scores.mul_(scale).add_(bias)
    probs = torch.softmax(scores, -1)
    if not dropout:
        return probs, probs
    seen = masked(probs, keep_mask(probs.shape, dropout, probs.device))
    return probs.neg_().add_(seen, alpha=2), seen.mul_(rescale(dropout))  # 2p − p, or 0 − p: both exact


def softmax_backward(
    probs: Float[Tensor, "*r L"], grad: Float[Tensor, "*r L"], scale: float, dropout: float
) -> tuple[Float[Tensor, "*r L"], Float[Tensor, "*r L"]]:
    """The gradient for the scores, and `softmax`'s second result once more.

    From its first result and the gradient for its second, which may be overwritten.
    """
    if compiled_for(grad):
        seen = torch.empty_like(probs) if dropout else probs
        place = seen.data_ptr() if dropout else None
        _in_c().softmax_backward(probs.data_ptr(), grad.data_ptr(), place, scale, *_layout(grad), rescale(dropout))
        return grad, seen
    if not dropout:
        return torch._softmax_backward_data(grad, probs, -1, probs.dtype).mul_(scale), probs
    grad = torch.ops.aten.threshold_backward(grad, probs, 0)  # 0 where one was dropped
    dscores = torch._softmax_backward_data(grad, probs.abs(), -1, probs.dtype)
    return dscores.mul_(scale * rescale(dropout)), probs.relu().mul_(rescale(dropout))


def dropped(x: Float[Tensor, "*r n"], chance: tuple[int, float, int]) -> Float[Tensor, "*r n"]:
    """Dropout by `draw`'s chance, which drops the same places again; only where `compiled_for(x)`."""
    out = torch.empty_like(x)
    _in_c().dropout(x.data_ptr(), out.data_ptr(), *_layout(x), *chance)
    return out


def rounded(
    x: Float[Tensor, "r n"], signs: Float[Tensor, " group"], most: int, tiny: float
) -> tuple[UInt8[Tensor, "r p"], Float[Tensor, "r 1"]]:
    """`int8.round_tokens`, to codes of −most to most around most + 1; only where `compiled_for(x)`."""
    rows, width, half = _layout(x)
    codes, scales = torch.empty(rows, width + -width % LANES, dtype=torch.uint8), torch.empty(rows, 1)
    places = [tensor.data_ptr() for tensor in (x, signs, codes, scales)]
    _in_c().round_rows(*places, rows, width, half, len(signs) // LANES, most, tiny)
    return codes, scales


def scaled(x: Float[Tensor, "r n"], scales: Float[Tensor, "r 1"], bias: Float[Tensor, " n"]) -> None:
    """Each row of x times its scale, plus bias, in place; only where `compiled_for(x)`."""
    _in_c().scale_rows(x.data_ptr(), scales.data_ptr(), bias.data_ptr(), *_layout(x))


def keep_mask(shape: torch.Size, dropout: float, device: torch.device) -> Int[Tensor, "..."]:
    """A random mask of 16-bit words, all ones with probability 1 − dropout to within 2⁻¹⁶ and else zero.

    Four words come from each 64-bit draw and are turned into the mask where they lie: clamped to a threshold and the
    number below it. Multiplying by a Boolean mask would first convert it (docs/experiments.md). The generator of the
    device is advanced as any other draw advances it, so a saved random state replays the mask.
    """
    count = shape.numel()
    threshold = round((1.0 - dropout) * 2**16) - 2**15
    if threshold == 2**15:  # a dropout below half of 2⁻¹⁶
        return torch.full(shape, -1, dtype=torch.int16, device=device)
    words = _draws((count + 3) // 4, device).view(torch.int16)[:count]
    return words.clamp_(threshold - 1, threshold).sub_(threshold).view(shape)


def _draws(count: int, device: torch.device) -> Int[Tensor, " count"]:
    """Random 64-bit integers. torch draws them on a CPU with one slow generator; it only seeds a faster one here."""
    if device.type != "cpu":
        return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None)
    seed = torch.randint(2**63 - 1, ())
    return torch.from_numpy(np.random.SFC64(int(seed)).random_raw(count).view(np.int64))


WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number → the integers that hold its bits


def masked(x: Float[Tensor, "..."], keep: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The numbers of x where `keep` is all ones, +0 where it is zero, by the bits of both."""
    word = WORDS[x.element_size()]
    return torch.bitwise_and(x.view(word), keep.to(word)).view(x.dtype)


LONGEST = 2048  # tokens whose scores fit into the cache, for eight queries
HELD = 2**17  # numbers of keys and values that do, and that fit on the stack of a thread


def attends(q: Float[Tensor, "T H D"], v: Float[Tensor, "T K V"], longest: int) -> bool:
    """Whether `Attention` is there for the processor and can take these heads, in texts of up to `longest` tokens."""
    width, values = q.shape[-1], v.shape[-1]
    fits = longest <= LONGEST and longest * (width + values) <= HELD and width % 2 == values % 2 == 0
    here = q.device.type == "cpu" and q.dtype == torch.bfloat16 and library() is not None
    return fits and here and bool(_in_c().multiplies())


class Run(ctypes.Structure):
    """A run of a pack (`Pack.runs`), how its heads lie, and `draw`: `Run` of attention.c."""

    _fields_ = [
        *((name, c_long) for name in ("first", "texts", "length", "heads", "groups", "width", "values")),
        *((f"{name}_{step}", c_long) for name in "qkv" for step in ("token", "head")),
        ("scale", c_float), ("rescale", c_float), ("drop", c_uint32), ("seed", c_uint64),
    ]  # fmt: skip


def _runs(q: Tensor, k: Tensor, v: Tensor, how: Any) -> Iterator[tuple[int | None, Any]]:
    """For each run where its bias lies, and the run itself."""
    (_, heads, width), (_, others, values) = q.shape, v.shape
    steps = [step for x in (q, k, v) for step in x.stride()[:2]]
    runs, biases, scale, (drop, factor, seed) = how
    for place, bias in zip(runs, biases, strict=True):
        run = Run(*place, heads, heads // others, width, values, *steps, scale, factor, drop, seed)
        yield None if bias is None else bias.data_ptr(), ctypes.byref(run)


class Attention(torch.autograd.Function):
    """Attention within the texts of a pack where it `attends`; after FlashAttention (Dao et al. 2022).

    For the backward pass it keeps, instead of probabilities, the logarithm of each row's sum of exponentials.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd hands its arguments over one by one
        ctx: Any,
        q: Float[Tensor, "T H D"],
        k: Float[Tensor, "T K D"],
        v: Float[Tensor, "T K V"],
        runs: Sequence[tuple[int, int, int]],
        biases: Sequence[Tensor | None],
        scale: float,
        dropout: float,
    ) -> Float[Tensor, "T H V"]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, sums = q.new_empty(*q.shape[:2], v.shape[-1]), None
        if any(ctx.needs_input_grad):
            sums = torch.empty(q.shape[:2])
        ctx.how = (runs, biases, scale, draw(dropout))
        places = [None if x is None else x.data_ptr() for x in (q, k, v, out, sums)]
        for bias, run in _runs(q, k, v, ctx.how):
            _in_c().attention(*places, bias, run)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "T H V"]) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        runs, biases, scale, chance = ctx.how
        turned = [bias if bias is None else bias.t().contiguous() for bias in biases]
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        given = (q, k, v, out, sums, grad.contiguous(), *grads)
        places = [x.data_ptr() for x in given]
        for bias, run in _runs(q, k, v, (runs, turned, scale, chance)):
            _in_c().attention_backward(*places, bias, run)
        return *grads, None, None, None, None


class AddNorm(torch.autograd.Function):
    """LayerNorm of x + dropout(h), where `compiled_for` both and x is not of fewer bits than h.

    Of what lies between only the sum is kept, not what dropout left, nor a mask.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd hands its arguments over one by one
        ctx: Any, h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, p: float, keep: bool
    ) -> Tensor:
        rows, width, half = _layout(x)
        ctx.how = (h.dtype == torch.bfloat16, weight.dtype == torch.bfloat16, half)
        ctx.chance = draw(p)
        out, sums = torch.empty_like(x), torch.empty_like(x) if keep else None
        moments = torch.empty(rows, 2)
        given = (h, x, weight, bias, sums, out, moments)
        places = [None if tensor is None else tensor.data_ptr() for tensor in given]
        _in_c().add_norm(*places, rows, width, *ctx.how, epsilon, *ctx.chance)
        ctx.save_for_backward(sums, moments, weight)
        ctx.dtype = h.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sums, moments, weight = ctx.saved_tensors
        rows, width, _ = _layout(sums)
        threads = torch.get_num_threads()
        for_h, for_x = torch.empty_like(sums, dtype=ctx.dtype), torch.empty_like(sums)
        for_weights = torch.empty(2, threads, width)
        given = (grad.contiguous(), sums, moments, weight, for_h, for_x, *for_weights)
        places = [tensor.data_ptr() for tensor in given]
        _in_c().add_norm_backward(*places, threads, rows, width, *ctx.how, *ctx.chance)
        for_weight, for_bias = for_weights.sum(1).to(weight.dtype)
        return for_h, for_x, for_weight, for_bias, None, None, None
