"""Whatever bytes stand in any file that kinvec reads: data or one sentence. What is promised is in fuzz/targets.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import READERS, attempt, damaged, targets

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = {"run": 4, "seeds": 4, "archive": 3}  # slow ones; of the others:
OTHERS = 8


@pytest.mark.parametrize("reader", READERS)
def test_damage_is_data_or_one_sentence(reader: str, good: Path, tmp_path: Path) -> None:
    names = [name for name in targets(good) if name.startswith(f"{reader}/")]
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

    @settings(max_examples=EXAMPLES.get(reader, OTHERS), deadline=None, database=None, suppress_health_check=checks)
    @given(name=st.sampled_from(names), seed=st.integers(0, 2**32), noise=st.none() | st.binary(max_size=200))
    def check(name: str, seed: int, noise: bytes | None) -> None:
        raw = damaged((good / name).read_bytes(), random.Random(seed)) if noise is None else noise
        attempt(good, name, raw, tmp_path / "work")

    check()


@pytest.mark.parametrize("reader", READERS)
def test_what_is_damaged_was_good(reader: str, good: Path, tmp_path: Path) -> None:
    """The readers do read these folders: a test of refusals alone would pass on anything."""
    name = next(name for name in targets(good) if name.startswith(f"{reader}/"))
    said = attempt(good, name, (good / name).read_bytes(), tmp_path / "work")
    assert "" in said, said
