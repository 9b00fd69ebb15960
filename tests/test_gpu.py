"""What only a CUDA device runs: varlen attention, bf16 on it, a training step. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MINILM
from test_trainer import contrastive, log_of, source_of

from kinvec import Embedder
from kinvec.embedder import open_folder
from kinvec.mixing import alone
from kinvec.trainer import TrainerSettings, fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
TEXTS = [f"a text of {number} words " + "and more " * number for number in range(0, 120, 3)]


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("bf16", 0.999)])
def test_vectors_agree_with_those_of_the_processor(precision: str, least: float) -> None:
    expected = Embedder.load(MINILM, precision="fp32", device="cpu").encode(TEXTS)
    model = Embedder.load(MINILM, precision=precision, device="cuda")
    assert model.backbone.packs
    assert ((model.encode(TEXTS) * expected).sum(1)).min() > least


@pytest.mark.parametrize(("precision", "off"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_training_follows_the_processor(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, precision: str, off: float
) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        run.mkdir()
        embedder = open_folder(tiny_folder).to(device)
        embedder.precision = precision if device == "cuda" else "fp32"
        settings = TrainerSettings(batch_size=8, lr=1e-3, max_steps=6, dropout=0.0)
        fit(embedder, alone(source_of(tiny_pairs), contrastive()), settings, run, seed=1)
        losses[device] = [row["loss"] for row in log_of(run)]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], atol=off)
