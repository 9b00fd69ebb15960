"""The form of a file, told from its first bytes: how it is to be parsed, before anyone asks what it means."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from kinvec.files import records
from kinvec.files.problems import DataError, Notes
from kinvec.files.records import Record

HEAD_BYTES = 1 << 20
SNIFFED_LINES = 100
DELIMITERS = {".csv": ",\t;", ".tsv": "\t,;"}  # by suffix, in the order they are tried


@dataclass(frozen=True)
class Form:
    """The name of a parser and, for delimited text, its options."""

    name: str
    delimiter: str = ","
    quoted: bool = True
    header: bool = True


def records_of(path: Path, name: str, form: Form, notes: Notes, columns: list[str] | None = None) -> Iterator[Record]:
    """The records of a file of this form; `columns` spares Parquet reading the others."""
    if form.name == "parquet":
        return records.parquet_records(path, name, columns)
    if form.name == "delimited":
        return records.delimited_records(
            path, name, notes, delimiter=form.delimiter, quoted=form.quoted, header=form.header
        )
    parsers = {
        "jsonl": records.jsonl_records, "array": records.array_records, "squad": records.squad_records,
        "lines": records.text_records, "conllu": records.conllu_records,
    }  # fmt: skip
    return parsers[form.name](path, name, notes)


def form_of(path: Path, name: str, known_columns: Collection[str]) -> Form:
    """The form of a file. `known_columns` are names by which the header of a delimited file is recognised.

    Raises `DataError` for a file that is empty, compressed, or JSON of no known shape.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PAR1") or path.suffix == ".parquet":
        return Form("parquet")
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise DataError("form", name, 0, "the file is compressed", "unpack it first")
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    if not text.strip():
        raise DataError("empty", name, 0, "the file is empty", "give it at least one row")
    if path.suffix == ".conllu":
        return Form("conllu")
    if path.suffix in DELIMITERS:
        return _delimited(text, DELIMITERS[path.suffix], known_columns, whole=len(head) < HEAD_BYTES)
    if json_form := _json_form(text, path.suffix):
        return Form(json_form)
    if path.suffix != ".txt":
        form = _delimited(text, ",\t;", known_columns, whole=len(head) < HEAD_BYTES)
        if form.header:
            return form
    return Form("lines")


def _json_form(text: str, suffix: str) -> str:
    """`array`, `squad` or `jsonl`, or nothing: a text file may begin with a bracket too."""
    named_json = suffix.startswith(".json") or suffix == ".ndjson"
    begin = text.lstrip()
    if begin[0] == "[" and (named_json or re.match(r'\[\s*["{\]]', begin)):
        return "array"
    if records.SQUAD.match(text):
        return "squad"
    if named_json or (begin[0] == "{" and _is_object(begin.split("\n", 1)[0])):
        return "jsonl"
    return ""


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return len(line) > HEAD_BYTES // 2  # one very long line, cut by the head


def _delimited(text: str, delimiters: str, known_columns: Collection[str], *, whole: bool) -> Form:
    """Separator, quoting and whether there is a header: the separator that makes the first line name a known column."""
    csv.field_size_limit(HEAD_BYTES)
    if not whole:
        text = text[: text.rfind("\n") + 1] or text
    lines = [line for line in text.splitlines() if line.strip()][:SNIFFED_LINES]
    for delimiter in delimiters:
        cells = next(csv.reader(lines[:1], delimiter=delimiter))
        if any(cell.strip() in known_columns for cell in cells):
            return Form("delimited", delimiter, _is_quoted(text, delimiter), True)
    delimiter = "\t" if all("\t" in line for line in lines) else ";" if all(";" in line for line in lines) else ","
    return Form("delimited", delimiter, _is_quoted(text, delimiter), False)


def _is_quoted(text: str, delimiter: str) -> bool:
    """Whether quotes enclose cells. Between tabs they often stand for themselves: then strict parsing breaks.

    Or it leaves quotes within cells though none is doubled, which no writer of quoted cells would do.
    """
    if delimiter != "\t":
        return True
    try:
        rows = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        left = any('"' in cell for row in rows for cell in row)
    except csv.Error:
        return False
    return '""' in text or not left
