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
from kinvec.topk import top_k
from kinvec.trainer import TrainerSettings, fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
TEXTS = [f"a text of {number} words " + "and more " * number for number in range(0, 120, 3)]


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("bf16", 0.999)])
def test_vectors_agree_with_those_of_the_processor(precision: str, least: float) -> None:
    expected = Embedder.load(MINILM, precision="fp32", device="cpu").encode(TEXTS)
    model = Embedder.load(MINILM, precision=precision, device="cuda")
    assert model.backbone.packs
    assert ((model.encode(TEXTS) * expected).sum(1)).min() > least


@pytest.mark.parametrize("length", [1.0, 30.0])  # in float16, and in bf16
@pytest.mark.parametrize("below", [False, True])
def test_a_search_is_that_of_the_processor_to_the_last_bit(length: float, below: bool) -> None:
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(rows, 128)).astype(np.float32) for rows in (3_000, 150_000))
    for side in (queries, documents):
        side *= length / np.linalg.norm(side, axis=1, keepdims=True)
    documents[1_000:2_000] = documents[:1_000]
    ids = [f"{row:06d}" for row in range(len(documents))]
    ceilings = np.full(len(queries), 0.3 * length**2, np.float32) if below else None
    scores, rows = top_k(queries, [documents], ids, 50, ceilings)
    others = top_k(queries, np.split(documents, 3), ids, 50, ceilings, device=torch.device("cuda"))
    assert (others[0] == scores).all() and (others[1] == rows).all()


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
