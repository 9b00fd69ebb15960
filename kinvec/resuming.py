"""The state of a training between two steps: what a checkpoint holds of it, and how a run goes on from one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinvec import checkpoint, distributed
from kinvec.backbone import trainable
from kinvec.console import say
from kinvec.contracts import KinvecError
from kinvec.embedder import Embedder
from kinvec.files import write_lines
from kinvec.files.reading import read_log


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors."""

    step: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    best: list[dict[str, Any]] = field(default_factory=list)  # step and score of those kept, best first
    stale: int = 0
    chunk_tokens: int = 0
    halvings: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0


Save = Callable[[Embedder, torch.optim.Optimizer, Progress], None]


@contextmanager
def saving(run: Path, keep: int) -> Iterator[Save]:
    """`save(embedder, optimizer, state)` copies all that a checkpoint holds and writes it while the training goes on.

    One at a time; when the block is left, the last one is written. Of the older ones the best stay, and the newest,
    `keep` with this one. Rank 0 writes, or all processes do where the weights are spread over them. What goes wrong is
    raised by the next `save`, or at the end.
    """
    pending: list[Future[None]] = []

    def finish() -> None:
        while pending:
            pending.pop().result()

    def save(embedder: Embedder, optimizer: torch.optim.Optimizer, state: Progress) -> None:
        finish()
        tensors = _tensors(embedder, optimizer)
        if distributed.rank() == 0 or any(map(distributed.sharded, tensors.values())):
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            pending.append(pool.submit(_write, run / "checkpoints", copies, deepcopy(state), keep))

    with ThreadPoolExecutor(1) as pool:
        try:
            yield save
        finally:
            finish()


def _write(folder: Path, tensors: Mapping[str, Tensor], state: Progress, keep: int) -> None:
    older = [step for step, _ in checkpoint.steps(folder) if step < state.step]  # later ones were damaged
    newest = older[-(keep - 1) :] if keep > 1 else []
    kept = {*newest, state.best_step, *(one["step"] for one in state.best)}
    score = state.best_score if math.isfinite(state.best_score) else None
    checkpoint.save(folder, state.step, tensors, vars(state) | {"best_score": score}, kept)


def resume(run: Path, embedder: Embedder, optimizer: torch.optim.Optimizer, chunk_tokens: int) -> Progress:
    """Fill weights and moments from the newest checkpoint of the run, and say where it was; from none, the start."""
    found = _newest_whole(run / "checkpoints")
    if found is None:
        return Progress(chunk_tokens=chunk_tokens)
    path, values = found
    values["best_score"] = -math.inf if values["best_score"] is None else values["best_score"]
    _allocate(optimizer, trainable(embedder), path)
    tensors = _tensors(embedder, optimizer)
    checkpoint.load_into(path, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    say(f"continuing after step {values['step']}")
    return Progress(**values)


def _newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, as is the best that it tells of, and its values. Says what is damaged."""
    for step, path in reversed(list(checkpoint.steps(folder))):
        try:
            values = checkpoint.read_values(path)
            if values["best_step"] not in (0, step):
                checkpoint.read_values(checkpoint.place(folder, values["best_step"]))
            return path, values
        except KinvecError as error:
            say(f"warning: {error}")
    return None


def restore_best(run: Path, embedder: Embedder, state: Progress) -> None:
    """Fill the weights from the best checkpoint of the run."""
    distributed.wait()  # until it is written
    path = checkpoint.place(run / "checkpoints", state.best_step)
    checkpoint.read_values(path)
    checkpoint.load_into(path, _tensors(embedder, None))


def keep_log(path: Path, step: int) -> None:
    """Drop the log's lines after `step`, so that every step is there once; a half-written last line goes too.

    The file is written anew, or empty where there is none: a link in its place is replaced, and not written through.
    """
    write_lines(path, (json.dumps(row) for row in read_log(path) if row["step"] <= step))


def _tensors(embedder: Embedder, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything of a checkpoint that is a tensor, by name; what is frozen comes from the base model."""
    tensors = {f"model.{name}": parameter.data for name, parameter in trainable(embedder)}
    if optimizer is None:
        return tensors
    for name, parameter in trainable(embedder):
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if embedder.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _allocate(optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Give AdamW its moments, for the checkpoint to fill; a parameter that never had a gradient has none there."""
    stored = checkpoint.names(path)
    for name, parameter in parameters:
        if f"optimizer.{name}.step" in stored:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
