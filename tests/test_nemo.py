"""`.nemo` both ways: bit for bit through every form NeMo has written, and nothing hostile gets through."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MINILM
from safetensors.torch import load_file
from torch import Tensor

import kinvec

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the blood of a mouse shows a high level", "a trial", "insulin reduces glucose in men and women of any age"]
HEADS, WIDTH, LAYERS = 4, 32, 2  # of the tiny model
Convert = Callable[..., dict[str, Any]]


def weights(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors, without the buffer that old versions of transformers stored beside them."""
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if "position_ids" not in k}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        v.dtype == theirs[k].dtype and torch.equal(v, theirs[k]) for k, v in ours.items()
    )


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "r:") as tar:
        tar.extractall(folder, filter="data")
    return folder


# ---- round trips ----


@pytest.mark.parametrize("mcore", [True, False])
def test_minilm_comes_back_bit_for_bit(minilm_folder: Path, tmp_path: Path, mcore: bool) -> None:
    kinvec.convert(MINILM, tmp_path / "m.nemo", mcore=mcore)
    kinvec.convert(tmp_path / "m.nemo", tmp_path / "back")
    assert len(weights(minilm_folder)) == 103
    assert same(weights(minilm_folder), weights(tmp_path / "back"))
    before, after = (kinvec.Embedder.load(m, precision="fp32").encode(TEXTS) for m in (MINILM, tmp_path / "back"))
    assert np.abs(before - after).max() <= 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m.nemo"]
