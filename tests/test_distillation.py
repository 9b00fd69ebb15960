"""Embeddings of a larger model, learnt by a smaller one: the map between their dimensions, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import WORDS, save_plain

import kinvec
from kinvec import Embedder
from kinvec.contracts import RecipeError
from kinvec.losses import turned
from kinvec.objectives import ObjectiveSettings, make_objective

pytestmark = pytest.mark.usefixtures("one_thread")


@given(n=st.integers(1, 40), t=st.integers(1, 12), d=st.integers(1, 12), seed=st.integers(0, 1000))
def test_no_map_of_that_rank_keeps_more_of_the_teacher(n: int, t: int, d: int, seed: int) -> None:
    """What is kept is the best that d dimensions can hold (Eckart and Young), all of it where there are enough."""
    torch.manual_seed(seed)
    teacher, student = torch.randn(n, t), torch.randn(n, d)
    to_student = turned(teacher, student)
    assert to_student.shape == (t, d)
    kept = (teacher @ to_student).square().sum().item()
    singular = torch.linalg.svdvals(teacher.double())
    assert kept == pytest.approx(singular[:d].square().sum().item(), rel=1e-4)
    if d >= t:
        assert torch.allclose(teacher @ to_student @ to_student.T @ teacher.T, teacher @ teacher.T, atol=1e-3)


@given(d=st.integers(2, 8), seed=st.integers(0, 1000))
def test_a_student_that_has_the_teachers_embeddings_turned_is_right_already(d: int, seed: int) -> None:
    torch.manual_seed(seed)
    teacher = torch.randn(50, d)
    rotation = torch.linalg.qr(torch.randn(d, d)).Q
    assert torch.allclose(teacher @ turned(teacher, teacher @ rotation), teacher @ rotation, atol=1e-3)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A teacher of 48 dimensions and a student of 32, by chance unlike each other."""
    folders = []
    for name, width in (("teacher", 48), ("student", 32)):
        torch.manual_seed(width)
        save_plain("bert", tmp_path / name / "plain", "bert", max_length=32, spread=0.3, hidden_size=width)
        Embedder.load(tmp_path / name / "plain", precision="fp32").save(tmp_path / name / "model")
        folders.append(tmp_path / name / "model")
    return folders[0], folders[1]


def texts(path: Path, count: int) -> Path:
    draw = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS, 6))}) + "\n" for _ in range(count)]
    path.write_text("".join(lines))
    return path


def learn(models: tuple[Path, Path], data: Path, out: Path, steps: int, **more: Any) -> Embedder:
    settings = {
        "model": models[1], "data.train": data, "out": out, "objective.name": "embedding", "precision": "fp32",
        "objective.teacher": models[0], "trainer.max_steps": steps, "trainer.batch_size": 16, "trainer.lr": 5e-3,
        "trainer.save_every": 4, "evaluate": "false", **more,
    }  # fmt: skip
    kinvec.train(None, [f"{key}={value}" for key, value in settings.items()])
    return Embedder.load(out / "model", precision="fp32")


def agreement(model: Embedder, teacher: Embedder, asked: list[str]) -> float:
    """The correlation of both models' cosines between texts."""
    found = []
    for one in (model, teacher):
        vectors = one.encode(asked)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found.append((vectors @ vectors.T)[np.triu_indices(len(asked), 1)])
    return float(np.corrcoef(found)[0, 1])


def test_the_student_comes_to_see_texts_as_the_teacher_does(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """On texts that it was not trained on; the log shows the cosine with the teacher rising."""
    data = texts(tmp_path / "texts.jsonl", 200)
    tuned = learn(models, data, tmp_path / "run", 80)
    teacher, base = (Embedder.load(folder, precision="fp32") for folder in models)
    draw = np.random.default_rng(1)
    asked = [" ".join(draw.choice(WORDS, 6)) for _ in range(60)]
    assert agreement(tuned, teacher, asked) > agreement(base, teacher, asked) + 0.1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert np.mean([row["teacher_cosine"] for row in log[-8:]]) > log[0]["teacher_cosine"] + 0.03
    assert log[0]["loss"] == pytest.approx(2 - 2 * log[0]["teacher_cosine"], abs=1e-5)


def test_a_run_that_was_stopped_continues_towards_the_same_targets(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map is made of the untrained student, which a run that is continued opens again."""
    data = texts(tmp_path / "texts.jsonl", 60)
    learn(models, data, tmp_path / "whole", 9)
    step, done = kinvec.trainer._step, []

    def killed(*given: Any) -> Any:
        done.append(1)
        if len(done) == 6:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(kinvec.trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(models, data, tmp_path / "stopped", 9)
    learn(models, data, tmp_path / "stopped", 9)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_what_does_not_go_together_is_said(models: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match=r"needs a teacher; set objective\.teacher=MODEL"):
        make_objective(ObjectiveSettings(name="embedding"))
    with pytest.raises(RecipeError, match=r"objective\.dimensions: embedding has one target a text"):
        make_objective(ObjectiveSettings(name="embedding", teacher=str(models[0]), dimensions=[16]))
