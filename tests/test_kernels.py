"""The compiled passes compute what torch computes, drop as told whatever the threads, and are made and kept safely."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention import MASKS, SHAPE, heads, text_mask
from tiny_models import build
from torch import Tensor, nn

from kinvec import kernels
from kinvec.attention import EqualLengthAttention
from kinvec.fused import Dropout, _add_norm, fuse_output_blocks
from kinvec.kernels import AddNorm, draw, keep_mask, library, softmax, softmax_backward

WIDTHS = (1, 5, 15, 16, 17, 77, 240)
TYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that asks for it runs with the compiled functions and with torch's."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    else:
        assert library() is not None, "these tests need a C compiler"
    return str(request.param)


def scores_of(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores of three runs, some far apart, and a causal bias."""
    draws = torch.Generator().manual_seed(width)
    scores = torch.randn(3, width, width, generator=draws) * 20.0
    bias = torch.zeros(width, width).masked_fill_(torch.ones(width, width).triu(1).bool(), float("-inf"))
    return scores.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_softmax_is_softmax(way: str, width: int, dtype: torch.dtype) -> None:
    scores, causal = scores_of(width, dtype)
    for bias in (None, causal):
        probs, seen = softmax(scores.clone(), bias, 0.3, 0.0)
        expected = torch.softmax(scores.double() * 0.3 + (0.0 if bias is None else bias.double()), -1)
        # torch rounds scale · scores to bf16 first
        rounding = ROUNDING[dtype] if way == "compiled" else 8 * ROUNDING[dtype]
        torch.testing.assert_close(seen.double(), expected, atol=rounding, rtol=rounding)
        assert torch.equal(probs, seen)


def test_what_underflows_is_zero_and_what_is_no_number_stays_none(way: str) -> None:
    scores = torch.tensor([[0.0, -200.0, float("-inf")], [1.0, 2.0, float("nan")], [float("inf"), 0.0, 0.0]])
    _, seen = softmax(scores, None, 1.0, 0.0)
    assert seen[0].tolist() == [1.0, 0.0, 0.0]
    assert seen[1:].isnan().all(), "a loss that is no number must be seen"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_softmaxs_gradient_is_that_of_the_places_dropped(way: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    scores, bias = scores_of(width, dtype)
    probs, seen = softmax(scores.clone(), bias, 0.3, 0.25)
    keep = ~torch.signbit(probs)
    exact = scores.double().requires_grad_()
    shares = torch.softmax(exact * 0.3 + bias.double(), -1)
    expected = shares * keep / 0.75
    allowed = 8 * ROUNDING[dtype]
    torch.testing.assert_close(seen.double(), expected.detach(), atol=allowed, rtol=allowed)
    given = torch.randn(scores.shape).to(dtype)
    expected.backward(given.double())
    grad, again = softmax_backward(probs, given.clone(), 0.3, 0.25)
    assert exact.grad is not None
    torch.testing.assert_close(grad.double(), exact.grad, atol=2 * allowed, rtol=allowed)
    torch.testing.assert_close(again, seen, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_places_are_dropped_at_the_right_rate_and_on_their_own(rate: float) -> None:
    """By row, by column, and beside their neighbours in both directions: no pattern."""
    torch.manual_seed(0)
    rows, width = 1500, 1000
    kept = (kernels.dropped(torch.ones(rows, width), draw(rate)) > 0).double()
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(kept.mean().item() - (1 - rate)) < 5 * deviation / math.sqrt(rows * width)
    assert (kept.mean(0) - (1 - rate)).abs().max() < 5.5 * deviation / math.sqrt(rows)
    assert (kept.mean(1) - (1 - rate)).abs().max() < 5.5 * deviation / math.sqrt(width)
    centred = (kept - (1 - rate)) / deviation
    for step in (1, 2, 16, 32):
        for one, other in ((centred[:, step:], centred[:, :-step]), (centred[step:], centred[:-step])):
            assert abs((one * other).mean().item()) < 5 / math.sqrt(one.numel())
    another = (kernels.dropped(torch.ones(rows, width), draw(rate)) > 0).double()
    assert abs((centred * (another - (1 - rate)) / deviation).mean().item()) < 5 / math.sqrt(rows * width)


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            scores, bias = scores_of(77, torch.bfloat16)
            probs, seen = softmax(scores, bias, 0.3, 0.1)
            grad, _ = softmax_backward(probs, seen.clone(), 0.3, 0.1)
            found.append([probs, seen, grad, kernels.dropped(torch.ones(31, 77), draw(0.1))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask", MASKS)
def test_compiled_attention_and_its_gradient_are_those_of_float64(mask: str, softcap: float | None) -> None:
    exact = heads()
    single = [x.detach().float().requires_grad_() for x in exact]
    for given in (exact, single):
        EqualLengthAttention.apply(*given, SHAPE, text_mask(mask), 0.4, 0.0, softcap).square().sum().backward()
    for x, y in zip(exact, single, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(y.grad.double(), x.grad, atol=2e-5, rtol=2e-5)


# ---- LayerNorm(x + dropout(h)) ----


def norm_inputs(width: int, of_h: torch.dtype, of_x: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(width)
    h, x = (torch.randn(2, 21, width, generator=draws) * 3.0 + 1.0 for _ in range(2))
    weight, bias = (torch.randn(width, generator=draws) for _ in range(2))
    return h.to(of_h), x.to(of_x), weight, bias


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("of_h, of_x", [(TYPES[0], TYPES[0]), (TYPES[1], TYPES[0]), (TYPES[1], TYPES[1])])
@pytest.mark.parametrize("width", [5, 16, 100, 384])
def test_add_norm_and_its_gradients_are_torchs(width: int, of_h: torch.dtype, of_x: torch.dtype, p: float) -> None:
    given = [tensor.requires_grad_() for tensor in norm_inputs(width, of_h, of_x)]
    torch.manual_seed(1)
    out = AddNorm.apply(*given, 1e-12, p, True)
    torch.manual_seed(1)
    keep = kernels.dropped(torch.ones(2, 21, width), draw(p))  # the same places, by the same state
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    sums = exact[1] + exact[0] * keep.double()
    expected = nn.functional.layer_norm(sums, (width,), exact[2], exact[3], 1e-12)
    allowed = 4 * ROUNDING[of_x]
    torch.testing.assert_close(out.double(), expected, atol=20 * allowed, rtol=allowed)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(grad.to(out.dtype))
    expected.backward(grad.to(out.dtype).double())
    for ours, theirs, name in zip(given, exact, ("h", "x", "weight", "bias"), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == ours.dtype
        allowed = 4 * ROUNDING[ours.dtype if name in "hx" else of_x]
        bound = allowed * max(1.0, float(theirs.grad.abs().max()))
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=bound, rtol=allowed, msg=name)


def test_output_blocks_are_found_by_what_they_compute() -> None:
    model = build("bert")
    fuse_output_blocks(model)
    fused = [name for name, module in model.named_modules() if getattr(module.forward, "__func__", None) is _add_norm]
    assert fused == [f"encoder.layer.{i}.{part}" for i in range(2) for part in ("attention.output", "output")]

    class Before(nn.Module):
        """The same parts and arguments, another formula."""

        def __init__(self) -> None:
            super().__init__()
            self.dense, self.LayerNorm, self.dropout = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1)

        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return self.LayerNorm(self.dropout(self.dense(hidden_states))) + input_tensor

    holder = nn.ModuleList([Before()])
    x = torch.randn(3, 8)
    before = holder.eval()[0](x, x)
    fuse_output_blocks(holder)
    assert torch.equal(holder[0](x, x), before)


def test_fused_blocks_without_a_compiler_are_the_same_blocks(way: str) -> None:
    plain, fused = build("bert"), build("bert")
    fuse_output_blocks(fused)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for x, y in zip(plain.train().parameters(), fused.train().parameters(), strict=True):
        assert torch.equal(x, y)
    outs = [model(input_ids=ids).last_hidden_state for model in (plain, fused)]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=0)
    for out in outs:
        out.square().mean().backward()
    for x, y in zip(plain.parameters(), fused.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None and y.grad is not None:
            torch.testing.assert_close(y.grad, x.grad, atol=1e-6, rtol=1e-4)


# ---- dropout ----


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_dropout_mask_keeps_at_the_right_rate(rate: float) -> None:
    torch.manual_seed(0)
    count = 1_000_003  # no multiple of four: the last draw is cut
    mask = keep_mask(torch.Size((count,)), rate, torch.device("cpu"))
    assert mask.shape == (count,) and set(mask.unique().tolist()) == {-1, 0}
    kept = mask == -1
    for part in (kept, kept[::4], kept[1::4], kept[2::4], kept[3::4]):
        deviation = math.sqrt(rate * (1 - rate) / len(part))
        assert abs(part.double().mean().item() - (1 - rate)) < 5 * deviation + 2**-16


def test_dropouts_backward_is_its_mask(way: str) -> None:
    layer = Dropout(0.4)
    x = torch.full((64, 33), 2.0, requires_grad=True)
    state = torch.get_rng_state()
    out = layer(x)
    out.sum().backward()
    assert x.grad is not None
    assert out.unique().tolist() == [0.0, pytest.approx(2.0 / 0.6)]
    torch.testing.assert_close(x.grad, out.detach() / 2.0)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), out)
    assert torch.equal(layer.eval()(x), x)


# ---- compiled, kept, or done without ----


def compiled_files() -> list[Path]:
    return sorted((Path(os.environ["KINVEC_CACHE"]) / "kernels").iterdir())


def test_the_compiled_file_is_kept_and_used_again(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None
    (kept,) = compiled_files()
    library.cache_clear()
    monkeypatch.setattr(kernels, "_compile", lambda *_: pytest.fail("compiled again"))
    again = library()
    assert again is not None and again._name == str(kept)


@pytest.mark.parametrize("harm", ["cut short", "open to all"])
def test_a_kept_file_that_is_damaged_or_open_to_others_is_made_anew(afresh: None, harm: str) -> None:
    library()
    (kept,) = compiled_files()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100] if harm == "cut short" else whole)  # what this process has mapped lay elsewhere
    kept.chmod(0o666 if harm == "open to all" else 0o600)
    names = []
    for _ in range(2):
        library.cache_clear()
        found = library()
        assert found is not None
        names.append(found._name)
    assert names[0] != str(kept) and names[1] == str(kept)
    assert len(kept.read_bytes()) == len(whole) and kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("compiler", "openmp", "why"),
    [
        ("no-such-compiler", "libgomp.so.1", "no C compiler was found"),
        ("false", "libgomp.so.1", "cannot compile kinvec/csrc here"),
        ("cc", None, "this torch uses no OpenMP library"),
    ],
)
def test_without_a_compiler_that_works_torch_serves(  # noqa: PLR0913 - what is missing, and what is said
    afresh: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], compiler: str, openmp: str | None,
    why: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(kernels, "_openmp", lambda: openmp)
    assert library() is None
    said = capfd.readouterr().err
    assert why in said and said.count("\n") == 1
    scores, _ = scores_of(16, torch.float32)
    _, seen = softmax(scores.clone(), None, 1.0, 0.0)
    torch.testing.assert_close(seen, torch.softmax(scores, -1))


def test_a_cache_that_cannot_be_written_to_is_no_hindrance(
    afresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KINVEC_CACHE", str(tmp_path / "file"))
    assert library() is not None


def test_the_openmp_of_another_package_is_not_taken_for_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernels._openmp()
    loaded = [{"filepath": path, "internal_api": "openmp"} for path in ("/elsewhere/libgomp.so.1", own)]
    monkeypatch.setattr(kernels, "threadpool_info", lambda: loaded)
    assert own is not None and kernels._openmp() == own


RUNTIMES = """
from threadpoolctl import threadpool_info
from kinvec.kernels import library
for compiled in (None, library):
    assert compiled is None or compiled() is not None
    print(sum("gomp" in pool["filepath"] for pool in threadpool_info()))
"""


def test_torch_and_the_compiled_file_share_one_openmp() -> None:
    """A second runtime would bring threads of its own, which fight the first one's for the cores."""
    run = subprocess.run([sys.executable, "-c", RUNTIMES], capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert before == after > 0
