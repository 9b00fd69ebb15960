"""Several processes give what one gives: the gradients of a step, the run, the vectors, what is mined."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_trainer import source_of
from tiny_models import WORDS

from kinvec import distributed
from kinvec.backbone import LoraSettings, add_lora, trainable
from kinvec.batching import deal
from kinvec.contracts import KinvecError
from kinvec.embedder import open_folder
from kinvec.files import open_data
from kinvec.mixing import alone
from kinvec.objectives import ObjectiveSettings, make_objective
from kinvec.sampling import DataSettings, label_source
from kinvec.trainer import TrainerSettings, _gradients, _prepared

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = 10**12  # bytes: every chunk keeps its graph


def case(objective: dict[str, Any], *, keep: bool = True, chunk: int = 64, lora: int = 0, **trainer: Any) -> dict:
    return {"objective": objective, "keep": keep, "chunk": chunk, "lora": lora, "trainer": {"dropout": 0.0} | trainer}


HARD = {"name": "contrastive"}
CASES = {
    "hard negatives and masks": case(HARD),
    "recomputed": case(HARD, keep=False),
    "own negatives, both ways": case(HARD | {"hard_negatives": "own", "both_directions": True}),
    "matryoshka": case(HARD | {"dimensions": [16, 8]}, keep=False),
    "triplets": case({"name": "triplet", "mining": "all"}),
    "masked language": case({"name": "mlm"}),
    "LoRA": case(HARD, lora=4),
    "sharded": case(HARD, shard="all"),
    "sharded by machine": case(HARD, shard="machine"),
    "sharded, recomputed, LoRA, checkpointed": case(
        HARD, keep=False, lora=4, shard="all", gradient_checkpointing=True
    ),
}  # fmt: skip


def gradients_of(folder: Path, one: dict[str, Any], pairs: Path, labelled: Path) -> dict[str, torch.Tensor]:
    """The gradients of a step over 24 queries (or texts), with the loss."""
    torch.manual_seed(0)
    embedder = open_folder(folder)
    objective = make_objective(ObjectiveSettings(**one["objective"]))
    if objective.ask is not None:
        from kinvec.embedder import add_language_head

        add_language_head(embedder)
    if one["lora"]:
        add_lora(embedder.backbone, LoraSettings(rank=one["lora"], dropout=0.0))
        torch.manual_seed(1)
        for name, parameter in trainable(embedder):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # at their start, zero, half of the gradients would be zero
    settings = TrainerSettings(**one["trainer"])
    embedder = _prepared(embedder, settings)
    if objective.kind == "labelled":
        table = open_data(labelled)
        source: Any = label_source(table, np.arange(len(table)), DataSettings(), seed=0)
    else:
        source = source_of(pairs, negatives_per_query=1)
    step = alone(source, objective).step(0, 24)
    value, *_ = _gradients(embedder, step, one["chunk"], (100.0, ALL if one["keep"] else 0))
    distributed.add_gradients(parameter for _, parameter in trainable(embedder))
    found = {name: distributed.whole(p.grad).clone() for name, p in trainable(embedder) if p.grad is not None}
    return found | {"loss": torch.tensor(value, dtype=torch.float64)}


def write_gradients(out: Path, *given: Any) -> None:
    """Of every case; rank 0 writes, all compute."""
    for name, one in CASES.items():
        if name == "masked language":  # draws what it hides in every process: its own test is below
            continue
        found = gradients_of(given[0], one, *given[1:])
        if distributed.rank() == 0:
            save_file(found, out / f"{name}.safetensors")


@pytest.fixture(scope="module")
def labelled_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = np.random.default_rng(3), tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    with open(path, "w") as file:
        for row in range(60):
            text = " ".join(rng.choice(WORDS, rng.integers(2, 20)))
            file.write(json.dumps({"text": text, "label": f"label {row % 5}"}) + "\n")
    return path


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradients_of_several_processes_are_those_of_one(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, labelled_texts: Path, world: int
) -> None:
    given = (tiny_folder, tiny_pairs, labelled_texts)
    ranks.run(world, write_gradients, tmp_path, *given, output=tmp_path / "said")
    for name, one in CASES.items():
        if name == "masked language":
            continue
        whole = one | {"keep": True, "chunk": 10**6, "trainer": {"dropout": 0.0}}
        alone_, several = gradients_of(tiny_folder, whole, *given[1:]), load_file(tmp_path / f"{name}.safetensors")
        assert alone_.keys() == several.keys(), name
        a, b = (torch.cat([found[key].double().flatten() for key in sorted(alone_)]) for found in (alone_, several))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) >= 0.999999, name
        assert b.norm() / a.norm() == pytest.approx(1.0, abs=1e-5), name
        assert a.norm() > 0.01 and several["loss"] == pytest.approx(float(alone_["loss"]), rel=1e-6), name


@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(16, 512), st.integers(1, 5))
def test_texts_are_dealt_once_and_evenly(lengths: list[int], budget: int, world: int) -> None:
    try:
        dealt = deal(np.array(lengths), budget, world)
    except KinvecError:
        assert len(lengths) < world * math.ceil(sum(lengths) / (budget * world))
        return
    assert sorted(row for own in dealt for group in own for row in group) == list(range(len(lengths)))
    assert len({len(own) for own in dealt}) == 1 and all(group for own in dealt for group in own)
    if world > 1 and len(lengths) > 10 * world:
        sizes = [sum(lengths[row] for group in own for row in group) for own in dealt]
        assert max(sizes) - min(sizes) <= 2 * max(lengths) * len(dealt[0])
