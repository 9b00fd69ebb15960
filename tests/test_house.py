"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kinvec
from kinvec.cli import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kinvec"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 60
LONGEST_FILE = 500
COMMITTED_FOLDERS = (".ci", "benchmarks", "docs", "fuzz", "kinvec", "scripts", "tests")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and its decorators."""
    body = function.body
    has_docstring = ast.get_docstring(function) is not None
    docstring = (body[0].end_lineno or body[0].lineno) - body[0].lineno + 1 if has_docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_functions_and_files_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: lines for f in functions if (lines := _code_lines(f)) > LONGEST_FUNCTION}
    assert not long, f"longer than {LONGEST_FUNCTION} lines: {long}"
    assert len(source.splitlines()) <= LONGEST_FILE, "make it a package of the same name"


def test_no_module_shares_its_name_with_a_public_function() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert not modules & set(kinvec.__all__)


def test_every_verb_is_a_public_function_of_its_own_file() -> None:
    for verb in VERBS:
        tree = ast.parse((PACKAGE / "verbs" / f"{verb}.py").read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {verb, "command"} <= functions
        assert verb in kinvec.__all__


def _tree_of_readme() -> set[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```\nkinvec/\n(.*?)```", text, flags=re.DOTALL)
    assert block, "the README shows the captioned tree"
    return set(re.findall(r"^  (\S+?)/? {2,}\S", block[1], flags=re.MULTILINE))


def test_the_readme_captions_every_file_of_the_package() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert _tree_of_readme() == files | folders


def _committed_texts() -> Iterator[Path]:
    for name in COMMITTED_FOLDERS:
        yield from (path for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc")
    yield from (path for path in ROOT.iterdir() if path.is_file())


def test_nothing_names_a_machine_or_a_package_host() -> None:
    forbidden = re.compile(r"pypi\.org|pythonhosted|debian\.org|registry\.npmjs|(?<![\w.~])/(work|root|home|opt)/\w")
    found = {
        f"{_name(path)}:{number}"
        for path in _committed_texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if forbidden.search(line)
    }
    assert not found


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in pins), "a pin is NAME==VERSION and nothing else"
    pinned = {_normal(pin.split("==")[0]) for pin in pins}
    assert {_normal(re.split(r"[<>=!~; \[]", name)[0]) for name in wanted} <= pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
