"""Rows → batches. Batch k is a function of (data, seed, k) alone: a resumed run sees what it would have seen anyway.

settings.py   which data, and how they are read and drawn
retrieval.py  queries with positives and negatives; labelled.py: P labels × K texts; scored.py: pairs with a score;
              plain.py: texts
order.py      the order of an epoch, for all but labelled texts
held_out.py   the share of the rows that training never sees
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from kinvec.sampling.held_out import hold_out
from kinvec.sampling.labelled import LabelBatch, LabelSource, label_source
from kinvec.sampling.plain import TextBatch, TextSource, text_source
from kinvec.sampling.retrieval import (
    KnownPositives,
    PairBatch,
    PairSource,
    as_retrieval,
    build_batch,
    id_keys,
    join,
    pair_source,
)
from kinvec.sampling.scored import ScoredBatch, ScoredSource, scored_source
from kinvec.sampling.settings import DataSettings


@runtime_checkable
class Batch(Protocol):
    """What every step has: the texts to embed with the query prompt and with the document prompt, and rows to name."""

    @property
    def queries(self) -> Sequence[str]: ...

    @property
    def documents(self) -> Sequence[str]: ...

    @property
    def ids(self) -> Sequence[str]: ...


@runtime_checkable
class Source(Protocol):
    """What training draws its batches from, with the number of its rows; `batch` counts steps from 0."""

    def __len__(self) -> int: ...

    def steps_per_epoch(self, batch_size: int) -> int: ...

    def batch(self, step: int, batch_size: int) -> Any: ...


__all__ = [
    "Batch", "DataSettings", "KnownPositives", "LabelBatch", "LabelSource", "PairBatch", "PairSource", "ScoredBatch",
    "ScoredSource", "Source", "as_retrieval", "build_batch", "hold_out", "id_keys", "join", "label_source",
    "pair_source", "TextBatch", "TextSource", "scored_source", "text_source",
]  # fmt: skip
