"""What a file is: its form (how it is parsed), its columns' roles, and so the kind of training data it holds."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError, RecipeError
from kinvec.files.problems import DataError, Notes
from kinvec.files.records import Record, delimited_records, jsonl_records

HEAD_BYTES = 1 << 20
SAMPLE = 100  # records looked at to tell the kind

# Role → the column names it is known by, the first found wins. `columns: {role: name}` takes any other.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "retrieval": {
        "query": ("query", "question", "anchor"),
        "pos_doc": ("pos_doc", "positive", "positives", "pos", "context", "passage", "answer"),
        "neg_doc": ("neg_doc", "negative", "negatives", "neg"),
        "query_id": ("query_id", "qid"),
        "pos_id": ("pos_id", "doc_id", "pos_ids"),
        "neg_id": ("neg_id", "neg_ids"),
        "pos_score": ("pos_score", "score", "scores", "pos_scores"),
        "neg_score": ("neg_score", "neg_scores"),
    },
    "pairs": {
        "first": ("first", "sentence1", "text1", "sentence_a"),
        "second": ("second", "sentence2", "text2", "sentence_b"),
        "score": ("score", "similarity_score", "similarity", "label"),
    },
    "labelled": {
        "text": ("text", "sentence", "headline"),
        "label": ("label", "category", "intent", "class", "label_text"),
    },
    "texts": {"text": ("text", "sentence")},
}
NEEDED = {
    "retrieval": ("query", "pos_doc"), "pairs": ("first", "second", "score"), "labelled": ("text", "label"), "texts": ("text",),
}  # fmt: skip
FORMS = (
    "retrieval examples (query, pos_doc), scored pairs (first, second, score), labelled texts (text, label) or texts (text)"
)


@dataclass(frozen=True)
class Layout:
    """How a file is parsed (`form` and its options) and which columns play which role."""

    form: str
    kind: str
    columns: dict[str, tuple[str, ...]]
    delimiter: str = ","
    quoted: bool = True
    header: bool = True


def records_of(path: Path, name: str, layout: Layout, notes: Notes) -> Iterator[Record]:
    """The file's records as its layout says they stand."""
    if layout.form == "delimited":
        yield from delimited_records(
            path, name, notes, delimiter=layout.delimiter, quoted=layout.quoted, header=layout.header
        )
    else:
        yield from jsonl_records(path, name, notes)


def layout_of(path: Path, name: str, kind: str | None, columns: Mapping[str, Any] | None) -> Layout:
    """The layout of a file by its content; `kind` and `columns` override what would be found.

    Raises `KinvecError` for an empty file and for columns that fit no kind, `RecipeError` for a role that does not exist.
    """
    head = _head(path, name)
    if _looks_like_json(head):
        parse = Layout("jsonl", "", {})
    else:
        parse = _delimited_layout(path, head)
    if not parse.header and columns is None:
        return _headless(path, name, parse, kind)
    names = _names(path, name, parse)
    kind, roles = roles_of(names, name, kind, columns)
    return Layout(parse.form, kind, roles, parse.delimiter, parse.quoted, parse.header)


def roles_of(
    names: list[str], name: str, kind: str | None, columns: Mapping[str, Any] | None
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The kind that columns of these names hold, and the column of each role."""
    given = {role: _split(value) for role, value in (columns or {}).items()}
    known = {role for aliases in ALIASES.values() for role in aliases}
    for role in given:
        if role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            raise RecipeError(f"columns: there is no role '{role}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    for candidate in (kind,) if kind else ALIASES:
        roles = {}
        for role, aliases in ALIASES[candidate].items():
            found = given.get(role) or next(((alias,) for alias in aliases if alias in names), None)
            if found and all(part in names for part in found):
                roles[role] = found
        if "text" in roles and roles["text"] == ("headline",) and "short_description" in names:
            roles["text"] = ("headline", "short_description")
        if all(role in roles for role in NEEDED[candidate]):
            return candidate, roles
    missing = [part for parts in given.values() for part in parts if part not in names]
    have = ", ".join(map(repr, names[:12])) or "none"
    if missing:
        raise KinvecError(f"{name}: there is no column '{missing[0]}' (it has {have}); set columns to names that are there")
    wanted = f"a {kind} file needs {' and '.join(NEEDED[kind])}" if kind else f"known are {FORMS}"
    raise DataError("schema", name, 1, f"the columns {have} fit no kind of data; {wanted}", "name yours with columns: {query: …}")


def _split(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else tuple(str(value).split("+"))


def _head(path: Path, name: str) -> bytes:
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        raise DataError("empty", name, 0, "the file is empty", "give it at least one row")
    return head


def _looks_like_json(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _names(path: Path, name: str, parse: Layout) -> list[str]:
    """The union of the first records' columns, in order."""
    notes, names = Notes(strict=False), dict[str, None]()
    for _, (_, record) in zip(range(SAMPLE), records_of(path, name, parse, notes), strict=False):
        names.update(dict.fromkeys(record))
    if not names and notes.kept:
        raise notes.kept[0]
    return list(names)


def _delimited_layout(path: Path, head: bytes) -> Layout:
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = [line for line in text.splitlines()[:SAMPLE] if line.strip()]
    if all("\t" in line for line in lines):
        delimiter = "\t"
    else:
        delimiter = ";" if ";" in lines[0] and "," not in lines[0] else ","
    quoted = _is_quoted(text, delimiter, whole=len(head) < HEAD_BYTES)
    first = next(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))
    known = {alias for aliases in ALIASES.values() for names in aliases.values() for alias in names}
    return Layout("delimited", "", {}, delimiter, quoted, any(cell.strip() in known for cell in first))


def _is_quoted(text: str, delimiter: str, *, whole: bool) -> bool:
    """Whether quotes enclose cells. In tab-separated text they often stand for themselves: then strict parsing breaks."""
    if delimiter != "\t":
        return True
    if not whole:
        text = text[: text.rfind("\n") + 1]
    try:
        for _ in csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True):
            pass
    except csv.Error:
        return False
    return True


def _headless(path: Path, name: str, parse: Layout, kind: str | None) -> Layout:
    """A delimited file without a header whose shape tells: the STS Benchmark's (score, first, second in columns 4 to 6)."""
    for _, record in delimited_records(path, name, Notes(False), delimiter=parse.delimiter, quoted=parse.quoted, header=False):
        if kind in (None, "pairs") and len(record) >= 7 and re.fullmatch(r"\d+(\.\d+)?", record["4"]):
            return Layout("delimited", "pairs", {"score": ("4",), "first": ("5",), "second": ("6",)}, parse.delimiter, parse.quoted, False)
        break
    raise DataError("schema", name, 1, f"the first line names no known column; known are {FORMS}", "add a header line, or say columns: {text: 0}")


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
