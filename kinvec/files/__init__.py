"""Readers and writers: every form of training data as it comes, streamed into memory-mapped Arrow; files renamed into place."""

from __future__ import annotations

from kinvec.files.problems import DataError
from kinvec.files.searches import open_pairs, open_retrieval
from kinvec.files.table import Table, detect_kind, open_data
from kinvec.files.writing import (
    content_fingerprint,
    normalise,
    replace_folder,
    text_id,
    text_key,
    text_keys,
    write_json,
    write_text,
)

__all__ = [
    "DataError", "Table", "content_fingerprint", "detect_kind", "normalise", "open_data", "open_pairs", "open_retrieval",
    "replace_folder", "text_id", "text_key", "text_keys", "write_json", "write_text",
]  # fmt: skip
