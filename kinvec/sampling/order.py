"""The order in which an epoch goes through its rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Int


def steps_of(count: int, batch_size: int) -> int:
    """Batches of an epoch over `count` rows; the last may be smaller."""
    return -(-count // batch_size)


def drawn(count: int, seed: int, step: int, batch_size: int) -> Int[np.ndarray, " b"]:
    """Places of the rows of step `step`, counted from 0: each of `count` comes once an epoch, in an order made anew."""
    epoch, place = divmod(step, steps_of(count, batch_size))
    return _order(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=2)  # a batch needs the whole order of its epoch: shuffling it again at each step costs more than it
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order
