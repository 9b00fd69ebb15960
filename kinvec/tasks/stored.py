"""Results on disk: a folder with `per_query.parquet` (one row a query or pair) and, written last, `results.json`.

A search has `documents.parquet` as well: the beginnings of the documents that its rows name, and
`cheaper.json` where cheaper vectors were measured.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from kinvec.contracts import KinvecError, Result, one_sentence
from kinvec.files import write_json
from kinvec.files.reading import read_object
from kinvec.files.records import parquet_batches

FORMAT = 1
MOST_ROWS = 10_000_000  # of a result's table
MANIFEST, ROWS, DOCUMENTS = "results.json", "per_query.parquet", "documents.parquet"
TABLES = {"per_query": ROWS, "documents": DOCUMENTS}  # of a result: its field → the file
CHEAPER = "cheaper.json"


def save_result(result: Result, folder: str | Path) -> Path:
    """Write a result into `folder`, made if missing. A folder that holds other things than a result is refused."""
    folder = Path(folder)
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # from here until it is written again there is no result here
    _write_table(result.per_query, folder / ROWS)
    if result.documents:
        _write_table(result.documents, folder / DOCUMENTS)
    else:
        (folder / DOCUMENTS).unlink(missing_ok=True)
    head = summary(result)
    (folder / CHEAPER).unlink(missing_ok=True)
    if cheaper := head.pop("cheaper"):
        write_json(folder / CHEAPER, cheaper)
    write_json(folder / MANIFEST, head)
    return folder


def _write_table(columns: dict[str, list[Any]], path: Path) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(pa.table(columns), beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def summary(result: Result) -> dict[str, Any]:
    """What `results.json` and, under `cheaper`, `cheaper.json` say: all but the rows of queries and documents."""
    head = {field.name: getattr(result, field.name) for field in fields(result) if field.name not in TABLES}
    return {"format": FORMAT, **head, "queries": len(result.per_query["id"])}


def refuse_foreign(folder: Path) -> None:
    """Raise `KinvecError` unless a result may be written into `folder`: it is absent, empty, or held one before."""
    if folder.exists() and not folder.is_dir():
        raise KinvecError(f"{folder} is a file; name a folder for the result")
    foreign = (
        [p.name for p in folder.iterdir() if p.name not in (MANIFEST, CHEAPER, *TABLES.values()) and p.suffix != ".tmp"]
        if folder.is_dir()
        else []
    )
    if foreign:
        raise KinvecError(
            f"{folder} holds other things than a result ('{min(foreign)}'); name an empty or a new folder"
        )


def load_result(folder: str | Path) -> Result:
    """Read what `save_result` wrote. Raises `KinvecError` where there is no finished result, or it does not read."""
    folder = Path(folder)
    if not all((folder / name).is_file() for name in (MANIFEST, ROWS)):
        raise KinvecError(
            f"{folder}: there is no finished result here (results.json); run kinvec evaluate --out {folder}"
        )
    head = read_object(folder / MANIFEST)
    with one_sentence(f"{folder}: the result does not read", "evaluate again"):
        return _checked(folder, head)


def _checked(folder: Path, head: dict[str, Any]) -> Result:
    """The result of a folder, each of its fields of the kind that `Result` declares."""
    cheaper = read_object(folder / CHEAPER) if (folder / CHEAPER).is_file() else {}
    rows = _read_table(folder / ROWS)
    documents = _read_table(folder / DOCUMENTS) if (folder / DOCUMENTS).is_file() else {}
    if head.pop("format", None) != FORMAT:
        raise KinvecError(f"{folder / MANIFEST}: not a result of this version of kinvec; evaluate again")
    if head.pop("queries", None) != len(rows["id"]):
        raise KinvecError(f"{folder}: {ROWS} is not the one that {MANIFEST} was written with; evaluate again")
    parts = {"per_query": rows, "documents": documents, "cheaper": cheaper}
    return TypeAdapter(Result).validate_python(head | parts)


def _read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a table. Raises `KinvecError` where it would unfold beyond what a result can be."""
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise KinvecError(f"{path}: more rows than a result has; evaluate again")
        batches = list(parquet_batches(file, path, str(path)))
        return (pa.Table.from_batches(batches) if batches else file.schema_arrow.empty_table()).to_pydict()


def load_results(folder: str | Path) -> dict[str, Result]:
    """The results of a folder by task: its own, or those of its sub-folders (as a run's `results/base`).

    Where a task was measured on several splits, they are part of the name.
    """
    folder = Path(folder)
    places = [folder] if (folder / MANIFEST).exists() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST}"))
    if not places:
        raise KinvecError(f"{folder}: there is no result here, nor in a sub-folder; run kinvec evaluate --out {folder}")
    found = [load_result(place) for place in places]
    times = Counter(result.task for result in found)
    return {f"{one.task}, {one.split}" if times[one.task] > 1 else one.task: one for one in found}
