"""One recipe under several seeds: the base is measured once, finished seeds are kept, both variances are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kinvec
from kinvec import Embedder, pipeline, tasks
from kinvec.contracts import KinvecError, RecipeError
from kinvec.metrics.several import crossed_interval
from kinvec.recipe import load_seeds

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["trainer.max_steps=3", "trainer.batch_size=8", "trainer.eval_every=0", "trainer.lr=1e-3", "precision=fp32"]


@pytest.fixture
def settings(tiny_folder: Path, tiny_pairs: Path, tmp_path: Path) -> list[str]:
    return [f"model={tiny_folder}", f"data.train={tiny_pairs}", "data.holdout=0.3", f"out={tmp_path / 'out'}", *SHORT]


def test_three_seeds(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = tasks.with_cheaper

    def counted(*arguments: Any, **named: Any) -> Any:
        if isinstance(arguments[1], Embedder):  # not what stands in for it while the plan is made
            measured.append(arguments[1].name)
        return measure(*arguments, **named)

    monkeypatch.setattr(tasks, "with_cheaper", counted)  # what a small search is measured by
    summary = kinvec.train(None, [*settings, "seeds=[1,2,3]"])
    out = tmp_path / "out"
    runs = [out / f"seed-{seed}" for seed in (1, 2, 3)]
    assert len(measured) == 4, "the base once, the tuned models each"
    assert summary["seeds"] == [1, 2, 3] and [run["out"] for run in summary["runs"]] == [str(run) for run in runs]
    assert summary == json.loads((out / "summary.json").read_text())
    (result,) = summary["results"]
    base = [tasks.load_result(run / "results/base" / result["task"]) for run in runs]
    tuned = [tasks.load_result(run / "results/tuned" / result["task"]) for run in runs]
    assert base[0] == base[1] == base[2]
    name, row = next(iter(result["metrics"].items()))
    assert row["values"] == [one.metrics[name] for one in tuned] and len(set(row["values"])) == 3, "seeds matter"
    assert row["tuned"] == pytest.approx(np.mean(row["values"])) and row["base"] == base[0].metrics[name]
    assert row["deviation"] == pytest.approx(np.std(row["values"], ddof=1))
    change = np.stack([np.subtract(one.per_query[name], base[0].per_query[name]) for one in tuned])
    assert row["difference"] == pytest.approx(change.mean())
    assert (row["low_seeds"], row["high_seeds"]) == pytest.approx(crossed_interval(change))
    (compared,) = kinvec.compare(out)
    assert [system.seeds for system in compared.systems] == [[], [1, 2, 3]]
    assert compared.comparisons[0].metrics[0].low == row["low"]
    assert kinvec.compare(runs[0] / "results/base", *runs)[0].systems[1].spread == compared.systems[1].spread


def test_a_stopped_series_goes_on_where_it_was(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pipeline.run

    def stopped(recipe: Any, **named: Any) -> Any:
        if recipe.seed == 2:
            raise KeyboardInterrupt
        return run(recipe, **named)

    monkeypatch.setattr(pipeline, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        kinvec.train(None, [*settings, "seeds=[1,2]"])
    monkeypatch.setattr(pipeline, "run", run)
    first = tmp_path / "out" / "seed-1" / "summary.json"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "summary.json").exists()
    summary = kinvec.train(None, [*settings, "seeds=[1,2]"])
    assert first.stat().st_mtime_ns == written and summary["seeds"] == [1, 2]
    grown = kinvec.train(None, [*settings, "seeds=[1,2,3]"])
    assert grown["seeds"] == [1, 2, 3] and first.stat().st_mtime_ns == written


def test_every_seed_runs_the_whole_chain(settings: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "chain.yaml"
    recipe.write_text("stages: [{name: first}, {name: second, trainer: {lr: 0.002}}]\nseeds: [5, 6]\n")
    summary = kinvec.train(recipe, settings)
    out = tmp_path / "out"
    places = [[out / f"seed-{seed}" / stage for stage in ("first", "second")] for seed in (5, 6)]
    assert [[stage["out"] for stage in run["stages"]] for run in summary["runs"]] == [list(map(str, p)) for p in places]
    (task,) = kinvec.compare(out)
    assert [system.seeds for system in task.systems] == [[5, 6], [5, 6]]
    tuned = [tasks.load_result(last / "results/tuned" / summary["results"][0]["task"]) for _, last in places]
    assert task.systems[1].spread[0].values == [one.metrics[task.by] for one in tuned]
    before = [tasks.load_result(last / "results/base" / summary["results"][0]["task"]) for _, last in places]
    assert before[0].metrics != before[1].metrics, "the second stage starts from the seed's own model"
    gained = [np.subtract(y.per_query[task.by], x.per_query[task.by]) for x, y in zip(before, tuned, strict=True)]
    row = next(row for row in task.systems[1].spread if row.metric == task.by)
    assert (row.low, row.high) == pytest.approx(crossed_interval(np.stack(gained)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: [1]", "two or more different ones; for a single one set seed"),
        ("seeds: [1, 2, 2]", "two or more different ones"),
        ("seeds: 3", "seeds"),
        ("stages: [{name: a, seeds: [1, 2]}, {name: b}]", "set them beside `stages`"),
    ],
)
def test_seeds_that_are_none(text: str, said: str, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text + "\n")
    with pytest.raises(RecipeError, match=said):
        load_seeds(tmp_path / "recipe.yaml", settings)


def test_a_folder_with_other_things_is_left_alone(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(KinvecError, match=r"other things than a recipe's seeds \('thesis.tex'\); choose another out="):
        kinvec.train(None, [*settings, "seeds=[1,2]"])


def test_the_command_shows_the_spread(settings: list[str], main: Callable[..., tuple[int, str]]) -> None:
    code, text = main("train", *settings, "seeds=[3,4]")
    assert code == 0, text
    assert "over 2 seeds" in text and "deviation" in text and "seed-4" in text
    code, text = main("train", *settings, "seeds=[3,4]", "--dry-run")
    assert code == 0 and json.loads(text[text.index("{") :])["recipe"]["seed"] == 3
