"""What the documentation shows is so: links lead somewhere, examples are read as they say, recipes parse."""

from __future__ import annotations

import json
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from conftest import MINILM
from tiny_models import config_of, tokenizer_of
from transformers import AutoModelForCausalLM

from kinvec import cli, files
from kinvec.recipe import load_stages

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "kinvec" / "recipes").glob("*.yaml"))
KINDS = {
    "examples.jsonl": "retrieval",
    "faq.csv": "retrieval",
    "triplets.csv": "retrieval",
    "nli.csv": "retrieval",
    "pairs.csv": "pairs",
    "duplicates.csv": "pairs",
    "intents.csv": "labelled",
    "texts.jsonl": "texts",
}


def _anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, target


def _examples() -> dict[str, str]:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^`(\S+)`\n```\w+\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def test_every_example_file_of_the_data_page_is_tested() -> None:
    assert set(_examples()) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_data_page_shows_files_that_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(_examples()[name], encoding="utf-8")
    table = files.open_data(tmp_path / name)
    assert table.kind == KINDS[name]
    assert len(table) == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert load_stages(path, ["model=m", "data.train=d", "out=o"])


HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the README's model; here its offline copy
ANIMALS = ("cat", "dog", "horse", "cow")
ACTS = ("eats grass", "sleeps in the barn", "runs to the river", "sings at dawn")


def _my_data(folder: Path) -> None:
    """A BEIR folder of 16 queries, three in four of them for training."""
    (folder / "qrels").mkdir(parents=True)
    documents, queries, judged = (
        [],
        [],
        {"train": ["query-id\tcorpus-id\tscore"], "test": ["query-id\tcorpus-id\tscore"]},
    )
    for i, (animal, act) in enumerate(product(ANIMALS, ACTS)):
        documents.append({"_id": f"d{i}", "title": f"The {animal}", "text": f"It {act}.", "source": animal[0]})
        queries.append({"_id": f"q{i}", "text": f"What {act}, and is a {animal}?"})
        judged["train" if i % 4 else "test"].append(f"q{i}\td{i}\t1")
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, lines in judged.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def _my_decoder(folder: Path) -> None:
    """A tiny language model, and articles to train it on."""
    model = AutoModelForCausalLM.from_config(config_of("llama"))
    model.save_pretrained(folder / "decoder")
    tokenizer_of("decoder").save_pretrained(folder / "decoder")
    (folder / "articles").mkdir()
    (folder / "articles" / "farm.txt").write_text(
        "\n\n".join(f"The {a} {b} on the farm." for a in ANIMALS for b in ACTS)
    )


def _my_scores(folder: Path) -> None:
    """Sentences that share the animal, the act, both or neither."""
    rows = [
        f"{a} {b},{c} {d},{(a == c) + (b == d)}"
        for a, c in product(ANIMALS[:3], repeat=2)
        for b, d in product(ACTS, repeat=2)
    ]
    (folder / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]) + "\n")


def _my_news(folder: Path) -> None:
    """Two categories of news as HuffPost's data set has them."""
    rows = [
        {"category": label, "headline": f"{place} {act}", "short_description": f"A {animal} {act}."}
        for label, place in (("U.S. NEWS", "Ohio"), ("WORLD NEWS", "Peru"))
        for animal in ANIMALS
        for act in ACTS
    ]
    (folder / "news.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


SHORTER = {"train mntp ": "trainer.max_steps=2", "train simcse ": "trainer.max_steps=2"}  # than a thousand steps


def _blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, on the test's own data and model."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for shown, ours in (
        (HUB_NAME, MINILM), ("=MODEL", f"={MINILM}"), (" MODEL", f" {MINILM}"), ("DATA", "my-data"),
        ("=DECODER", "=decoder"), *((recipe, f"{recipe}{setting} ") for recipe, setting in SHORTER.items()),
    ):  # fmt: skip
        text = text.replace(shown, ours)
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _recipes(page: str) -> dict[str, str]:
    """Recipes that the page names above their text."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("DATA", "my-data")
    return dict(re.findall(r"^`(\S+\.yaml)`\n```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def _run(page: str, folder: Path) -> set[str]:
    """Run the page's kinvec commands, then its Python; returns the verbs."""
    for name, recipe in _recipes(page).items():
        (folder / name).write_text(recipe, encoding="utf-8")
    commands = [shlex.split(line) for _, block in _blocks(page) for line in block.splitlines() if line[:7] == "kinvec "]
    for _, *arguments in commands:
        with pytest.raises(SystemExit) as ended:
            cli.run_verb(arguments)
        assert ended.value.code == 0, arguments
        for recipe in folder.glob("*.yaml"):
            recipe.write_text(recipe.read_text().replace(HUB_NAME, MINILM))
    for program in (block for language, block in _blocks(page) if language == "python"):
        exec(program, {})
    return {verb for _, verb, *_ in commands}


def test_the_pages_do_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kinvec command and each Python program of the README and of the pages, in their order, on small data."""
    _my_data(tmp_path / "my-data")
    monkeypatch.chdir(tmp_path)
    assert _run("README.md", tmp_path) == {"check", "evaluate", "train", "compare", "init"}
    for run in ("runs/mine", "runs/my-recipe"):
        assert (tmp_path / run / "report.html").is_file()
    _my_decoder(tmp_path)
    _my_news(tmp_path)
    _my_scores(tmp_path)
    assert _run("docs/training.md", tmp_path) == {"plan", "train", "prepare"}
    assert _run("docs/mining.md", tmp_path) == {"mine", "train"}
    assert _run("docs/report.md", tmp_path) == {"report"}
    assert _run("docs/data.md", tmp_path) == {"check"}
    assert _run("docs/evaluation.md", tmp_path) == {"evaluate", "compare", "embed"}
    assert _run("docs/comparing.md", tmp_path) == {"compare", "train"}
    assert _run("docs/model-folder.md", tmp_path) == set()
    assert _run("docs/from-nemo.md", tmp_path) == {"convert", "info"}
