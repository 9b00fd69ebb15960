"""Data as evaluation and encoding want it: search problems, scored pairs, and plain streams of (id, text)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinvec.contracts import Corpus, PairData, RetrievalData
from kinvec.files import beir
from kinvec.files.arrow import ArrowStrings
from kinvec.files.problems import DataError, Notes
from kinvec.files.table import existing, open_data


def open_retrieval(source: str | Path, *, split: str = "test", columns: Mapping[str, Any] | None = None) -> RetrievalData:
    """A search problem from a BEIR folder."""
    path = existing(str(source))
    return _open_beir(path, split)


def _open_beir(folder: Path, split: str) -> RetrievalData:
    notes = Notes(strict=True)
    path = beir.qrels_path(folder, split)
    qrels = beir.read_qrels(path, str(path), notes).grades
    queries = beir.judged_queries(folder / "queries.jsonl", str(folder / "queries.jsonl"), qrels, notes)
    missing = next((query for query in qrels if query not in queries), None)
    if missing is not None:
        raise DataError("missing", str(path), 0, f"query '{missing}' is judged but is not in queries.jsonl", "add it")
    corpus = beir.documents(folder / "corpus.jsonl")
    return RetrievalData(
        Corpus(ArrowStrings(corpus, "id"), ArrowStrings(corpus, "text")), queries, qrels,
        beir.beir_fingerprint(folder, split), name=folder.resolve().name, split=split,
    )  # fmt: skip


def open_pairs(source: str | Path, *, columns: Mapping[str, Any] | None = None) -> PairData:
    """Scored pairs (semantic textual similarity) of one file."""
    table = open_data(source, kind="pairs", columns=columns)
    first, second = (ArrowStrings(table.arrow, name) for name in ("first", "second"))
    scores = table.rows["score"].to_pylist()
    return PairData(first, second, scores, table.fingerprint, name=Path(source).stem)
