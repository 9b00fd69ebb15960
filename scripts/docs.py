"""Writes the pages that are made from the code: the CLI's help, the recipe's reference, the recipe's JSON schema.

python scripts/docs.py           write them
python scripts/docs.py --check   say which are stale and exit 1
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kinvec import cli, config
from kinvec.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "kinvec" / "recipes"
WIDTH = 100
MADE = "<!-- Written by `make docs` from the code: edit the code. -->"


def cli_page() -> str:
    """Every `--help`, as the terminal shows it at a width of 100 columns."""
    parts = [f"# The command line\n\n{MADE}\n", f"```\n$ kinvec --help\n{cli.overview()}\n```\n"]
    for verb in cli.VERBS:
        command = cli.load_verb(verb)
        context = command.context_class(
            command, info_name=f"kinvec {verb}", terminal_width=WIDTH, max_content_width=WIDTH
        )
        parts.append(f"## {verb}\n\n```\n$ kinvec {verb} --help\n{command.get_help(context).strip()}\n```\n")
    return "\n".join(parts)


def recipe_page() -> str:
    """Every key of a recipe with its type, default and help, group by group."""
    parts = [
        f"# The recipe\n\n{MADE}\n",
        "A recipe is YAML; each key can also be given on the command line as `key=value` (`trainer.epochs=3`), which\n"
        "wins over the file. A key that is not listed here is an error.\n"
        "[`recipe.schema.json`](recipe.schema.json) tells an editor the same: put\n"
        "`# yaml-language-server: $schema=…/recipe.schema.json` at the head of a recipe.\n",
        "## Shipped recipes\n",
        *(f"- [`{path.stem}`](../kinvec/recipes/{path.name}): {_first_comment(path)}" for path in _shipped()),
        "\n`kinvec train NAME …` starts from one of them, `kinvec train FILE.yaml …` from your own.\n",
    ]
    for group, model in _groups(Recipe):
        title = f"`{group}`" if group else "Top level"
        parts.append(
            f"## {title}\n\n{_paragraph(model.__doc__)}\n\n| key | type | default | what it does |\n|---|---|---|---|"
        )
        prefix = f"{group}." if group else ""
        own = [name for name in _own(model, prefix) if not config.group_of(model.model_fields[name].annotation)]
        rows = {key: row for key, *row in config.fields(model)}
        parts.extend(_row(f"{prefix}{name}", *rows[name]) for name in own)
        parts.append("")
    return "\n".join(parts)


def schema() -> str:
    """The recipe's JSON schema, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


PAGES = {"docs/cli.md": cli_page, "docs/recipe.md": recipe_page, "docs/recipe.schema.json": schema}


def _row(key: str, kind: str, default: Any, text: str) -> str:
    kind = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), kind)
    kind = re.sub(r"Optional\[(.*)\]", r"\1", kind)
    shown = "unset" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"
    cells = (f"`{key}`", f"`{kind.replace(' | None', '')}`", shown, _paragraph(text))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def _groups(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = config.group_of(field.annotation)
        if inner is not None and not prefix.endswith(REPEATED):
            key = config.inner_name(name, field.annotation)
            yield from _groups(inner, f"{prefix}.{key}" if prefix else key)


REPEATED = ".NAME"  # a group that stands there once for each name: only keys of its own are shown


def _own(model: type[BaseModel], prefix: str) -> Iterable[str]:
    return model.__annotations__ if prefix.endswith(f"{REPEATED}.") else model.model_fields


def _shipped() -> list[Path]:
    return sorted(RECIPES.glob("*.yaml"))


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("#"), f"{path} must open with a comment that says what it is for"
    return first.lstrip("# ").rstrip()


def main() -> int:
    """Write the stale pages, or only name them with --check."""
    stale = [name for name, make in PAGES.items() if _read(ROOT / name) != make()]
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"{name} is not what the code says; run `make docs` and commit it.", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"wrote {name}")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
