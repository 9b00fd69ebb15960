"""A call that breaks its signature fails the test: the types, each shape, and the shapes among each other."""

from __future__ import annotations

from typing import Any

import beartype
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from type_checks import checked

from kinvec import quantising


def scaled(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, " d"], times: int = 1) -> Float[np.ndarray, "n d"]:
    return x * y if times == 1 else (x * y).repeat(times, 0)


def halves(x: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "n d"]]:
    return [scaled_checked(part, np.ones(x.shape[1])) for part in (x[::2], x[1::2])]


scaled_checked = checked(scaled, typechecker=beartype.beartype)
ROWS = np.ones((4, 3))


@pytest.mark.parametrize(
    "wrong",
    [(ROWS, np.ones(4)), (ROWS[0], np.ones(3)), (ROWS.astype(int), np.ones(3)), (ROWS, np.ones(3), "1"),
     (ROWS, np.ones(3), 2)],
    ids=["of one another", "of one", "numbers", "type", "result"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(wrong: tuple[Any, ...]) -> None:
    assert scaled_checked(ROWS, np.ones(3)).shape == (4, 3)
    with pytest.raises(BeartypeCallHintViolation):
        scaled_checked(*wrong)


def test_each_call_has_shapes_of_its_own() -> None:
    """Half as many rows fit within a call; they do not fit what that call returns."""
    with pytest.raises(BeartypeCallHintViolation, match="return"):
        checked(halves, typechecker=beartype.beartype)(ROWS)


def test_kinvec_itself_is_checked() -> None:
    ranges = quantising.ranges_of([ROWS.astype(np.float32)])
    for vectors in (ROWS[:, :2].astype(np.float32), ROWS, None):
        with pytest.raises(BeartypeCallHintViolation):
            quantising.to_int8(vectors, ranges)  # type: ignore[arg-type]
