"""The order in which an epoch goes through its rows."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def steps_of(count: int, batch_size: int) -> int:
    """Batches of an epoch over `count` rows; the last may be smaller."""
    return -(-count // batch_size)


def drawn(count: int, seed: int, step: int, batch_size: int) -> Int[np.ndarray, " b"]:
    """Places of the rows of step `step`, counted from 0: each of `count` comes once an epoch, in an order made anew."""
    epoch, place = divmod(step, steps_of(count, batch_size))
    return _order(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]


_orders: dict[tuple[int, int], tuple[int, Int[np.ndarray, " n"]]] = {}  # of each data set, the epoch that it is in


def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The epoch's order, kept: every batch needs all of it, and shuffling again would cost more than the batch."""
    if _orders.get((count, seed), (None,))[0] != epoch:
        _orders[count, seed] = epoch, np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[count, seed][1]
