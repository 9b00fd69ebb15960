"""A file as records: JSONL, JSON arrays, SQuAD, delimited text, Parquet, plain lines and CoNLL-U, each streamed.

A record is a dict of column names to values as they stand in the file, with the line it begins on. What cannot be
parsed goes to `notes` (which raises it, or counts it) and is left out.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kinvec.files.problems import REMEDY, DataError, Notes

Record = tuple[int, dict[str, Any]]
"""Line (counted from 1; for Parquet the row) and values."""

WINDOW = 1 << 20  # characters of a JSON array read at a time
LONGEST = 64 << 20  # bytes of a line, characters of a row or a cell: a text is never that long, a broken file may be
MOST_CELLS = 10_000  # of a row of delimited text: a thousand times as many as such a file has of texts
MOST_UNFOLDED, MOST_UNFOLDING = 1 << 28, 1000  # bytes of a Parquet file's rows; and for each byte of the file
MARGIN = 16  # a JSON error this near the end of the window may only mean that more must be read
ARRAY = re.compile(r"\s*\[")
SQUAD = re.compile(r'\s*\{(?:\s*"version"\s*:\s*"[^"]*"\s*,)?\s*"data"\s*:\s*\[')
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not UTF-8


def decoded_lines(path: Path, name: str, notes: Notes) -> Iterator[tuple[int, str]]:
    """Every line, decoded as UTF-8 (a leading byte order mark is dropped), its number counted from 1.

    Raises `DataError` for a line that is longer than `LONGEST`, whatever `notes` does with bad rows.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
            if len(raw) == LONGEST:
                raise _too_long("line", name, number)
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                notes.bad(_not_utf8(name, number, raw, error.start))


def _too_long(what: str, name: str, line: int) -> DataError:
    remedy = "is a quote or a bracket left open? Correct the file"
    return DataError("length", name, line, f"the {what} is longer than {LONGEST >> 20} MiB", remedy)


def _not_utf8(name: str, line: int, raw: bytes, at: int) -> DataError:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        message, encoding = "the file is UTF-16, not UTF-8", "utf-16"
    else:
        message, encoding = f"byte {at + 1} of the line (0x{raw[at]:02x}) is not UTF-8", "latin-1"
    return DataError("encoding", name, line, message, f"convert the file, for example: iconv -f {encoding} -t utf-8")


def jsonl_records(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    """One JSON object a line; blank lines are nothing."""
    for number, line in decoded_lines(path, name, notes):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            remedy = "write one object a line, or a JSON array" if line.strip() == "{" else REMEDY
            notes.bad(DataError("json", name, number, f"broken JSON ({_json_fault(error)})", remedy))
            continue
        yield from _as_record(value, name, number, notes)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]}, character {error.colno} of the line"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _as_record(value: Any, name: str, line: int, notes: Notes) -> Iterator[Record]:
    if isinstance(value, dict):
        yield line, value
    elif isinstance(value, str):  # a list of bare texts
        yield line, {"text": value}
    else:
        notes.bad(DataError("schema", name, line, f"{kind_of(value)} stands where an object with named texts should"))


def kind_of(value: Any) -> str:
    """What a value is, in words for an error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "a text"
    return (
        "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
    )


class _Window:
    """A sliding piece of a text file: `text` from `at` on is still to be read; `line` is the line of `at`."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text, self.at, self.line, self._step = "", 0, 1, WINDOW

    def close(self) -> None:
        self._file.close()

    def fill(self) -> bool:
        """Read on, forgetting what is done; False at the end. The step doubles while one element is not whole yet."""
        raw = self._file.read(self._step)
        self._step *= 2
        self.text, self.at = self.text[self.at :] + self._decoder.decode(raw, final=not raw), 0
        return bool(raw)

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at, self._step = to, WINDOW

    def next_mark(self) -> str:
        """The next character that is no white space, without passing it; empty at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.advance(end)
            if end < len(self.text):
                return self.text[end]
            if not self.fill():
                return ""


def array_items(path: Path, name: str, notes: Notes, opening: re.Pattern[str] = ARRAY) -> Iterator[tuple[int, Any]]:
    """The elements of the JSON array that `opening` begins, one at a time, each with its line.

    A syntax error ends the reading whatever `notes` does with bad rows, because nobody knows where the next row begins.
    """
    window = _Window(path)
    try:
        window.fill()
        start = opening.match(window.text)
        assert start is not None, f"{name} was taken for a JSON array"
        window.advance(start.end())
        while (mark := window.next_mark()) != "]":
            line, begin = window.line, window.at
            value, end = _element(window, name) if mark else (None, begin)
            begin = window.at  # the window may have moved on to take the whole element
            spoiled = NOT_UTF8.search(window.text, begin, end) if mark else None
            if spoiled:
                notes.bad(_not_utf8_at(path, name, line + window.text.count("\n", begin, spoiled.start())))
            elif mark:
                yield line, value
            window.advance(end)
            mark = window.next_mark()
            if mark == ",":
                window.advance(window.at + 1)
            elif mark != "]":
                what = (
                    "the JSON array breaks off: its closing ']' is missing"
                    if not mark
                    else "a ',' is missing before this row"
                )
                raise DataError("json", name, window.line, what, "save the whole file again")
    finally:
        window.close()


def _element(window: _Window, name: str) -> tuple[Any, int]:
    decoder = json.JSONDecoder()
    more = True
    while True:
        try:
            return decoder.raw_decode(window.text, window.at)
        except RecursionError:
            raise DataError("json", name, window.line, "broken JSON (nested too deeply)") from None
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - MARGIN
            if len(window.text) - window.at > LONGEST:
                raise _too_long("row", name, window.line) from None
            if more and cut:
                more = window.fill()
                continue
            line = window.line + window.text.count("\n", window.at, error.pos)
            message = error.msg[:1].lower() + error.msg[1:]
            raise DataError("json", name, line, f"broken JSON ({message})", "correct the file") from None
        except ValueError as error:  # a number of thousands of digits
            raise DataError("json", name, window.line, f"broken JSON ({error})", "correct the file") from None


def _not_utf8_at(path: Path, name: str, line: int) -> DataError:
    with open(path, "rb") as file:
        raw = next(raw for number, raw in enumerate(file, 1) if number == line)
    at = next((error.start for error in [_decode_error(raw)] if error), 0)
    return _not_utf8(name, line, raw, at)


def _decode_error(raw: bytes) -> UnicodeDecodeError | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def array_records(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    """The objects of a JSON array."""
    for line, value in array_items(path, name, notes):
        yield from _as_record(value, name, line, notes)


def squad_records(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    """`question` and `context` of every question of a SQuAD file; those without an answer are left out.

    Rajpurkar et al. 2016 and 2018: data → paragraphs (context) → qas (question, is_impossible). Their `id` is not read:
    in files made from other sets (TyDi QA's gold passages) one id stands for many questions.
    """
    for line, article in array_items(path, name, notes, SQUAD):
        try:
            asked = [(p["context"], qa) for p in article["paragraphs"] for qa in p["qas"]]
            found = [{"question": qa["question"], "context": context} for context, qa in asked if not _unanswerable(qa)]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else "a value of another type"
            notes.bad(
                DataError("schema", name, line, f"not as SQuAD has it: paragraphs, context, qas, question ({what})")
            )
            continue
        for record in found:
            yield line, record


def _unanswerable(qa: dict[str, Any]) -> bool:
    return bool(qa.get("is_impossible"))


def delimited_records(
    path: Path, name: str, notes: Notes, *, delimiter: str, quoted: bool, header: bool
) -> Iterator[Record]:
    """Rows of a CSV or TSV. With `header` the first row names the columns, else they are named "0", "1", ….

    A record spanning several lines (a quoted line break) has the number of its first. Without a header rows may differ
    in width; with one the cells that a row lacks are empty, and a wider row is a problem: a text has been cut in two.
    """
    csv.field_size_limit(LONGEST)
    begun: list[int] = []  # the numbers of the lines that the record in hand took

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
            if "field limit" in str(error):
                raise _too_long("cell", name, begun[0]) from None
            what = "a bare carriage return" if "new-line" in str(error) else f"broken quoting ({error})"
            notes.bad(DataError("csv", name, begun[0], what))
            continue
        if not cells:
            continue
        if len(cells) > MOST_CELLS:
            what = f"the row has {len(cells):,} cells, and more than {MOST_CELLS:,} are not read"
            raise DataError("csv", name, begun[0], what, "is this a table of texts? Correct the file")
        if not header:
            yield begun[0], {str(i): cell for i, cell in enumerate(cells)}
        elif names is None:
            names = [cell.strip() for cell in cells]
        elif len(cells) > len(names):
            message = f"the row has {len(cells)} cells, the header {len(names)}"
            notes.bad(DataError("csv", name, begun[0], message, "quote the texts that hold the separator"))
        else:
            yield begun[0], dict(zip_longest(names, cells, fillvalue=""))


def parquet_records(path: Path, name: str, columns: list[str] | None) -> Iterator[Record]:
    """Rows of a Parquet file, of the named columns only; the "line" is the row, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in parquet_batches(file, path, name, columns):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        what = str(error).splitlines()[0]
        raise DataError(
            "parquet", name, 0, f"not a readable Parquet file after row {row:,} ({what})", "write it again"
        ) from None


def parquet_batches(file: Any, path: Path, name: str, columns: list[str] | None = None) -> Iterator[Any]:
    """The record batches of the `pq.ParquetFile` at `path`, of the named columns (of those that are there) or of all.

    A dictionary holds a long cell once, however many rows have it. Raises `DataError` for a file that unfolds to more
    than `MOST_UNFOLDING` times its own size (and `MOST_UNFOLDED`), and for a cell longer than `LONGEST`.
    """
    import pyarrow as pa

    there = [c for c in columns if c in file.schema_arrow.names] if columns else None
    _refuse_long_cells(file.metadata, name)
    left = max(MOST_UNFOLDED, MOST_UNFOLDING * path.stat().st_size)
    for group in range(file.metadata.num_row_groups):
        rows = max(1, min(1024, LONGEST // _longest_shared(path, file.metadata, group, there)))
        for folded in file.iter_batches(rows, row_groups=[group], columns=there):
            cells = [column.cast(_unfolded(column.type)) for column in folded.columns]
            batch = pa.RecordBatch.from_arrays(cells, names=folded.schema.names)
            left -= batch.nbytes
            if left < 0:
                what = "the rows unfold to a thousand times the bytes of the file"
                raise DataError("length", name, 0, what, "write it again, without cells that repeat that often")
            yield batch


def _unfolded(kind: Any) -> Any:
    """The type of the same cells without a dictionary."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return pa.list_(_unfolded(kind.value_type))
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _longest_shared(path: Path, metadata: Any, group: int, columns: list[str] | None) -> int:
    """Bytes of the longest cell among the dictionaries of a row group; at least 1."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    shared = [part.path for part in parts if part.physical_type == "BYTE_ARRAY"]
    longest = [1]
    with pq.ParquetFile(path, metadata=metadata, read_dictionary=shared) as file:
        for column in next(file.iter_batches(1, row_groups=[group], columns=columns), pa.record_batch({})).columns:
            while pa.types.is_list(column.type):
                column = column.flatten()
            if pa.types.is_dictionary(column.type):
                longest.append(pc.max(pc.binary_length(column.dictionary)).as_py() or 1)
    return max(longest)


def _refuse_long_cells(metadata: Any, name: str) -> None:
    """A cell that is compressed a thousandfold would be unfolded whole.

    What a row group says of its columns (`.column(i)`) is not asked for: where it is damaged, Arrow ends the process.
    """
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        if group.total_byte_size > LONGEST * max(group.num_rows, 1) * metadata.num_columns:
            raise _too_long("row", name, 0)


def text_records(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    """One text a line, stripped; blank lines are nothing."""
    for number, line in decoded_lines(path, name, notes):
        if text := line.strip():
            yield number, {"text": text}


def conllu_records(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    """The sentences of a CoNLL-U treebank, from its `# text = ` lines."""
    for number, line in decoded_lines(path, name, notes):
        if line.startswith("# text = "):
            yield number, {"text": line.removeprefix("# text = ").strip()}
