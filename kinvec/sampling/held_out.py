"""A share of a table's rows that training never sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from kinvec.files import Table, text_key


def hold_out(
    table: Table, share: float, name: str, column: str = "query"
) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"]]:
    """(kept, held out) rows: about `share` of the texts of `column`, chosen by a hash of the text and `name`.

    A text's rows stay together, and the same texts are held out whatever the order of the file.
    """
    keys = np.concatenate([_draws(batch.column(column).to_pylist(), name) for batch in table.batches([column])])
    distinct = np.unique(keys)
    count = round(len(distinct) * share) if len(distinct) > 1 else 0
    held = np.isin(keys, distinct[: max(count, 1 if share > 0 and len(distinct) > 1 else 0)])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _draws(texts: Sequence[str], name: str) -> Int[np.ndarray, " n"]:
    return np.array([text_key(f"{name}\x00{text}") for text in texts], dtype=np.int64)
