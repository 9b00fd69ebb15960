"""What is made ahead, in a thread, changes nothing: the same bytes, losses and errors, and at most one more is held."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from test_trainer import contrastive, log_of, same, source_of, weights_of
from tiny_models import WORDS

import kinvec.embedder
import kinvec.trainer
from kinvec import Embedder, machine
from kinvec.batching import shares
from kinvec.contracts import KinvecError
from kinvec.embedder import open_folder
from kinvec.mixing import alone
from kinvec.trainer import TrainerSettings, fit

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PATIENCE = 20  # seconds


def texts_of(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 30))) for _ in range(count)]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of eight texts, and all that is made ahead for a GPU is made ahead here."""

    def forced(make: Callable[[Any], Any], given: Iterable[Any], device: torch.device) -> Iterator[Any]:
        return machine.ahead(make, given, GPU)

    for module in (kinvec.embedder, kinvec.trainer):
        monkeypatch.setattr(module, "ahead", forced)
    monkeypatch.setattr(kinvec.embedder, "WINDOW", 8)


def test_the_next_is_made_while_the_caller_works_and_no_more_than_that() -> None:
    begun = [threading.Event() for _ in range(5)]

    def make(number: int) -> int:
        begun[number].set()
        return number * number

    found = []
    for number, made in enumerate(machine.ahead(make, range(5), GPU)):
        found.append(made)
        if number + 1 < len(begun):
            assert begun[number + 1].wait(PATIENCE), "nothing is made while the caller works"
        assert not any(event.is_set() for event in begun[number + 2 :])
    assert found == [0, 1, 4, 9, 16] and not threads()
    assert list(machine.ahead(make, [], GPU)) == []


def test_on_a_cpu_nothing_is_made_before_it_is_asked_for() -> None:
    asked: list[int] = []
    made = machine.ahead(asked.append, range(5), CPU)
    next(made)
    assert asked == [0] and not threads()


def test_an_error_comes_out_where_its_turn_is_and_whoever_stops_early_leaves_no_thread() -> None:
    found = []
    with pytest.raises(ZeroDivisionError):
        for made in machine.ahead(lambda number: 6 // (2 - number), range(5), GPU):
            found.append(made)
    assert found == [3, 6] and not threads()
    early = machine.ahead(lambda number: number, range(5), GPU)
    assert next(early) == 0 and threads()
    early.close()
    assert not threads()


def test_shares_are_in_order_whole_and_of_about_as_many_characters() -> None:
    for texts in (["a" * 5] * 8 + ["b" * 200] * 8, ["one"], [], ["", ""], texts_of(100)):
        for parts in (1, 2, 3, 7):
            cut = [texts[part] for part in shares(texts, parts)]
            assert len(cut) == parts and [text for part in cut for text in part] == texts
            sizes = [sum(map(len, part)) for part in cut]
            assert max(sizes) - min(sizes) <= 2 * max(map(len, texts), default=0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_vectors_have_the_same_bytes_and_windows_come_as_they_are_asked_for(tiny_folder: Path) -> None:
    model, texts = Embedder.load(tiny_folder, precision="fp32"), texts_of(45)
    windows = [texts[start : start + 8] for start in range(0, len(texts), 8)]
    plain = np.concatenate([model.encode(window, prompt="cell: ") for window in windows])
    assert np.array_equal(model.encode(texts, prompt="cell: "), plain)
    read: list[int] = []

    def reading() -> Iterator[list[str]]:
        for number, window in enumerate(windows):
            read.append(number)
            yield window

    for number, vectors in enumerate(model.encode_each(reading(), "cell: ")):
        assert np.array_equal(vectors, plain[8 * number : 8 * number + 8]) and read[-1] <= number + 1
    assert read == list(range(len(windows))) and not threads()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("wrong", [None, 5, b"bytes"])
def test_what_is_no_string_is_said_and_leaves_the_model_as_it_was(
    tiny_folder: Path, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would say it first, sometimes
    model, texts = open_folder(tiny_folder).train(), texts_of(45)
    with pytest.raises(KinvecError, match=f"texts must be strings, and here is one of type {type(wrong).__name__}"):
        model.encode([*texts, wrong])
    assert model.training and not threads()
    assert model.encode(texts).shape == (45, model.dimension)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_interrupted_encoding_leaves_no_thread(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts, packs = open_folder(tiny_folder).train(), texts_of(45), []

    def interrupted(pack: Any) -> np.ndarray:
        packs.append(pack)
        if len(packs) == 3:
            raise KeyboardInterrupt
        return Embedder._vectors(model, pack)

    monkeypatch.setattr(model, "_vectors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.encode(texts)
    assert len(packs) == 3 and model.training and not threads() and not torch.is_inference_mode_enabled()


def trained(folder: Path, pairs: Path, run: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a training with dropout, which is measured between its steps by encoding texts."""
    model = open_folder(folder)

    def evaluate(embedder: Embedder) -> dict[str, float]:
        return {"sum": float(np.abs(embedder.encode(texts_of(30))).sum())}

    settings = TrainerSettings(**{"batch_size": 8, "max_steps": 9, "save_every": 3, "eval_every": 2, **changes})
    run.mkdir(exist_ok=True)
    fit(model, alone(source_of(pairs), contrastive()), settings, run, evaluate, seed=3)
    return [row["loss"] for row in log_of(run)], weights_of(model)


def test_a_training_draws_its_steps_ahead_to_the_same_bits(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, request: pytest.FixtureRequest
) -> None:
    """Uninterrupted, and stopped after its fifth step and resumed."""
    losses, weights = trained(tiny_folder, tiny_pairs, tmp_path / "plain")
    request.getfixturevalue("as_on_a_gpu")
    again, moved = trained(tiny_folder, tiny_pairs, tmp_path / "ahead")
    assert again == losses and same(moved, weights) and len(set(losses)) == 9
    stop = StopAfter(5)
    request.getfixturevalue("monkeypatch").setattr(kinvec.trainer, "refuse_fault", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_folder, tiny_pairs, tmp_path / "resumed")
    stop.left = 100
    again, moved = trained(tiny_folder, tiny_pairs, tmp_path / "resumed")
    assert again == losses and same(moved, weights) and not threads()
    assert json.dumps(again)


class StopAfter:
    """Stands where a step's loss is looked at: a kill in the midst of a step."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
