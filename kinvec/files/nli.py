"""Natural language inference as retrieval examples: a premise, what it entails, what it contradicts (hard negatives).

The labelled pairs of examples are spooled to a memory-mapped table first, because those of one premise may stand far
apart. Where pairs are asked for, they are scored: 1 for what is entailed, 0 for what is contradicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kinvec.files.arrow import ArrowStrings, ArrowTable, cached_table
from kinvec.files.problems import BadValue, DataError, Notes
from kinvec.files.records import decoded_lines
from kinvec.files.roles import NLI_LABELS
from kinvec.files.rows import Columns, Row, judged_row, text_of
from kinvec.files.writing import text_id, text_keys

PAIRS = pa.schema([
    pa.field("premise", pa.string()), pa.field("hypothesis", pa.string()), pa.field("label", pa.int8()),
    pa.field("file", pa.int32()), pa.field("line", pa.int64()),
])  # fmt: skip
PARTS = ("s1", "s2", "labels")


def nli_row(record: Mapping[str, Any], columns: Columns) -> Row:
    """premise, hypothesis, label as 0 entailment, 1 neutral, 2 contradiction, -1 none."""
    label = record.get(columns["label"][0])
    number = NLI_LABELS.get(label.strip().lower(), None) if isinstance(label, str) else label
    if number not in (0, 1, 2, -1) or isinstance(number, bool):
        raise BadValue("schema", f"'{columns['label'][0]}' is {label!r}, not entailment, neutral or contradiction")
    return text_of(record, columns, "premise"), text_of(record, columns, "hypothesis"), number


def part_paths(path: Path, split: str) -> list[Path]:
    """`s1.SPLIT`, `s2.SPLIT`, `labels.SPLIT` of a folder, or beside one of them; empty if there are none."""
    if path.is_dir():
        found = [path / f"{part}.{split}" for part in PARTS]
        if not any(path.glob("s1.*")) or not any(path.glob("labels.*")):
            return []
        if not all(p.is_file() for p in found):
            have = ", ".join(sorted(p.suffix[1:] for p in path.glob("s1.*")))
            raise DataError(
                "split", str(path), 0, f"there is no split '{split}' (there are: {have})", "name one of these"
            )
        return found
    found = [path.with_name(f"{part}{path.suffix}") for part in PARTS]
    return found if path.stem in PARTS and all(p.is_file() for p in found) else []


def line_pairs(paths: list[Path], names: list[str], notes: Notes) -> Iterator[Row]:
    """PAIRS rows of three files that agree line by line."""
    columns = {role: (role,) for role in ("premise", "hypothesis", "label")}
    readers = [decoded_lines(path, name, Notes(strict=True)) for path, name in zip(paths, names, strict=True)]
    for number, lines in enumerate(zip_longest(*readers), 1):
        if None in lines:
            short = names[lines.index(None)]
            raise DataError(
                "schema", short, number, "the file ends here, but those beside it go on", "take files of one split"
            )
        record = dict(zip(columns, (line[1].strip() for line in lines), strict=True))
        try:
            yield *nli_row(record, columns), 0, number
        except BadValue as bad:
            notes.bad(DataError(bad.rule, names[0], number, bad.message, bad.remedy))


def retrieval_rows(key: str, produce: Callable[[Notes], Iterator[Row]], notes: Notes, root: str) -> Iterator[Row]:
    """A retrieval row for each premise that entails something, in order of appearance; neutral pairs are not used."""
    table = cached_table(f"{key}-pairs", PAIRS, produce, notes, root)
    _, first, group = np.unique(text_keys(ArrowStrings(table, "premise")), return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1]) if len(order) else []
    for number in np.argsort(first):
        rows = [int(row) for row in members[number]]
        entailed, contradicted = (_hypotheses(table, rows, label) for label in (0, 2))
        if entailed:
            premise, at = table.value("premise", rows[0]), rows[0]
            row = judged_row(
                text_id(premise), premise, [(*h, 1.0) for h in entailed], [(*h, 0.0) for h in contradicted]
            )
            yield *row, table.value("file", at), table.value("line", at)


def pair_rows(rows: Callable[[Notes], Iterator[Row]], notes: Notes) -> Iterator[Row]:
    """premise, hypothesis and 1 for what is entailed, 0 for what is contradicted; neutral pairs are not used."""
    for premise, hypothesis, label, file, line in rows(notes):
        if label in (0, 2):
            yield premise, hypothesis, 1.0 - label / 2, file, line


def _hypotheses(table: ArrowTable, rows: list[int], label: int) -> list[tuple[str, str]]:
    """(id, text) of the different hypotheses with this label."""
    texts = dict.fromkeys(table.value("hypothesis", row) for row in rows if table.value("label", row) == label)
    return [(text_id(text), text) for text in texts]
