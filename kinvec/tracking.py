"""Experiment trackers. `log.jsonl` is always there; these are extras for those who keep their runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError

Track = Callable[[Mapping[str, Any]], None]


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log row, dev metrics as `dev/nDCG@10`."""
    flat = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return flat | {f"dev/{key}": value for key, value in row.get("dev", {}).items()}


def _tensorboard(run: Path) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))

    def track(row: Mapping[str, Any]) -> None:
        for key, value in _numbers(row).items():
            writer.add_scalar(key, value, row["step"])
        writer.flush()

    return track


def _wandb(run: Path) -> Track:
    import wandb

    wandb.init(project="kinvec", name=run.name, id=run.name, resume="allow", dir=str(run))
    return lambda row: wandb.log(_numbers(row), step=row["step"])


def _trackio(run: Path) -> Track:
    import trackio

    trackio.init(project="kinvec", name=run.name, resume="allow")
    return lambda row: trackio.log(_numbers(row), step=row["step"])


TRACKERS: dict[str, Callable[[Path], Track]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def open_trackers(names: list[str], run: Path) -> list[Track]:
    """A function for each tracker that takes a log row. Raises `KinvecError` when its package is not installed."""
    found = []
    for name in names:
        try:
            found.append(TRACKERS[name](run))
        except ImportError as error:
            raise KinvecError(
                f"trainer.trackers: {name} is not installed ({error}); pip install kinvec[track]"
            ) from None
    return found
