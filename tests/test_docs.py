"""What the documentation shows is so: links lead somewhere, examples are read as they say, recipes parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kinvec import config, files

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "kinvec" / "recipes").glob("*.yaml"))
KINDS = {
    "examples.jsonl": "retrieval",
    "faq.csv": "retrieval",
    "triplets.csv": "retrieval",
    "pairs.csv": "pairs",
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
    from kinvec.recipe import Recipe

    config.load(Recipe, path, overrides=["model=m", "data.train=d", "out=o"])
