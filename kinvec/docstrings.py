"""A real search problem out of what is installed anyway: the docstrings of Python packages.

The summary of a docstring is the query, the rest of it, without the object's name and without the summary, is the
document. Sources are parsed with `ast`, never imported. Whole sub-packages go to training or to test, and texts that
repeat are dropped before that, so nothing that is tested was trained on.
"""

from __future__ import annotations

import ast
import gc
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kinvec.console import progress
from kinvec.files import write_text

PACKAGES = ("stdlib", "numpy", "scipy", "sklearn", "pandas", "networkx", "sympy", "torch")
"""Well-documented packages that come with kinvec, by import name; `stdlib` is Python's own library."""

SKIPPED_FOLDERS = frozenset(
    "tests test testing _vendor site-packages dist-packages idlelib lib2to3 ensurepip pydoc_data benchmarks externals "
    "_inductor _dynamo _export _higher_order_ops".split()
)
QUERY_WORDS = (4, 40)
DOCUMENT_WORDS = (20, 160)
LONGEST = 4000  # characters of a docstring that are looked at; DOCUMENT_WORDS cuts well before
SAME_OPENING = 14  # documents that share this many opening words come from one template and cannot be told apart

_ROLE = re.compile(r":[\w:]+:`[~!]?([^`]*)`")
_NOTATION = re.compile(r"\.\. [\w-]+::|[-=~^*#_.]{4,}|`+|\\")
_DOTTED = re.compile(r"[^\W\d][\w.]*")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Pair:
    """One docstring: `name` is the object's dotted path, `group` the sub-package that is never split."""

    name: str
    group: str
    query: str
    document: str


def collect(packages: Sequence[str] = PACKAGES) -> list[Pair]:
    """Every distinct pair of the installed ones of `packages`, in an order that depends on the names alone."""
    files = list(source_files(packages))
    pairs: list[Pair] = []
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many small objects without cycles: the collector would only walk them again
    try:
        with progress("reading docstrings", len(files)) as bar:
            for path, module in files:
                pairs += pairs_in(path, module)
                bar.advance()
    finally:
        if collecting:
            gc.enable()
    return distinct(sorted(pairs, key=lambda pair: _hash(pair.name)))


def source_files(packages: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """The Python files of packages, with their dotted module names; tests and vendored copies are left out."""
    library, installed = Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])
    for package in packages:
        root = library if package == "stdlib" else installed / package
        base = library if package == "stdlib" else installed
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts) and not path.name.startswith(("test_", "_test", "conftest")):
                yield path, ".".join(part for part in parts if part != "__init__")


def pairs_in(path: Path, module: str) -> list[Pair]:
    """The pairs of one file's public classes, methods and functions; none where it is no readable Python."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    group = ".".join(module.split(".")[:2])
    found = []
    for name, node in _public_objects(tree.body, module):
        texts = split_docstring(ast.get_docstring(node) or "", node.name)
        if texts:
            found.append(Pair(name, group, *texts))
    return found


def _public_objects(
    body: Iterable[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public_objects(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.If | ast.Try):
            yield from _public_objects(node.body, prefix)


def split_docstring(docstring: str, name: str) -> tuple[str, str] | None:
    """(query, document) of a docstring, or None where either part says too little to be searched for."""
    summary, _, rest = docstring.strip().partition("\n\n")
    if not QUERY_WORDS[0] <= len(summary.split()) <= QUERY_WORDS[1]:
        return None
    query = " ".join(_plain(summary).split())
    document = " ".join(_plain(rest[:LONGEST]).split()).replace(query, " ")
    if name in document:
        document = _DOTTED.sub(lambda word: "" if word[0].rpartition(".")[2] == name else word[0], document)
    words = document.split()[: DOCUMENT_WORDS[1]]
    return (query, " ".join(words)) if len(words) >= DOCUMENT_WORDS[0] else None


def _plain(text: str) -> str:
    """The text without reStructuredText's roles, directives, rules and backquotes: notation, no content."""
    return _NOTATION.sub(" ", _ROLE.sub(r"\1", text))


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The first of all pairs that share their name, query, document, or their document's opening words."""
    kept: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        words = _normal(pair.document).split()
        keys = {
            ("name", pair.name),
            ("query", _normal(pair.query)),
            ("document", " ".join(words)),
            ("opening", " ".join(words[:SAME_OPENING])),
        }
        if seen.isdisjoint(keys):
            kept.append(pair)
        seen |= keys
    return kept


def _normal(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def counts(pairs: Iterable[Pair]) -> dict[str, int]:
    """Pairs by package, in the order of `PACKAGES`; what is none of them belongs to the standard library."""
    found = dict.fromkeys(PACKAGES, 0)
    for pair in pairs:
        package = pair.name.partition(".")[0]
        package = package if package in PACKAGES else "stdlib"
        found[package] = found.get(package, 0) + 1
    return {package: count for package, count in found.items() if count}


def split(pairs: Sequence[Pair], test_share: float) -> tuple[list[Pair], list[Pair]]:
    """(train, test): whole groups, in the order of their hashes, go to test until it has `test_share` of the pairs."""
    sizes: dict[str, int] = {}
    for pair in pairs:
        sizes[pair.group] = sizes.get(pair.group, 0) + 1
    tested: set[str] = set()
    filled = 0
    for group in sorted(sizes, key=_hash):
        # A group larger than what is missing would crowd out all others: variety makes the better test.
        if filled + sizes[group] <= test_share * len(pairs):
            tested.add(group)
            filled += sizes[group]
    return [p for p in pairs if p.group not in tested], [p for p in pairs if p.group in tested]


def write_beir(folder: Path, train: Sequence[Pair], test: Sequence[Pair], words: int) -> Path:
    """Write a BEIR folder whose corpus holds the documents of both splits, each cut after `words` words."""
    pairs = [*test, *train]
    corpus = [{"_id": p.name, "title": "", "text": " ".join(p.document.split()[:words])} for p in pairs]
    queries = [{"_id": _query_id(p), "text": p.query} for p in pairs]
    for name, records in (("corpus", corpus), ("queries", queries)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    for name, part in (("train", train), ("test", test)):
        rows = "".join(f"{_query_id(p)}\t{p.name}\t1\n" for p in part)
        write_text(folder / "qrels" / f"{name}.tsv", "query-id\tcorpus-id\tscore\n" + rows)
    return folder


def _query_id(pair: Pair) -> str:
    return f"q:{pair.name}"  # not the document's id: BEIR's own tools drop a result that has the query's


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
