"""What a model holds in memory while it trains, and that holding less of it changes no gradient."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_plain
from torch import Tensor

from kinvec import Embedder
from kinvec.adapters import FewBits, LoraSettings, add_lora, frozen_layers
from kinvec.backbone import recompute_layers, trainable
from kinvec.batching import pack
from kinvec.contracts import KinvecError
from kinvec.embedder import open_folder
from kinvec.planner import saved_bytes_per_token
from kinvec.trainer import TrainerSettings, fit, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["gene expression in the human heart " * 4, "insulin", "a drug reduces the risk of infection", "brain cancer"]


def prepared(folder: Path, lora: int, **settings: Any) -> Embedder:
    torch.manual_seed(0)
    embedder = open_folder(folder)
    if lora:
        add_lora(embedder.backbone, LoraSettings(rank=lora, dropout=0.1))
        for name, parameter in trainable(embedder):
            if "lora_B" in name:  # which start at zero, and would leave half of the gradients there
                torch.nn.init.normal_(parameter, std=0.1)
    prepare(embedder, TrainerSettings(**settings))
    return embedder


def gradients(embedder: Embedder) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Vectors, gradients by name, and the random state afterwards."""
    texts = pack(embedder.tokenize(TEXTS), range(len(TEXTS)))
    torch.manual_seed(1)
    vectors = embedder(texts)
    (vectors @ vectors.detach().roll(1, 0).T).exp().sum().backward()
    found = {name: p.grad.clone() for name, p in trainable(embedder) if p.grad is not None}
    return vectors.detach(), found, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lora", [0, 2], ids=["all weights", "lora"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gemma2", "deberta-v2", "t5"])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, name: str, lora: int, dropout: float) -> None:
    save_plain(name, tmp_path, "decoder" if name in ("llama", "gemma2") else "roberta")
    plain = prepared(tmp_path, lora, dropout=dropout)
    frugal = prepared(tmp_path, lora, dropout=dropout, gradient_checkpointing=True)
    vectors, expected, state = gradients(plain)
    again, found, state_after = gradients(frugal)
    assert torch.equal(again, vectors) and torch.equal(state_after, state)
    assert found.keys() == expected.keys() and len(found) >= 4
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert any(value.abs().max() > 0 for value in expected.values())
    sample = pack(plain.tokenize(TEXTS), range(len(TEXTS)))
    assert saved_bytes_per_token(frugal, frugal, sample) < 0.4 * saved_bytes_per_token(plain, plain, sample)


@pytest.mark.parametrize("budget", ["8GiB", "1B"])
def test_a_run_with_gradient_checkpointing_ends_with_the_same_weights(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, main: Callable[..., tuple[int, str]], budget: str
) -> None:
    """With dropout, in several chunks, all of them kept or all embedded twice."""
    common = ["trainer.batch_size=8", "trainer.max_steps=4", "trainer.lr=1e-3", "trainer.chunk_tokens=64"]
    argv = [f"model={tiny_folder}", f"data.train={tiny_pairs}", "threads=1", "evaluate=false", *common]
    runs = {}
    for frugal in ("false", "true"):
        out = tmp_path / frugal
        code, said = main(
            "train", *argv, f"out={out}", f"trainer.gradient_checkpointing={frugal}", f"trainer.memory_budget={budget}"
        )
        assert code == 0, said
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        weights = load_file(out / "model" / "model.safetensors")
        runs[frugal] = losses, weights, json.loads((out / "training.json").read_text())["bytes_per_token"]
    assert runs["true"][0] == runs["false"][0] and len(runs["true"][0]) == 4
    assert all(torch.equal(value, runs["false"][1][key]) for key, value in runs["true"][1].items())
    assert runs["true"][2] < 0.4 * runs["false"][2]  # the plan counts what is really kept


def test_an_architecture_without_such_layers_is_refused(tmp_path: Path) -> None:
    save_plain("mpnet", tmp_path, "roberta")
    with pytest.raises(KinvecError, match="mpnet: its layers cannot be recomputed; leave trainer.gradient_checkpointi"):
        recompute_layers(open_folder(tmp_path).backbone)


def test_a_model_that_was_measured_is_let_go(tiny_folder: Path) -> None:
    """A node of a graph that holds its own output is never freed, nor are the weights it leads to."""
    embedder = open_folder(tiny_folder)
    weight = weakref.ref(next(embedder.parameters()))
    sample = pack(embedder.tokenize(["one text", "another text"]), range(2))
    assert saved_bytes_per_token(embedder, embedder, sample) > 0
    del embedder
    gc.collect()
    assert weight() is None


def lora_run(main: Callable[..., tuple[int, str]], out: Path, model: Path, pairs: Path, *more: str) -> tuple[int, str]:
    settings = ["trainer.batch_size=8", "trainer.lr=1e-2", "trainer.save_every=3", "lora.rank=2", "lora.dropout=0.1"]
    data = [f"data.train={pairs}", f"data.dev={pairs}", f"data.test={pairs}", "precision=bf16", "threads=1"]
    steps = ["trainer.max_steps=6", "trainer.eval_every=2", "trainer.keep=9"]
    return main("train", f"model={model}", *data, *settings, *steps, f"out={out}", *more)


def contents(run: Path) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], Any]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{key: row.get(key) for key in ("loss", "grad_norm", "dev")} for row in log]
    results = json.loads((run / "summary.json").read_text())["results"]
    files = run / "model" / "model.safetensors", run / "adapter" / "adapter_model.safetensors"
    return kept, load_file(files[0]), load_file(files[1]), results


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_base_in_bf16_changes_no_bit_of_a_bf16_run(
    tmp_path: Path, tiny_pairs: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, dev measures, adapter, merged model and results; held for half of it; and when it was interrupted."""
    from peft import PeftModel
    from transformers import AutoModel

    model = save_plain("llama", tmp_path / "base", "decoder", spread=0.1)
    held: list[set[torch.dtype]] = []

    def spy(embedder: Embedder, *arguments: Any) -> dict[str, Any]:
        layers = [m for n, m in embedder.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]
        held.append({layer.weight.dtype for layer in layers})
        assert {p.dtype for _, p in trainable(embedder)} == {torch.float32}
        return fit(embedder, *arguments)

    monkeypatch.setattr("kinvec.pipeline.fit", spy)
    for base in ("fp32", "bf16"):
        code, said = lora_run(main, tmp_path / base, model, tiny_pairs, f"lora.base={base}")
        assert code == 0, said
    assert held == [{torch.float32}, {torch.bfloat16}]
    expected, found = contents(tmp_path / "fp32"), contents(tmp_path / "bf16")
    assert found[0] == expected[0] and found[3] == expected[3] and len(found[0]) == 6
    for part in (1, 2):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(value, expected[part][key]) for key, value in found[part].items())

    whole = AutoModel.from_pretrained(model)
    merged = PeftModel.from_pretrained(whole, str(tmp_path / "bf16" / "adapter")).merge_and_unload().state_dict()
    assert found[1] and all(torch.equal(value, merged[key]) for key, value in found[1].items() if key in merged)

    run = tmp_path / "bf16"
    forget_the_end(run, after_step=3)
    code, said = lora_run(main, run, model, tiny_pairs, "lora.base=bf16")
    assert code == 0 and "continuing after step" in said
    again = contents(run)
    assert again[0] == expected[0] and all(torch.equal(value, expected[1][key]) for key, value in again[1].items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_train_on_a_base_in_four_bits(
    tmp_path: Path, tiny_pairs: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base lies in fewer bytes, losses are near, what is saved is the whole base with the adapter; resumed too."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    from peft import PeftModel
    from transformers import AutoModel

    model = save_plain("llama", tmp_path / "base", "decoder", spread=0.1, hidden_size=64, intermediate_size=128)
    frozen: list[list[Tensor]] = []

    def spy(embedder: Embedder, *arguments: Any) -> dict[str, Any]:
        layers = frozen_layers(embedder.backbone).values()
        frozen.append([layer.codes if isinstance(layer, FewBits) else layer.weight for layer in layers])
        assert {p.dtype for _, p in trainable(embedder)} == {torch.float32}
        return fit(embedder, *arguments)

    monkeypatch.setattr("kinvec.pipeline.fit", spy)
    for out, held in (("whole", "fp32"), ("few", "nf4")):
        code, said = lora_run(main, tmp_path / out, model, tiny_pairs, f"lora.base={held}")
        assert code == 0, said
    assert [{weight.dtype for weight in held} for held in frozen] == [{torch.float32}, {torch.uint8}]
    whole_bytes, few_bytes = (sum(weight.nbytes for weight in held) for held in frozen)
    assert few_bytes * 8 == whole_bytes
    expected, found = contents(tmp_path / "whole"), contents(tmp_path / "few")
    losses = [[row["loss"] for row in run[0]] for run in (expected, found)]
    assert losses[0] != losses[1] and np.allclose(losses[0], losses[1], rtol=0.3)
    assert found[3][0]["metrics"].keys() == expected[3][0]["metrics"].keys()
    before, after = (run[3][0]["metrics"]["nDCG@10"]["base"] for run in (expected, found))
    assert before == after, "the base is measured as it is published"

    whole = AutoModel.from_pretrained(model)
    merged = PeftModel.from_pretrained(whole, str(tmp_path / "few" / "adapter")).merge_and_unload().state_dict()
    assert found[1] and all(torch.equal(value, merged[key]) for key, value in found[1].items() if key in merged)

    forget_the_end(tmp_path / "few", after_step=3)
    code, said = lora_run(main, tmp_path / "few", model, tiny_pairs, "lora.base=nf4")
    assert code == 0 and "continuing after step" in said
    again = contents(tmp_path / "few")
    assert again[0] == found[0] and all(torch.equal(value, found[1][key]) for key, value in again[1].items())


@pytest.mark.parametrize("base, near", [("int8", 0.9999), ("nf4", 0.99)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_layer_in_few_bits_multiplies_by_what_its_codes_say(base: str, near: float, precision: torch.dtype) -> None:
    """Value and gradient of x are those of a layer with the opened weights, which are near the weights themselves."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 96), torch.randn(3, 5, 128, requires_grad=True)
    few, plain = FewBits(layer, base), deepcopy(layer)
    plain.weight.data = few.opened(torch.float32)
    assert torch.cosine_similarity(plain.weight.flatten(), layer.weight.flatten(), dim=0) > near
    found = []
    for product in (few, plain):
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            y = product(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        assert y.dtype is precision and gradient.dtype is torch.float32
        found.append((y.float(), gradient))
    tolerance = 1e-5 if precision is torch.float32 else 2e-2
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < tolerance * other.norm()


def test_no_compiled_code_is_taken_from_the_hub_and_a_missing_library_is_named(tmp_path: Path) -> None:
    """Bitsandbytes asks the package `kernels` for some when it is imported: an empty one stands there and tells."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    raise SystemExit('asked the hub')\n")
    program = """
import sys
from kinvec import adapters
assert adapters.bitsandbytes() is not None
import kernels
assert kernels.get_kernel
sys.modules["bitsandbytes"] = sys.modules["bitsandbytes.functional"] = None
adapters.bitsandbytes.cache_clear()
try:
    adapters.shorten(None, "nf4", None)
except adapters.KinvecError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "lora.base=nf4 needs bitsandbytes" in done.stdout and "pip install 'kinvec[qlora]'" in done.stdout


def forget_the_end(run: Path, after_step: int) -> None:
    """As if the run had been stopped after this step."""
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step-{after_step:08}":
            shutil.rmtree(path)
    for path in (run / "model", run / "adapter"):
        shutil.rmtree(path)
    (run / "training.json").unlink(), (run / "summary.json").unlink()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("objective", ["mntp", "clm"])
def test_less_memory_changes_no_bit_where_tokens_are_predicted(
    tmp_path: Path, main: Callable[..., tuple[int, str]], objective: str
) -> None:
    model = save_plain("llama", tmp_path / "base", "decoder", spread=0.1)
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS * 3))
    common = [f"model={model}", f"data.train={tmp_path / 'texts.txt'}", f"objective.name={objective}", "threads=1"]
    common += ["precision=bf16", "evaluate=false", "trainer.max_steps=3", "trainer.batch_size=4", "lora.rank=2"]
    runs = []
    for frugal in ((), ("lora.base=bf16", "trainer.gradient_checkpointing=true")):
        run = tmp_path / str(len(runs))
        code, said = main("train", *common, *frugal, f"out={run}", "trainer.lr=1e-2", "attention=bidirectional")
        assert code == 0, said
        losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        runs.append((losses, load_file(run / "model" / "model.safetensors")))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0])) == 3
    assert all(torch.equal(value, runs[0][1][key]) for key, value in runs[1][1].items())


def test_a_base_in_bf16_needs_adapters_and_bf16_arithmetic(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, main: Callable[..., tuple[int, str]]
) -> None:
    code, said = lora_run(main, tmp_path / "run", tiny_folder, tiny_pairs, "lora.base=bf16", "lora.rank=0")
    assert code == 2 and "lora.base" in said and "without adapters all of it is trained; set lora.rank" in said
    code, said = lora_run(main, tmp_path / "run", tiny_folder, tiny_pairs, "lora.base=bf16", "precision=fp32")
    assert code == 2 and "lora.base=bf16 needs bf16 arithmetic, and this run's is fp32; set precision=bf16" in said
    assert not (tmp_path / "run").exists()
