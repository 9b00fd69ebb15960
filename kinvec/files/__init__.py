"""Readers and writers: every form of training data as it comes, memory-mapped; files written beside and renamed.

sources.py   what a user names → a plan; forms.py: how a file is parsed; roles.py: what its columns mean
records.py   the parsers, with line numbers; rows.py: records → rows; beir.py, nli.py, hub.py: whole folders
arrow.py     the memory-mapped cache; table.py: `open_data`; searches.py: what evaluation and encoding read
problems.py  how a bad row is named; writing.py: writers and hashes
"""

from __future__ import annotations

from kinvec.files.arrow import ArrowStrings, cache_folder
from kinvec.files.problems import DataError
from kinvec.files.roles import named_columns
from kinvec.files.searches import (
    TASKS,
    kind_of_pairs,
    open_pairs,
    open_problem,
    open_retrieval,
    read_documents,
    read_judgements,
    read_queries,
)
from kinvec.files.sources import has_split
from kinvec.files.table import Table, detect_kind, evenly, open_data
from kinvec.files.writing import (
    content_fingerprint,
    damaged,
    exact_key,
    normalise,
    read_written,
    replace_folder,
    saying_full,
    sweep,
    sweep_beside,
    text_id,
    text_key,
    text_keys,
    write_json,
    write_lines,
    write_text,
)

__all__ = [
    "TASKS",
    "ArrowStrings",
    "DataError",
    "Table",
    "cache_folder",
    "content_fingerprint",
    "damaged",
    "detect_kind",
    "evenly",
    "exact_key",
    "has_split",
    "kind_of_pairs",
    "named_columns",
    "normalise",
    "open_data",
    "open_pairs",
    "open_problem",
    "open_retrieval",
    "read_documents",
    "read_judgements",
    "read_queries",
    "read_written",
    "replace_folder",
    "saying_full",
    "sweep",
    "sweep_beside",
    "text_id",
    "text_key",
    "text_keys",
    "write_json",
    "write_lines",
    "write_text",
]
