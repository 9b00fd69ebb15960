"""Recipes: each shipped one runs, each says where its values come from, and a dumped one reads back the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kinvec import config
from kinvec.objectives import make_objective
from kinvec.pipeline import run
from kinvec.recipe import Recipe, load_recipe, shipped

pytestmark = pytest.mark.usefixtures("one_thread")
NEEDED = ["model=some/model", "data.train=pairs.jsonl", "out=runs/mine"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twenty texts of each label that the recipes name."""
    rows = [
        (f"{word} number {i}", label)
        for label, word in (("U.S. NEWS", "near"), ("WORLD NEWS", "far"))
        for i in range(20)
    ]
    path = tmp_path / "labelled.csv"
    path.write_text("text,category\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_runs(name: str, tiny_folder: Path, tiny_pairs: Path, labelled: Path, tmp_path: Path) -> None:
    kind = make_objective(load_recipe(name, NEEDED).objective).kind
    texts = tmp_path / "texts.txt"
    texts.write_text("the blood of a mouse\nhigh risk of heart infection\n" * 8)
    data = {"retrieval": tiny_pairs, "labelled": labelled, "texts": texts}[kind]
    settings = [f"model={tiny_folder}", f"data.train={data}", f"out={tmp_path / 'run'}", "threads=1"]
    if kind == "texts":  # which judge nothing themselves; the tiny encoder's tokenizer has no blank, but a mask
        settings += [f"data.test={tiny_pairs}", "objective.masking.token=mask"]
    summary = run(load_recipe(name, [*settings, "trainer.max_steps=2"]))
    assert summary["training"]["steps"] == 2 and len(summary["results"]) == 1
    resolved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert resolved == load_recipe(name, [*settings, "trainer.max_steps=2"])
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_says_where_each_value_comes_from(name: str) -> None:
    lines = shipped()[name].read_text("utf-8").splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: *[^\s#]", line) and not line.lstrip().startswith("name:")]
    assert values and all("#" in line for line in values), [line for line in values if "#" not in line]


def test_a_dumped_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(
        "scifact", [*NEEDED, "prompts={query: 'ask: '}", "data.columns={query: question}", "lora.rank=8"]
    )
    (tmp_path / "again.yaml").write_text(config.dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert list(config.differences(recipe.model_dump(), load_recipe(tmp_path / "again.yaml").model_dump())) == []


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer:\n  lr: 1.0e-4\n  epochs: 2\nseed: 7\n")
    recipe = load_recipe(tmp_path / "mine.yaml", [*NEEDED, "trainer.lr=5e-4"])
    assert (recipe.trainer.lr, recipe.trainer.epochs, recipe.seed) == (5e-4, 2.0, 7)
    assert recipe.trainer.batch_size == Recipe().trainer.batch_size


def test_every_setting_has_a_help_text_and_the_schema_knows_it() -> None:
    settings = list(config.fields(Recipe))
    assert len(settings) > 40 and all(text for _, _, _, text in settings)
    schema = json.dumps(Recipe.model_json_schema())
    assert all(f'"{key.rsplit(".", 1)[-1]}"' in schema for key, *_ in settings)
