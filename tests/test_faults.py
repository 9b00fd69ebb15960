"""Numeric faults: a loss that is no number keeps its batch and the last good checkpoint; a loss that jumps is told."""

from __future__ import annotations

import json
import math
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from command_line import FORKS, WAIT
from test_trainer import log_of, run_fit
from tiny_models import WORDS, save_plain
from torch import Tensor

from kinvec import checkpoint
from kinvec.contracts import KinvecError
from kinvec.faults import FEWEST, WINDOW, Spikes, limit_of
from kinvec.machine import out_of_memory
from kinvec.objectives import Objective, ObjectiveSettings, make_objective

pytestmark = pytest.mark.usefixtures("one_thread")


def contrastive_but(change: Callable[[Tensor], Tensor], at: int) -> Objective:
    """The contrastive objective, with its loss changed in call number `at`, counted from 1."""
    from dataclasses import replace

    real, calls = make_objective(ObjectiveSettings()), iter(range(1, 10**6))

    def loss(*given: Any) -> Tensor:
        found = real.loss(*given)
        return change(found) if next(calls) == at else found

    return replace(real, loss=loss)


def poisoned(loss: Tensor) -> Tensor:
    """A loss that is a number, whose gradient is none: the square root of 0 has an infinite slope."""
    return loss + torch.sqrt((loss - loss.detach()).abs())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda loss: loss * math.inf, "the loss is inf"),
        (poisoned, "gradient's norm nan at step 5"),
    ],
)
def test_the_batch_of_a_loss_that_is_no_number_is_kept(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, change: Any, what: str
) -> None:
    """Ids, places in the file, step and rate; the checkpoints are whole, and once mended the run goes on to the end."""
    calm, _ = run_fit(tmp_path / "calm", tiny_folder, tiny_pairs, save_every=2, keep=5)
    run = tmp_path / "run"
    with pytest.raises(KinvecError, match=what) as raised:
        run_fit(run, tiny_folder, tiny_pairs, None, contrastive_but(change, 5), save_every=2, keep=5)
    assert f"the whole batch is in {run / 'fault.json'}" in str(raised.value) and "trainer.lr" in str(raised.value)
    told = json.loads((run / "fault.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN in it
    assert told["step"] == 5 and told["lr"] == 1e-3 and {"nan", "inf"} & {told["loss"], told["grad_norm"]}
    assert len(told["ids"]) == len(set(told["ids"])) == 8
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    for identity, place in zip(told["ids"], told["where"], strict=True):
        file, _, line = place.rpartition(":")
        assert file == str(tiny_pairs) and rows[int(line) - 1]["query_id"] == identity
    assert [step for step, _ in checkpoint.steps(run / "checkpoints")] == [2, 4]
    resumed, _ = run_fit(run, tiny_folder, tiny_pairs, save_every=2, keep=5)
    assert all(torch.equal(a, b) for a, b in zip(calm.parameters(), resumed.parameters(), strict=True))


def test_a_loss_that_jumps_is_logged_and_said_once(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 24 alone, in the log with its rows; the same where the run was stopped just before."""
    for name, ends in (("whole", (26,)), ("stopped", (23, 26))):
        for end in ends:
            at = 24 if len(ends) == 1 else 1 if end == 26 else 10**5
            run_fit(
                tmp_path / name, tiny_folder, tiny_pairs, None, contrastive_but(lambda loss: loss * 50, at),
                max_steps=end, save_every=23,
            )  # fmt: skip
        said = capsys.readouterr().err
        assert said.count("the loss jumps to") == 1 and "step 24: the loss jumps to" in said
    whole, stopped = (log_of(tmp_path / name) for name in ("whole", "stopped"))
    assert [row["step"] for row in whole if "spike" in row] == [24]
    spike = whole[23]["spike"]
    assert spike == stopped[23]["spike"]
    assert spike["median"] < spike["limit"] < whole[23]["loss"]
    assert len(spike["ids"]) == len(spike["where"]) == 4  # the last of an epoch of 60 rows


def batch(*ids: str) -> Any:
    return SimpleNamespace(queries=ids, documents=(), ids=list(ids))


def spikes_of(losses: list[float], tmp_path: Path, sets: list[str] | None = None) -> list[int]:
    watched, found = Spikes(tmp_path / "absent.jsonl"), []
    for step, loss in enumerate(losses, 1):
        of = {"sets": {sets[step - 1]: 8}} if sets else {}
        if watched.told({"step": step, "loss": loss, **of}, batch("a")):
            found.append(step)
    return found


@pytest.mark.parametrize(
    "noise",
    [
        lambda rng: rng.normal(2.0, 0.3, 3000),
        lambda rng: rng.gamma(4.0, 0.1, 3000),
        lambda rng: np.linspace(4.0, 0.5, 3000) + rng.normal(0, 0.1, 3000),
        lambda rng: np.full(3000, 0.25) + rng.normal(0, 1e-9, 3000),
        lambda rng: np.zeros(3000),
    ],
    ids=["normal", "skewed", "falling", "constant", "zero"],
)
def test_noise_is_no_spike(noise: Any, tmp_path: Path) -> None:
    assert spikes_of(noise(np.random.default_rng(0)).tolist(), tmp_path) == []


def test_what_a_spike_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm = np.random.default_rng(0).normal(1.0, 0.05, 200).tolist()
    assert limit_of(np.array(calm[: FEWEST - 1]))[1] == math.inf
    jumps = calm[:]
    jumps[5] = jumps[120] = jumps[121] = jumps[150] = 3.0  # the first before enough is known
    assert spikes_of(jumps, tmp_path) == [121, 122, 151]
    said = [line for line in capsys.readouterr().err.splitlines() if "jumps" in line]
    assert [line.split(":")[0] for line in said] == ["step 121", "step 151"]  # two steps in a row are one spike
    assert spikes_of([*calm, *[3.0] * 200], tmp_path)[-1] <= 200 + WINDOW // 2 + 1  # a new level becomes the usual one


def test_each_data_set_has_its_own_usual_loss(tmp_path: Path) -> None:
    losses = [4.0 + i % 7 / 50 if i % 2 else 0.1 + i % 5 / 500 for i in range(200)]
    names = ["far" if i % 2 else "near" for i in range(200)]
    assert spikes_of(losses, tmp_path, names) == []
    losses[150] = 1.0  # usual for neither: low for the one, high for the other whose turn it is
    assert spikes_of(losses, tmp_path, names) == [151]


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive."), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_how_libraries_say_that_memory_has_ended(error: Exception, memory: bool) -> None:
    """What oneDNN says came, once in many times, from the test below."""
    assert out_of_memory(error) == memory


def _train_within(more: int, places: tuple[Path, Path, Path], settings: dict[str, Any]) -> None:
    """Train where memory ends so many bytes above what is taken now; exit with the number of halvings."""
    torch.set_num_threads(1)
    most = psutil.Process().memory_info().vms + more if more else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    _, found = run_fit(*places, **settings)
    os._exit(len(found["halvings"]))


def test_where_memory_really_ends_the_chunk_is_halved_and_the_loss_is_the_same(tmp_path: Path) -> None:
    """A process that may take 400 MiB more; one chunk of all texts would need 1 GiB for its graph."""
    draw = random.Random(0)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for _ in range(200):
            query, document = (" ".join(draw.choices(WORDS, k=count)) for count in (40, 60))
            file.write(json.dumps({"query": query, "pos_doc": document}) + "\n")
    save_plain("bert", tmp_path / "model", "bert", max_length=64, hidden_size=64, intermediate_size=2048)
    settings: dict[str, Any] = {"batch_size": 200, "max_steps": 1, "dropout": 0.0, "chunk_tokens": 1 << 16}
    settings["memory_budget"] = "1B"  # no graph is kept from chunk to chunk

    def halvings(name: str, more: int) -> int:
        """In a process of its own, new, so that it holds nothing that earlier tests have left."""
        places = (tmp_path / name, tmp_path / "model", tmp_path / "pairs.jsonl")
        process = FORKS.Process(target=_train_within, args=(more, places, settings))
        process.start()
        process.join(WAIT)
        assert process.exitcode is not None
        return process.exitcode

    assert halvings("calm", 0) == 0 and 1 <= halvings("tight", 400 << 20) < 10
    losses, expected = ([row["loss"] for row in log_of(tmp_path / name)] for name in ("tight", "calm"))
    assert losses == pytest.approx(expected, rel=1e-5)
