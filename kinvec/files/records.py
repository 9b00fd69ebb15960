"""A file as records: JSONL, JSON arrays, delimited text, Parquet and plain lines, each streamed, each record with its line.

A record is a dict of column names to values as they stand in the file. What cannot be parsed goes to `notes` and is left out.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinvec.files.problems import DataError, Notes

Record = tuple[int, dict[str, Any]]
"""Line (counted from 1; for Parquet the row) and values."""


def decoded_lines(path: Path, name: str, notes: Notes) -> Iterator[tuple[int, str]]:
    """Every line, decoded as UTF-8 (a leading byte order mark is dropped), its number counted from 1."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                notes.bad(_not_utf8(name, number, raw, error.start))


def _not_utf8(name: str, line: int, raw: bytes, at: int) -> DataError:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        message, encoding = "the file is UTF-16, not UTF-8", "utf-16"
    else:
        message, encoding = f"byte {at + 1} of the line (0x{raw[at]:02x}) is not UTF-8", "latin-1"
    return DataError("encoding", name, line, message, f"convert the file, for example: iconv -f {encoding} -t utf-8")


def jsonl_records(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    """One JSON object a line; blank lines are nothing."""
    for number, line in decoded_lines(path, name, notes):
        if line.strip():
            record = json_object(line, name, number, notes)
            if record is not None:
                yield number, record


def json_object(text: str, name: str, line: int, notes: Notes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        what = error.msg[:1].lower() + error.msg[1:] if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        notes.bad(DataError("json", name, line, f"broken JSON ({what}{at})"))
        return None
    if not isinstance(value, dict):
        notes.bad(DataError("schema", name, line, f"{kind_of(value)} stands where a JSON object with named texts should"))
        return None
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def delimited_records(
    path: Path, name: str, notes: Notes, *, delimiter: str, quoted: bool, header: bool
) -> Iterator[Record]:
    """Rows of a CSV or TSV. With `header` the first row names the columns, else they are named "0", "1", ….

    A record spanning several lines (a quoted line break) has the number of its first. Without a header rows may differ in
    width; with one a wider row is a problem, because a text has been cut in two.
    """
    csv.field_size_limit(sys.maxsize)
    begun: list[int] = []  # the number of the first line that the record in hand took

    def lines() -> Iterator[str]:
        for number, line in decoded_lines(path, name, notes):
            begun.append(number)
            yield line

    reader = csv.reader(
        lines(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted
    )
    names: list[str] | None = None
    while True:
        begun.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            notes.bad(DataError("csv", name, begun[0] if begun else 0, f"broken quoting ({error})"))
            continue
        if not cells:
            continue
        if not header:
            yield begun[0], {str(i): cell for i, cell in enumerate(cells)}
        elif names is None:
            names = [cell.strip() for cell in cells]
        elif len(cells) > len(names):
            message = f"the row has {len(cells)} cells, the header {len(names)}"
            notes.bad(DataError("csv", name, begun[0], message, "quote texts that contain the separator"))
        else:
            yield begun[0], dict(zip(names, cells, strict=False))
