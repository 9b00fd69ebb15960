"""Recipes: each shipped one runs, each says where its values come from, and a dumped one reads back the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kinvec import Embedder, config
from kinvec.contracts import KinvecError
from kinvec.objectives import make_objective
from kinvec.pipeline import run
from kinvec.recipe import Recipe, load_recipe, load_stages, shipped
from kinvec.verbs.train import train

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


CHAINS = ["bg2vec", "llm2vec"]


@pytest.mark.parametrize("name", sorted(set(shipped()) - set(CHAINS)))
def test_a_shipped_recipe_runs(
    name: str, tiny_folder: Path, tiny_decoder: Path, tiny_pairs: Path, labelled: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(name, NEEDED)
    kind = make_objective(recipe.objective).kind
    model = tiny_decoder if recipe.attention == "causal" else tiny_folder
    texts = tmp_path / "texts.txt"
    texts.write_text("the blood of a mouse\nhigh risk of heart infection\n" * 8)
    data = {"retrieval": tiny_pairs, "labelled": labelled, "texts": texts}[kind]
    settings = [f"model={model}", f"data.train={data}", f"out={tmp_path / 'run'}", "threads=1"]
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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_chain_trains_each_stage_on_the_model_of_the_one_before(
    tmp_path: Path, tiny_decoder: Path, tiny_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the blood of a mouse\nhigh risk of heart infection\n" * 8)
    settings = [
        f"model={tiny_decoder}",
        f"out={tmp_path / 'run'}",
        "threads=1",
        "trainer.max_steps=2",
        "simcse.trainer.max_steps=3",
    ]
    settings += [f"{stage}.data.train={texts}" for stage in ("mntp", "simcse")]
    settings += [f"contrastive.data.train={tiny_pairs}", "trainer.batch_size=4", f"data.test={tiny_pairs}"]
    told = train("llm2vec", settings)
    assert [stage["training"]["steps"] for stage in told["stages"]] == [2, 3, 2]
    last = Embedder.load(tmp_path / "run" / "contrastive" / "model", precision="fp32")
    assert last.attention == "bidirectional" and last.pooling == ("mean",)
    assert [stage["objective"] for stage in last.lineage] == ["mntp", "simcse", "contrastive"]
    bases = [tiny_decoder, *(tmp_path / "run" / stage / "model" for stage in ("mntp", "simcse"))]
    assert [stage["base"] for stage in last.lineage] == [str(base) for base in bases]
    assert all((tmp_path / "run" / stage / "adapter").is_dir() for stage in ("mntp", "simcse", "contrastive"))
    capsys.readouterr()
    assert train("llm2vec", settings)["stages"] == told["stages"]
    assert capsys.readouterr().err.count("is finished") == 3


def test_a_wrong_chain_is_said_before_anything_trains(tmp_path: Path, tiny_folder: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the blood of a mouse\n")
    chain = tmp_path / "chain.yaml"
    settings = [f"model={tiny_folder}", f"data.train={texts}", f"out={tmp_path / 'run'}"]
    for stages, said in (
        ("[{name: one}, {name: one}]", "every stage is a mapping with a name of its own"),
        ("[mntp]", "every stage is a mapping with a name"),
        ("[{name: one, objectiv: {}}]", "unknown recipe key 'objectiv'; did you mean 'objective'"),
        (
            "[{name: one, recipe: simcse}, {name: two, recipe: scifact}]",
            "holds texts; contrastive training needs queries",
        ),
        ("[{name: one, recipe: simce}]", "'simce' is neither a shipped recipe"),
    ):
        chain.write_text(f"stages: {stages}\n")
        with pytest.raises(KinvecError, match=said):
            train(chain, settings)
    assert not (tmp_path / "run").exists()


def test_overrides_of_a_chain_go_to_all_stages_or_to_one() -> None:
    given = [*NEEDED, "trainer.lr=1e-3", "mntp.trainer.lr=2e-3", "contrastive.seed=7"]
    chain = one, _, three = load_stages("llm2vec", given)
    names = ["mntp", "simcse", "contrastive"]
    assert [stage.trainer.lr for stage in chain] == [2e-3, 1e-3, 1e-3]
    assert [stage.out for stage in chain] == [f"runs/mine/{name}" for name in names]
    assert [stage.model for stage in chain] == ["some/model", *(f"runs/mine/{name}/model" for name in names[:2])]
    assert (one.seed, three.seed) == (42, 7) and one.objective.masking.token == "blank"
    assert load_stages("bg2vec", NEEDED)[0].objective.masking.replace == "all"
