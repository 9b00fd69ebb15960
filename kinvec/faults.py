"""Numeric faults in training: the batch of a loss that is no number is kept, and losses that jump are told.

A loss is a spike when it lies more than `DEVIATIONS` robust standard deviations above the median of the last `WINDOW`
losses of the same data sets. The deviation is the larger of 1.4826 × the median absolute deviation (Hampel 1974) and
1.2533 × the mean one, which both are the standard deviation of a normal distribution; the second does not vanish where
more than half of the losses are equal, as a margin's are once they are 0. Ten of them: never reached by normal noise,
and by exponential noise, which is as skewed as losses near 0 get, once in some ten thousand steps, and not once in the
2,632 steps of 23 trainings (docs/reliability.md).
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kinvec.console import say
from kinvec.contracts import KinvecError
from kinvec.files import write_json
from kinvec.files.reading import read_log
from kinvec.sampling import Batch

FAULT = "fault.json"
WINDOW = 100  # losses that are looked back at
FEWEST = 20  # before so many are known, none is called a spike
DEVIATIONS = 10.0
LEAST = 0.01  # a deviation is at least this share of the median: equal losses differ in their last bits
SHOWN = 8  # rows that a message names


def refuse_fault(run: Path, step: int, batch: Batch, found: Mapping[str, float]) -> None:
    """Raise `KinvecError` unless the step's loss and gradient norm are numbers; the batch is then in `fault.json`.

    `found` has `loss`, `grad_norm`, `lr`, and whatever else is worth keeping.
    """
    if all(math.isfinite(found[key]) for key in ("loss", "grad_norm")):
        return
    plain = {key: value if math.isfinite(value) else str(value) for key, value in found.items()}
    path = write_json(run / FAULT, {"step": step, **plain, **_rows(batch)})
    raise KinvecError(
        f"the loss is {found['loss']} and its gradient's norm {found['grad_norm']} at step {step} (rows "
        f"{_shown(batch)}); the whole batch is in {path}, and the last checkpoint before it is kept: look at these "
        "rows, lower trainer.lr or raise objective.temperature, and train with --force"
    )


class Spikes:
    """The last losses of every combination of data sets, begun from the log, so that a resumed run sees the same."""

    def __init__(self, log: Path) -> None:
        self._losses: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=WINDOW))
        self._high: set[str] = set()
        for row in read_log(log):
            self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        of = " ".join(sorted(row.get("sets", ())))
        self._losses[of].append(row["loss"])
        (self._high.add if "spike" in row else self._high.discard)(of)

    def told(self, row: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        """Of a spike what the log is to say, else nothing; one that lasts for several steps is said once."""
        of = " ".join(sorted(row.get("sets", ())))
        median, limit = limit_of(np.array(self._losses[of]))
        spike = {"median": median, "limit": limit, **_rows(batch)} if row["loss"] > limit else None
        if spike and of not in self._high:
            say(
                f"step {row['step']:,}: the loss jumps to {row['loss']:.4g}; of the last {len(self._losses[of])} the "
                f"median was {median:.4g}, and above {limit:.4g} is a spike (rows {_shown(batch)}); log.jsonl has all"
            )
        added = {"spike": spike} if spike else {}
        self._take({**row, **added})
        return added


def limit_of(losses: np.ndarray) -> tuple[float, float]:
    """(median, what a loss has to exceed to be a spike); infinite where too few losses are known."""
    if len(losses) < FEWEST:
        return math.nan, math.inf
    median = float(np.median(losses))
    apart = np.abs(losses - median)
    deviation = max(1.4826 * float(np.median(apart)), 1.2533 * float(apart.mean()), LEAST * abs(median))
    return median, median + DEVIATIONS * deviation


def _rows(batch: Batch) -> dict[str, list[str]]:
    """The ids of a batch's rows and, where these are not that already, their places in the files."""
    where = list(getattr(batch, "where", ()))
    return {"ids": list(batch.ids), **({"where": where} if where else {})}


def _shown(batch: Batch) -> str:
    return ", ".join(batch.ids[:SHOWN]) + ", …" * (len(batch.ids) > SHOWN)
