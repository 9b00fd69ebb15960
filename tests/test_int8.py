"""int8 for encoding: products are exact, a text's vector is its own, what cannot be is refused, quality holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_attention import packed_states, padded_states, random_tokens
from test_embed import MINILM
from tiny_models import PACKED, PADDED, WORDS, build
from torch import nn

from kinvec import Embedder, embed, kernels
from kinvec.backbone import Backbone, resolve_precision, to_int8
from kinvec.batching import packs
from kinvec.contracts import KinvecError, RecipeError
from kinvec.embedder import _vectors_of
from kinvec.encoders import open_encoder
from kinvec.int8 import FINE, MOST, ZERO, Int8Linear, quantise, round_tokens, turned
from kinvec.trainer import TrainerSettings, _prepared

RNG = np.random.default_rng(5)
TEXTS = [" ".join(RNG.choice(WORDS, n)) for n in (1, 30, 4, 4, 60, 12, 2, 30)]


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that asks for it runs with the compiled functions and with torch's."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    else:
        assert kernels.library() is not None, "these tests need a C compiler"
    return str(request.param)


SIZES = (1, 5, 16, 17, 70, 128, 200, 256, 384)


@pytest.mark.parametrize("inputs", SIZES)
def test_what_is_turned_keeps_its_products(inputs: int) -> None:
    draws = torch.Generator().manual_seed(inputs)
    x, w = (torch.randn(7, inputs, generator=draws) for _ in "xw")
    torch.testing.assert_close(turned(x) @ turned(w).T, x @ w.T, atol=1e-5, rtol=1e-5)
    alone = torch.zeros(1, inputs)
    alone[0, 0] = 1.0
    spread = turned(alone).abs()
    assert spread.max() < 0.3 and (spread > 0).sum() >= 16, "a number that stands out is shared among many"
    assert turned(torch.ones(1, inputs)).abs().max() < 1.5, "what all share is not gathered in one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("inputs", SIZES)
def test_a_token_is_rounded_within_its_own_range_to_half_a_step(
    way: str, inputs: int, size: float, dtype: torch.dtype
) -> None:
    x = (torch.randn(40, inputs, generator=torch.Generator().manual_seed(inputs)) * size + size).to(dtype)
    x[0] = 0.0
    before, whole = x.clone(), turned(x.float())
    codes, scale = round_tokens(x)
    assert torch.equal(x, before) and codes.shape == whole.shape and (codes[0] == ZERO).all()
    assert codes.min() >= ZERO - FINE and ((codes.double() - ZERO).abs().amax(1)[1:] == FINE).all()
    assert (((codes.double() - ZERO) * scale.double() - whole.double()).abs() <= scale.double() * 0.501).all()
    for row in range(40):  # whatever stands beside it
        alone, own = round_tokens(x[row : row + 1])
        if way == "compiled":
            assert torch.equal(alone[0], codes[row]) and torch.equal(own[0], scale[row])
        else:  # torch's product of few rows may add in another order
            assert (alone[0].int() - codes[row].int()).abs().max() <= 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_holds_what_is_no_number_gives_none(way: str, wrong: float) -> None:
    x, layer = torch.randn(4, 70), Int8Linear([nn.Linear(70, 20)])
    x[2, 3] = wrong
    found = layer(x)
    assert not found[2].isfinite().any() and found[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_integers(way: str, bias: bool) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(70, 33, bias=bias), nn.Linear(70, 20, bias=bias)]
    with torch.no_grad():
        joined, x = Int8Linear(layers), torch.randn(3, 50, 70) + 2.0
        codes, scale = round_tokens(x.view(-1, 70))
        weights = joined.weight.double() * joined.scale.double()[:, None]
        exact = (codes.double() - ZERO) * scale.double() @ weights.T
        exact += torch.cat([layer.bias for layer in layers]) if bias else 0.0
        torch.testing.assert_close(joined(x).view(150, 53).double(), exact, atol=1e-4, rtol=1e-5)
        assert near(joined(x), torch.cat([layer(x) for layer in layers], -1)) > 1 - 1e-4 * (MOST / FINE) ** 2
        assert torch.equal(joined(x[:1]), joined(x)[:1]), "a row does not depend on how many there are"


def test_the_number_of_threads_changes_no_bit() -> None:
    before, x = torch.get_num_threads(), torch.randn(97, 200).bfloat16()
    layer, found = Int8Linear([nn.Linear(200, 77)]), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_sums_of_the_largest_codes_are_exact() -> None:
    layer = nn.Linear(4096, 40, bias=False)
    signs = torch.tensor([1.0, -1.0]).repeat(2048)
    back = turned(torch.eye(4096)).T  # what turns into the signs
    layer.weight.data = (signs @ back).repeat(40, 1)
    largest, x = Int8Linear([layer]), (signs @ back).repeat(20, 1)
    codes, scale = round_tokens(x)
    assert (largest.weight.abs() == MOST).all() and ((codes.int() - ZERO).abs() == FINE).all()
    sums = torch.full((20, 40), 4096.0 * MOST * FINE)  # a sum of products in 16 bits would overflow
    torch.testing.assert_close(largest(x), sums * scale * largest.scale)


def test_an_older_processor_that_adds_two_products_in_16_bits_loses_none() -> None:
    """The tests of this file once more, with oneDNN's way for it, and with torch saying that it is one."""
    code = (
        "import sys, pytest, torch\n"
        "torch.cpu._is_vnni_supported = torch.cpu._is_amx_tile_supported = lambda: False\n"
        f"asked = ['-q', '-n0', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'integers or largest or token']\n"
        "sys.exit(pytest.main(asked))"
    )
    older = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=older, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def near(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min())


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_every_architecture_stays_near_itself_packed_as_padded(name: str) -> None:
    backbone = Backbone(build(name, spread=0.1), pad_token=1)
    tokens, packs = random_tokens((9, 1, 5, 20, 5)), backbone.packs
    with torch.inference_mode():
        before = torch.cat(packed_states(backbone, tokens))
        to_int8(backbone)
        found = torch.cat(packed_states(backbone, tokens))
        backbone.model.set_attn_implementation(backbone.native)  # type: ignore[operator]
        padded = torch.cat(padded_states(backbone.model, tokens))
    linear = [module for module in backbone.modules() if type(module) is nn.Linear and module.weight is not None]
    assert packs == (name in PACKED) and not linear
    assert near(found, before) > 0.99 and near(found, padded) > 0.997
    assert not torch.equal(found.float(), before), "nothing was rounded"


def test_rotary_positions_keep_their_angles() -> None:
    backbone = Backbone(build("llama"), pad_token=1)
    angles = dict(backbone.model.named_buffers())["rotary_emb.inv_freq"].clone()
    to_int8(backbone)
    assert torch.equal(dict(backbone.model.named_buffers())["rotary_emb.inv_freq"], angles)


def test_minilm_keeps_its_vectors() -> None:
    exact, model = (Embedder.load(MINILM, precision=precision) for precision in ("fp32", "int8"))
    texts = [*TEXTS, "How do vaccines prevent an infection?", "Insulin lowers the level of glucose in the blood."]
    vectors = model.encode(texts)
    cosines = (vectors * exact.encode(texts)).sum(1)
    assert cosines.mean() > 0.999 and cosines.min() > 0.998
    alone = np.concatenate([model.encode([text]) for text in texts])
    assert (alone * vectors).sum(1).min() > 0.999, "a text's scales are its own"
    assert model.fingerprint != exact.fingerprint and model.precision == "int8"
    assert model.fingerprint == Embedder.load(MINILM, precision="int8").fingerprint


def test_a_model_opened_in_int8_is_saved_whole(tiny_folder: Path, tmp_path: Path) -> None:
    Embedder.load(tiny_folder, precision="int8").save(tmp_path / "saved")
    whole, again = (Embedder.load(folder, precision="fp32") for folder in (tiny_folder, tmp_path / "saved"))
    assert np.array_equal(whole.encode(TEXTS), again.encode(TEXTS))


def test_a_folder_of_vectors_names_it_and_helping_processes_compute_the_same(tmp_path: Path, tiny_folder: Path) -> None:
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"_id": str(row), "text": text}) + "\n" for row, text in enumerate(TEXTS)))
    manifest = embed(tiny_folder, tmp_path / "out", docs=source, precision="int8", threads=1)
    assert manifest["precision"] == "int8"
    with pytest.raises(KinvecError, match="precision"):
        embed(tiny_folder, tmp_path / "out", docs=source, precision="fp32", threads=1)
    model = Embedder.load(tiny_folder, precision="int8")
    (texts,) = packs(model.tokenize(TEXTS), 8192)
    assert model.loaded is not None
    helped = _vectors_of(model.loaded, 1, texts)  # what another process is asked for: it opens the model by its name
    assert np.array_equal(helped, np.load(tmp_path / "out" / "doc.npy")[list(texts.rows)])


def test_what_it_is_not_for_is_refused_in_one_sentence(
    tmp_path: Path,
    tiny_folder: Path,
    tiny_pairs: Path,
    main: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    code, said = main("train", f"model={tiny_folder}", f"data.train={tiny_pairs}", f"out={run}", "--precision", "int8")
    assert code == 2 and "int8 is for encoding" in said and not run.exists()
    with pytest.raises(KinvecError, match="int8 is for encoding alone"):
        _prepared(Embedder.load(tiny_folder, precision="int8"), TrainerSettings())
    with pytest.raises(RecipeError, match="^st: opens a model in fp32 or bf16"):
        open_encoder(f"st:{tiny_folder}", precision="int8")
    with pytest.raises(KinvecError, match="^precision int8 is for encoding on a CPU"):
        resolve_precision("int8", torch.device("meta"))
    with monkeypatch.context() as patch, pytest.raises(KinvecError, match="^precision int8 needs oneDNN"):
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        resolve_precision("int8", torch.device("cpu"))
    gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(KinvecError, match="^GPT2Model: none of its weights are in plain linear layers"):
        quantise(gpt)
