"""What a run will take: the arithmetic, what is measured, and that measuring changes nothing of the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kinvec
from kinvec.batching import lay, pack
from kinvec.config import load
from kinvec.embedder import Embedder
from kinvec.forecast import (
    WARM_TOKENS,
    Chunk,
    Cost,
    StandIn,
    _activations,
    _affordable,
    _without_rests,
    evaluation,
    fitted,
    in_words,
    peak,
    spread,
)
from kinvec.pipeline import plan_run, run
from kinvec.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(model: Path, pairs: Path, out: Path, **changes: Any) -> Recipe:
    given: dict[str, Any] = {"model": str(model), "out": str(out), "data": {"train": str(pairs)}, "precision": "fp32"}
    given["trainer"] = {"batch_size": 16, "max_steps": 4, "eval_every": 3} | changes.pop("trainer", {})
    return load(Recipe, given | changes)


@given(st.floats(1e-6, 1e-3), st.floats(0, 1e-6), st.lists(st.integers(1, 400), min_size=3, max_size=9, unique=True))
def test_a_cost_is_found_from_what_texts_of_several_lengths_took(a: float, b: float, lengths: list[int]) -> None:
    true = Cost(a, b)
    chunks = [[length] * 5 for length in lengths]
    found = fitted([(chunk, true.of(chunk)) for chunk in chunks])
    for chunk in chunks:
        assert found.of(chunk) == pytest.approx(true.of(chunk), rel=1e-6)


def test_the_points_measured_lie_evenly_between_shortest_and_longest() -> None:
    assert spread(range(9)) == [1, 4, 7]
    assert spread([5, 6]) == [5, 6]


@pytest.mark.parametrize(
    ("whole", "most", "tokens"),
    [
        (1_000, 9_000, 1_000),  # however short the run: two fifths of the ten seconds, for four measurements
        (160_000, 9_000, 2_000),  # a twentieth of its tokens
        (10**9, 9_000, 2_500),  # all ten seconds
        (10**9, 1_500, 1_500),
    ],
)
def test_measuring_takes_a_share_of_the_run_but_has_a_least_and_a_most(whole: int, most: int, tokens: int) -> None:
    """At a millisecond a token; the smallest packs are never made smaller."""
    small = pack(lay([[7] * 100]), [0])
    found = _affordable(most, whole, 10.0, lambda texts: 1e-3 * sum(texts.lengths), [small])
    assert found == pytest.approx(max(tokens, WARM_TOKENS), abs=1)


def test_the_rest_of_a_step_stands_for_none_of_its_chunks() -> None:
    tokens = lay([[7] * length for length in (30, 30, 40, 90, 50)])
    parts = [pack(tokens, rows) for rows in ([0, 1, 2], [3], [4])]
    assert _without_rests(parts) == parts[:2]
    assert _without_rests(parts[2:]) == parts[2:]


@pytest.mark.parametrize(("small", "working"), [(100, 500 + 2 * 8_000), (800, (500 + 2 * 1_000) * 8)])
def test_what_comes_and_goes_beside_the_graphs_grows_as_measured(small: int, working: int) -> None:
    """500 bytes and 2 a token, beside graphs of 10 a token; two chunks of about one size cannot tell the 500 apart."""

    def measured(tokens: int) -> Chunk:
        return Chunk((100,) * (tokens // 100), 1.0, 3.0, saved=10 * tokens, most=7_000 + 500 + 12 * tokens)

    chunks = [measured(1_000)] * 2
    found = _activations(measured(small), chunks, [([[100] * 80, [100] * 40], [])], 7_000, 300, one_by_one=False)
    assert found == pytest.approx({"graphs": 120_000, "working": working}, abs=1)
    assert (
        _activations(measured(small), chunks, [([[100] * 5], [])], 7_000, 10**6, one_by_one=False)["working"] == 10**6
    )


def test_the_peak_is_the_most_that_was_held_meanwhile() -> None:
    import time

    with peak(torch.device("cpu")) as most:
        held = np.ones(2**25)  # 256 MiB, every page touched
        time.sleep(0.05)
        del held
    import psutil

    assert most[0] >= psutil.Process().memory_info().rss
    assert most[0] >= 2**28


def test_evaluation_counts_every_text_that_it_has_encoded(tiny_folder: Path) -> None:
    """What takes no time besides encoding costs in proportion to the texts, and the model itself is asked."""
    embedder = Embedder.load(tiny_folder, precision="fp32")
    texts = ["gene protein cell", "mouse blood"] * 50
    few, _ = evaluation(embedder, lambda encoder: encoder.encode_queries(texts))
    many, most = evaluation(embedder, lambda encoder: [encoder.encode_documents(texts) for _ in range(400)])
    assert 0 < few < many and most > 2**20


def test_the_stand_in_tells_texts_apart_by_their_words(tiny_folder: Path) -> None:
    stand_in = StandIn(Embedder.load(tiny_folder, precision="fp32"))
    a, b, c = stand_in.encode_queries(["gene protein", "protein gene", "mouse blood"])
    assert a @ b == pytest.approx(1.0, abs=1e-5) and a @ c < 0.9


def test_a_plan_names_steps_chunks_memory_and_time(tiny_folder: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    plan = plan_run(recipe(tiny_folder, tiny_pairs, tmp_path / "run"))
    training = plan["training"]
    assert (training["steps"], training["evaluations"], training["kept"], training["recomputed"]) == (4, 2, 1, 0)
    assert plan["peak"] >= training["peak"] == sum(training["memory"].values())
    assert training["memory"]["moments"] >= 2 * training["memory"]["gradients"] > 0
    assert plan["seconds"] > training["seconds"] > 0 and set(plan["evaluation"]) == {"base", "tuned", "dev"}
    assert not (tmp_path / "run").exists()
    assert "all graphs fit" in "\n".join(in_words(plan))


def test_a_plan_says_how_many_chunks_run_twice_in_a_small_budget(
    tiny_folder: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    small = {"memory_budget": "300KB", "chunk_tokens": 64, "eval_every": 0}
    plan = plan_run(recipe(tiny_folder, tiny_pairs, tmp_path / "run", trainer=small, evaluate=False))
    assert plan["training"]["recomputed"] > 0 and plan["evaluation"] == {}
    assert plan["training"]["step"]["model"] > 0
    assert "run forward twice" in "\n".join(in_words(plan))


@pytest.mark.parametrize("lora", [0, 2])
def test_measuring_changes_no_bit_of_the_training(
    tiny_folder: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    """The model's dropout is on, so a random number drawn too many would show."""
    changes: dict[str, Any] = {"evaluate": False, "lora": {"rank": lora}, "trainer": {"eval_every": 0}}
    state, of_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()
    plan_run(recipe(tiny_folder, tiny_pairs, tmp_path / "planned", **changes))
    assert torch.equal(torch.get_rng_state(), state) and np.random.get_state()[1].tolist() == of_numpy
    run(recipe(tiny_folder, tiny_pairs, tmp_path / "with", **changes))
    monkeypatch.setattr("kinvec.pipeline._planned", lambda recipe, data: {})
    monkeypatch.setattr("kinvec.pipeline.in_words", lambda plan: [])
    run(recipe(tiny_folder, tiny_pairs, tmp_path / "without", **changes))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_command_says_it_and_train_says_the_same_lines(
    tiny_folder: Path, tiny_pairs: Path, tmp_path: Path, main: Callable[..., tuple[int, str]]
) -> None:
    words = (f"model={tiny_folder}", f"data.train={tiny_pairs}", f"out={tmp_path / 'run'}", "trainer.max_steps=2")
    code, said = main("plan", *words)
    assert code == 0 and said.startswith("plan: 2 steps of") and "peak memory" in said
    code, said = main("plan", *words, "--json")
    assert code == 0 and json.loads(said)["stages"][0]["training"]["steps"] == 2
    code, said = main("train", *words)
    assert code == 0 and "plan: 2 steps of" in said
    code, again = main("train", *words)
    assert code == 0 and "plan:" not in again  # a run that is there is not planned anew


def test_seeds_share_the_base_and_stages_are_planned_one_by_one(
    tiny_folder: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    words = [f"model={tiny_folder}", f"data.train={tiny_pairs}", f"out={tmp_path / 'run'}", "trainer.max_steps=2"]
    found = kinvec.plan(None, [*words, "seeds=[1,2,3]"])
    one = found["stages"][0]
    assert found["seeds"] == 3 and found["seconds"] == pytest.approx(3 * one["seconds"] - 2 * one["evaluation"]["base"])
