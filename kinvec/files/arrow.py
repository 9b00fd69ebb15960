"""Rows kept as an Arrow file in the cache and memory-mapped: however large the data, Python holds one batch of it.

A cached table is `NAME.arrow` and, written after it, `NAME.json` (row count, checksum, notes): a pair, or nothing. One
that is damaged is made again.
The name is a fingerprint of the content read, of how it was read and of the reader's version.
"""

from __future__ import annotations

import errno
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from kinvec.console import say
from kinvec.contracts import KinvecError
from kinvec.files.problems import Notes
from kinvec.files.writing import beside_path, content_fingerprint, write_json

READER_VERSION = 3  # raise it whenever the same file would be read into other rows
BATCH_ROWS, BATCH_CHARACTERS = 4096, 8 << 20  # a record batch is closed at whichever comes first
KEPT_DAYS = 30  # since a table was last read
DAY = 86_400  # seconds
FULL = "the disk is full"
UNWRITABLE = {
    errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: FULL,
    errno.EACCES: "the folder may not be written to", errno.EROFS: "the disk is read-only",
}  # fmt: skip


def cache_folder(part: str = "data") -> Path:
    """`$KINVEC_CACHE`, or `~/.cache/kinvec`, and in it `part`."""
    return Path(os.environ.get("KINVEC_CACHE") or Path.home() / ".cache" / "kinvec") / part


def fingerprint_of(*parts: Any) -> str:
    """One fingerprint of several values (content fingerprints, options), any change of which is another one."""
    return content_fingerprint(json.dumps([READER_VERSION, *parts], sort_keys=True, ensure_ascii=False).encode())


class ArrowTable:
    """A memory-mapped Arrow file: rows by number, or batch by batch through plain reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _mapped(self) -> list[pa.RecordBatch]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(batch.num_rows for batch in self._mapped))

    @cached_property
    def schema(self) -> pa.Schema:
        return pa.ipc.open_file(pa.memory_map(str(self.path))).schema

    @cached_property
    def rows(self) -> pa.Table:
        return pa.Table.from_batches(self._mapped, schema=self.schema)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def value(self, column: str, row: int) -> Any:
        """One cell as a Python value."""
        batch, at = self._place(row)
        return batch.column(column)[at].as_py()

    def row(self, row: int) -> dict[str, Any]:
        """One row as Python values by column."""
        batch, at = self._place(row)
        return {name: batch.column(i)[at].as_py() for i, name in enumerate(self.schema.names)}

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        number = bisect_right(self._ends, row)
        return self._mapped[number], row - (self._ends[number - 1] if number else 0)

    def let_go(self) -> None:
        """Unmap the file, whose pages that were read count as the process's own; the next look maps it anew."""
        for name in ("_mapped", "_ends", "rows"):
            self.__dict__.pop(name, None)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Every batch in order, by plain reads into memory that is freed again: a pass takes one batch's memory.

        (The pages of a memory map count as the process's own until the machine wants them back.)
        """
        with pa.OSFile(str(self.path)) as file:
            fields = None if columns is None else [self.schema.get_field_index(name) for name in columns]
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i)


class ArrowStrings(Sequence[str]):
    """A text column of a memory-mapped table as a sequence of Python strings, each made when it is asked for."""

    def __init__(self, table: ArrowTable, column: str) -> None:
        self.table, self.column = table, column

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        value: str = self.table.value(self.column, index % len(self))
        return value

    def __iter__(self) -> Iterator[str]:
        for batch in self.table.batches([self.column]):
            yield from batch.column(0).to_pylist()


def cached_table(
    key: str, schema: pa.Schema, produce: Callable[[Notes], Iterable[tuple[Any, ...]]], notes: Notes, root: str
) -> ArrowTable:
    """The rows of `produce(notes)` as a memory-mapped table, from the cache where they are there already.

    What the producer noted is noted again when the rows come from the cache; if `notes` is strict the first problem is
    raised, and nothing is kept. `root` is the source as the user named it: it begins the names of the files in notes.
    A full disk is a `KinvecError`, and leaves nothing behind.
    """
    path, manifest = cache_folder() / f"{key}.arrow", cache_folder() / f"{key}.json"
    found = _read_manifest(path, manifest)
    if found is None:
        own = Notes(notes.strict)
        with _or_nothing(path, manifest):
            rows = _write(path, schema, produce(own))
            write_json(manifest, {"rows": rows, "checksum": content_fingerprint(path), **own.to_json(root)})
        _forget_old()
    else:
        own = Notes.from_json(found, root)
        with suppress(OSError):
            os.utime(manifest)
    notes.take(own)
    return ArrowTable(path)


def _forget_old() -> None:
    """Delete the tables that nothing has read for KEPT_DAYS, and what a killed process left half-written a day ago.

    A table that is open stays readable until it is closed.
    """
    now = time.time()
    for manifest in cache_folder().glob("*.json"):
        with suppress(OSError):  # another process may be doing the same
            if manifest.stat().st_mtime < now - KEPT_DAYS * DAY:
                manifest.with_suffix(".arrow").unlink(missing_ok=True)
                manifest.unlink()
    for left in cache_folder().glob(".*.tmp"):
        with suppress(OSError):
            if left.stat().st_mtime < now - DAY:
                left.unlink()


def _read_manifest(path: Path, manifest: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        if content_fingerprint(path) == found["checksum"]:
            return found
        say(f"{path}: the copy of the data is damaged; made again")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, schema: pa.Schema, rows: Iterable[tuple[Any, ...]]) -> int:
    beside = beside_path(path)
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _record_batches(schema, rows):
                writer.write_batch(batch)
                written += batch.num_rows
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return written


@contextmanager
def _or_nothing(path: Path, manifest: Path) -> Iterator[None]:
    """Leave nothing behind if writing fails, and say what to do about a disk that is full or not ours to write on."""
    try:
        yield
    except BaseException as error:
        for file in (path, manifest):
            with suppress(OSError):
                file.unlink()
        if not isinstance(error, OSError) or error.errno not in UNWRITABLE:
            raise
        why = UNWRITABLE[error.errno]
        message = f"{path.parent}: {why}, and the memory-mapped copy of the data belongs there"
        raise KinvecError(f"{message}; free some space, or set KINVEC_CACHE to a folder elsewhere") from None


def _record_batches(schema: pa.Schema, rows: Iterable[tuple[Any, ...]]) -> Iterator[pa.RecordBatch]:
    held: list[tuple[Any, ...]] = []
    characters = 0
    for row in rows:
        held.append(row)
        characters += sum(_size(value) for value in row)
        if len(held) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield _record_batch(schema, held)
            held, characters = [], 0
    if held:
        yield _record_batch(schema, held)


def _record_batch(schema: pa.Schema, rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = [pa.array(values, type=f.type) for f, values in zip(schema, zip(*rows, strict=True), strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list) else 8
