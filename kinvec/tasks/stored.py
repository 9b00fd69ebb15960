"""Results on disk: a folder with `per_query.parquet` (one row a query or pair) and, written last, `results.json`.

A search has `documents.parquet` as well: the beginnings of the documents that its rows name, and
`cheaper.json` where cheaper vectors were measured.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kinvec.contracts import KinvecError, Result
from kinvec.files import write_json

FORMAT = 1
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
    try:
        head = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        cheaper = json.loads((folder / CHEAPER).read_text("utf-8")) if (folder / CHEAPER).exists() else {}
        rows = pq.read_table(folder / ROWS).to_pydict()
        documents = pq.read_table(folder / DOCUMENTS).to_pydict() if (folder / DOCUMENTS).exists() else {}
    except FileNotFoundError:
        raise KinvecError(
            f"{folder}: there is no finished result here (results.json); run kinvec evaluate --out {folder}"
        ) from None
    except (ValueError, pa.ArrowInvalid) as error:
        raise KinvecError(f"{folder}: the result does not read ({error}); evaluate again") from None
    if head.pop("format", None) != FORMAT:
        raise KinvecError(f"{folder / MANIFEST}: not a result of this version of kinvec; evaluate again")
    if head.pop("queries", None) != len(rows["id"]):
        raise KinvecError(f"{folder}: {ROWS} is not the one that {MANIFEST} was written with; evaluate again")
    return Result(**head, per_query=rows, documents=documents, cheaper=cheaper)


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
