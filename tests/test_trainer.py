"""Training: follows the peer's loss, resumes to the bit after any kill, and does what the recipe says."""

from __future__ import annotations

import argparse
import decimal
import json
import logging
import math
import os
import pathlib
import random
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MINILM
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_models import save_plain
from torch import Tensor

import kinvec
import kinvec.trainer
from kinvec import Embedder, checkpoint
from kinvec.backbone import find_model
from kinvec.contracts import KinvecError
from kinvec.embedder import open_folder
from kinvec.files import open_data
from kinvec.mixing import alone
from kinvec.objectives import Objective, ObjectiveSettings, make_objective
from kinvec.sampling import DataSettings, PairSource, pair_source
from kinvec.trainer import TrainerSettings, fit, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


def source_of(path: Path, **changes: Any) -> PairSource:
    table = open_data(path)
    return pair_source(table, np.arange(len(table)), DataSettings(**changes), seed=0)


def contrastive(**changes: Any) -> Objective:
    return make_objective(ObjectiveSettings(**changes))


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights_of(embedder: Embedder) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in embedder.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the peer ----


def short_real_texts(count: int) -> list[dict[str, str]]:
    """(first line, rest) of docstrings of Python's own library."""
    found: dict[str, str] = {}  # document → query, so that both are there once
    for home in (
        argparse,
        decimal.Decimal,
        json,
        logging,
        math,
        os,
        pathlib.Path,
        random.Random,
        shutil,
        statistics,
        str,
    ):
        for _, thing in sorted(vars(home).items()):
            text = getattr(thing, "__doc__", None)
            first, _, rest = text.strip().partition("\n") if isinstance(text, str) else ("", "", "")
            if len(first) > 20 and len(rest.split()) > 5 and first not in found.values():
                found.setdefault(" ".join(rest.split()), first)
    assert len(found) >= count
    return [{"query": query, "pos_doc": document} for document, query in list(found.items())[:count]]


@pytest.mark.slow
def test_our_loss_follows_sentence_transformers_for_thirty_steps(tmp_path: Path) -> None:
    """Real weights, float32, no dropout, the same batches, AdamW with linear warm-up and decay."""
    from transformers import get_linear_schedule_with_warmup
    from transformers.trainer_pt_utils import get_parameter_names

    steps, size, rate, warmup, length = 30, 8, 5e-5, 5, 16
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short_real_texts(120)))
    source = source_of(tmp_path / "pairs.jsonl")
    torch.manual_seed(0)
    peer = SentenceTransformer(find_model(MINILM), device="cpu")
    peer.max_seq_length = length
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    decayed = [name for name in get_parameter_names(peer, [torch.nn.LayerNorm]) if "bias" not in name]
    named = [(name, p) for name, p in peer.named_parameters() if "pooler" not in name]
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": 0.01},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    loss, theirs = MultipleNegativesRankingLoss(peer, scale=20.0), []
    peer.train()
    for step in range(steps):
        batch = source.batch(step, size)
        assert not len(batch.excluded)  # the peer masks nothing
        value = loss([peer.preprocess(batch.queries), peer.preprocess(batch.documents)], None)
        theirs.append(value.item())
        value.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    settings = TrainerSettings(
        batch_size=size, max_steps=steps, lr=rate, warmup=warmup, dropout=0.0, weight_decay=0.01, clip=1.0
    )
    fit(open_folder(MINILM, length), alone(source, contrastive(temperature=0.05)), settings, tmp_path)
    ours = [row["loss"] for row in log_of(tmp_path)]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3
    assert min(theirs) < 0.6 * theirs[0]  # something was learnt on the way


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (5, 37), (0.1, 37), (0.25, 8)])
def test_the_learning_rate_is_that_of_transformers(name: Any, warmup: float, total: int) -> None:
    import transformers

    warm = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    if name == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, warm)
    else:
        schedule = getattr(transformers, f"get_{name}_schedule_with_warmup")(optimizer, warm, total)
    settings = TrainerSettings(lr=3e-4, warmup=warmup, schedule=name)
    for step in range(total):
        assert learning_rate(step, total, settings) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    ends = TrainerSettings(lr=1.0, warmup=warmup, schedule=name, min_lr=0.1)
    assert learning_rate(total, total, ends) == pytest.approx(1.0 if name == "constant" else 0.1)


# ---- the loop, with what it is handed ----

FAST = {"batch_size": 8, "lr": 1e-3, "warmup": 0.0, "schedule": "constant"}


def run_fit(
    folder: Path, model: Path, pairs: Path, evaluate: Any = None, objective: Objective | None = None, **settings: Any
) -> tuple[Embedder, dict[str, Any]]:
    """Train the tiny model; the embedder and the summary."""
    folder.mkdir(exist_ok=True)
    embedder = open_folder(model)
    chosen = TrainerSettings(**(FAST | {"max_steps": 6} | settings))
    found = fit(embedder, alone(source_of(pairs), objective or contrastive()), chosen, folder, evaluate, seed=1)
    return embedder, found


def test_training_learns_and_the_log_says_everything(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    embedder, found = run_fit(tmp_path, tiny_folder, tiny_pairs, max_steps=60, lr=3e-3)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 61)) and found["steps"] == 60
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:8], rows[-8:]))
    assert last < 0.7 * first
    for key in ("loss", "lr", "grad_norm", "tokens", "tokens_per_s", "padding_share", "memory_gb", "eta_s", "epoch"):
        assert all(math.isfinite(row[key]) for row in rows), key
    assert rows[7]["epoch"] == 1.0 and rows[-1]["eta_s"] == 0.0
    assert not embedder.encode(["a gene"]).any() == np.nan and found["best_step"] == 60


def test_a_padded_architecture_trains_too(tmp_path: Path, tiny_pairs: Path) -> None:
    save_plain("mpnet", tmp_path / "mpnet", "roberta")
    _, found = run_fit(tmp_path / "run", tmp_path / "mpnet", tiny_pairs)
    assert found["steps"] == 6 and all(0 < row["padding_share"] < 1 for row in log_of(tmp_path / "run"))


def test_memory_budget_changes_no_bit(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    """Chunks of the same tokens, all kept or all recomputed, with dropout."""
    runs = {}
    for budget in ("8GiB", "150KB", "1B"):
        embedder, _ = run_fit(tmp_path / budget, tiny_folder, tiny_pairs, chunk_tokens=64, memory_budget=budget)
        runs[budget] = weights_of(embedder)
    assert same(runs["8GiB"], runs["1B"]) and same(runs["8GiB"], runs["150KB"])


def test_bf16_autocast_trains_close_to_float32(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        embedder = open_folder(tiny_folder)
        embedder.precision = precision
        settings = TrainerSettings(**(FAST | {"max_steps": 3, "dropout": 0.0, "batch_size": 4}))
        (tmp_path / precision).mkdir()
        fit(embedder, alone(source_of(tiny_pairs), contrastive()), settings, tmp_path / precision, seed=1)
        losses[precision] = [row["loss"] for row in log_of(tmp_path / precision)]
        assert next(embedder.parameters()).dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05) and losses["bf16"] != losses["fp32"]


def test_dev_evaluation_changes_nothing_in_training(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    """An evaluator that encodes, draws numbers and calls every model better, after every step or never."""
    calls: list[int] = []

    def evaluate(model: Embedder) -> dict[str, float]:
        calls.append(len(calls))
        torch.rand(100), model.encode(["gene expression"])
        return {"nDCG@10": 0.1 + 0.01 * len(calls)}

    often, _ = run_fit(tmp_path / "often", tiny_folder, tiny_pairs, evaluate, eval_every=1)
    never, found = run_fit(tmp_path / "never", tiny_folder, tiny_pairs, evaluate, eval_every=0)
    assert len(calls) == 6 and same(weights_of(often), weights_of(never))
    assert [row["loss"] for row in log_of(tmp_path / "often")] == [row["loss"] for row in log_of(tmp_path / "never")]
    assert all("dev" in row for row in log_of(tmp_path / "often")) and found["best_score"] is None


def test_early_stopping_keeps_the_best_by_dev(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    scores = iter([0.1, 0.5, 0.3, 0.5, 0.9, 0.9])  # the fourth is no better than the second
    seen: dict[int, dict[str, Tensor]] = {}

    def evaluate(model: Embedder) -> dict[str, float]:
        seen[2 * (len(seen) + 1)] = weights_of(model)
        return {"nDCG@10": next(scores), "other": 1.0}

    settings: dict[str, Any] = {"max_steps": 40, "eval_every": 2, "early_stop": 2, "save_every": 3, "keep": 1}
    embedder, found = run_fit(tmp_path, tiny_folder, tiny_pairs, evaluate, **settings)
    assert (found["steps"], found["best_step"], found["best_score"]) == (8, 4, 0.5)
    assert same(weights_of(embedder), seen[4]) and not same(seen[4], seen[8])
    assert [step for step, _ in checkpoint.steps(tmp_path / "checkpoints")] == [4, 8]
    again, repeated = run_fit(tmp_path, tiny_folder, tiny_pairs, evaluate, **settings)
    assert repeated["steps"] == 8 and same(weights_of(again), seen[4])  # a finished training is not trained on


def test_the_best_checkpoints_are_kept_beside_the_newest(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    """Two of the best, of equals the first; also by a run that was stopped after step 6."""
    scores = {2: 0.4, 4: 0.1, 6: 0.5, 8: 0.3, 10: 0.4, 12: 0.2}
    settings: dict[str, Any] = {"eval_every": 2, "save_every": 3, "keep": 1, "keep_best": 2}

    def kept(folder: Path) -> list[int]:
        return [step for step, _ in checkpoint.steps(folder / "checkpoints")]

    for folder, ends in (("whole", (12,)), ("stopped", (6, 12))):
        seen = iter(range(2, 14, 2))

        def evaluate(model: Embedder, seen: Any = seen) -> dict[str, float]:
            return {"nDCG@10": scores[next(seen)]}

        for end in ends:
            _, found = run_fit(tmp_path / folder, tiny_folder, tiny_pairs, evaluate, max_steps=end, **settings)
            assert end == 12 or kept(tmp_path / folder) == [2, 6]
        assert kept(tmp_path / folder) == [2, 6, 12] and found["best_step"] == 6
        assert found["best"] == [{"step": 6, "score": 0.5}, {"step": 2, "score": 0.4}]
        checkpoint.read_values(tmp_path / folder / "checkpoints" / "step-00000002")  # whole, as its checksums say


@pytest.mark.parametrize(("settings", "said"), [
    ({"warmup": 6}, "warning: warm-up takes 6 of 6 steps, so the learning rate never reaches trainer.lr; lower"),
    ({"warmup": 100}, "warning: warm-up takes 100 of 6 steps"),
    ({"warmup": 5}, None),
    ({"schedule": "linear", "min_lr": 1.0}, "warning: trainer.min_lr is a share of the peak, and at 1 the learning"),
    ({"schedule": "constant", "min_lr": 1.0}, None),
])  # fmt: skip
def test_a_schedule_that_collapses_is_said(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, capsys: Any, settings: dict[str, Any], said: str | None
) -> None:
    run_fit(tmp_path, tiny_folder, tiny_pairs, **settings)
    told = capsys.readouterr().err
    assert said in told if said else "warning" not in told
    if settings.get("warmup", 0) >= 6:
        assert max(row["lr"] for row in log_of(tmp_path)) < FAST["lr"]


def oom_at(calls: set[int]) -> Callable[[Embedder], Callable[..., Tensor]]:
    """A stand-in for the trainer's embedding call that is out of memory at the given calls."""
    real, count = kinvec.trainer._embed, iter(range(10**6))

    def make(embedder: Embedder) -> Callable[..., Tensor]:
        embed = real(embedder)

        def call(texts: Any) -> Tensor:
            if next(count) in calls:
                raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
            return embed(texts)

        return call

    return make


@pytest.mark.parametrize("budget", ["8GiB", "1B"])
def test_out_of_memory_halves_the_chunk_and_goes_on(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    settings: dict[str, Any] = {"chunk_tokens": 256, "dropout": 0.0, "memory_budget": budget, "max_steps": 4}
    calm, whole = run_fit(tmp_path / "calm", tiny_folder, tiny_pairs, **settings)
    monkeypatch.setattr(kinvec.trainer, "_embed", oom_at({4, 5}))
    tight, found = run_fit(tmp_path / "tight", tiny_folder, tiny_pairs, **settings)
    assert whole["halvings"] == [] and [h["chunk_tokens"] for h in found["halvings"]] == [128, 64]
    losses, expected = ([row["loss"] for row in log_of(tmp_path / name)] for name in ("tight", "calm"))
    assert losses == pytest.approx(expected, rel=1e-5)
    for key, value in weights_of(calm).items():
        torch.testing.assert_close(weights_of(tight)[key], value, atol=5e-4, rtol=0)
    newest = checkpoint.latest(tmp_path / "tight" / "checkpoints")
    assert newest and checkpoint.read_values(newest)["chunk_tokens"] == 64  # the plan is part of the checkpoint


def test_out_of_memory_replays_the_same_dropout(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks of the second attempt are those of a run that began with them: equal from that step on."""
    small, _ = run_fit(tmp_path / "small", tiny_folder, tiny_pairs, chunk_tokens=64, max_steps=2)
    monkeypatch.setattr(kinvec.trainer, "_embed", oom_at({3}))
    tight, found = run_fit(tmp_path / "tight", tiny_folder, tiny_pairs, chunk_tokens=128, max_steps=2)
    assert found["halvings"] == [{"step": 1, "chunk_tokens": 64}]
    assert same(weights_of(small), weights_of(tight))


def test_out_of_memory_for_good_is_one_clear_sentence(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinvec.trainer, "_embed", oom_at(set(range(1, 10**5))))
    with pytest.raises(
        KinvecError, match=r"out of memory at step 1 even in chunks of \d\d tokens; lower data\.max_length"
    ):
        run_fit(tmp_path, tiny_folder, tiny_pairs)


def test_tensorboard_gets_every_step(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_fit(tmp_path, tiny_folder, tiny_pairs, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([r["loss"] for r in log_of(tmp_path)])


def test_a_tracker_that_is_not_installed_is_said(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(KinvecError, match=r"trackio is not installed .*pip install kinvec\[track\]"):
        run_fit(tmp_path, tiny_folder, tiny_pairs, trackers=["trackio"])
