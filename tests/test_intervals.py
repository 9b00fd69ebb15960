"""Intervals cover and tests hold their level, in a small simulation; benchmarks/intervals.py is the large one."""

from __future__ import annotations

import json
import math

import intervals
import numpy as np
import pytest

from kinvec import metrics

PAIRS = np.array(json.loads(intervals.POPULATION.read_text("utf-8"))["before_after"])
CHANGE = PAIRS[:, 1] - PAIRS[:, 0]


def near(rate: float, nominal: float, draws: int) -> bool:
    """Within four standard errors of so many draws."""
    return abs(rate - nominal) <= 4 * math.sqrt(nominal * (1 - nominal) / draws)


@pytest.mark.parametrize("n", [50, 300])
def test_intervals_of_means_cover(n: int) -> None:
    generator, draws = np.random.default_rng(n), 3000
    for truth, sample in (
        (PAIRS[:, 1].mean(), intervals.drawn(PAIRS[:, 1], generator)),
        (0.0, intervals.swapped(CHANGE, generator)),  # no difference
    ):
        low, high = np.array([metrics.mean_interval(sample(n)) for _ in range(draws)]).T
        assert near(float(np.mean((low <= truth) & (truth <= high))), 0.95, draws)


def test_of_skewed_gains_they_claim_no_more_than_there_is() -> None:
    generator, draws = np.random.default_rng(5), 3000
    for n in (50, 300):
        low, high = np.array([metrics.mean_interval(generator.choice(CHANGE, n)) for _ in range(draws)]).T
        assert np.mean(low > CHANGE.mean()) <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / draws)
    assert near(float(np.mean((low <= CHANGE.mean()) & (CHANGE.mean() <= high))), 0.95, draws), "of 300 they cover"


def test_the_interval_of_a_difference_of_correlations_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "CORRELATION_DRAWS", 150)
    found = intervals.correlation_coverage(80, np.random.default_rng(1))
    assert near(found["rate"], 0.95, 150)


def test_the_randomisation_test_holds_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "TEST_DRAWS", 1000)
    found = intervals.level(intervals.swapped(CHANGE, np.random.default_rng(2)), 60)
    assert near(found["0.05"]["rate"], 0.05, 1000) and near(found["0.01"]["rate"], 0.01, 1000)


def test_holm_holds_the_family_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 400)
    found = intervals.family_error(PAIRS, 60, np.random.default_rng(3))
    assert found["Holm"]["rate"] <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)
    assert found["Holm"]["rate"] < found["uncorrected"]["rate"], "there is something to correct"


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_intervals_over_queries_and_seeds_cover(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "SEED_DRAWS", 1500)
    found = intervals.seeds_coverage(5, spread, np.random.default_rng(4), n=200)
    assert found["queries and seeds"]["rate"] >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1500)
    if spread:
        assert found["queries alone"]["rate"] < 0.93, "which is why there is the other one"
