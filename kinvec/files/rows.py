"""One record of a file → one row of a kind. What does not fit is a `BadValue`; the caller knows the file and the line.

Kinds and their rows (each row ends with `file`, the number of the file it stands in, and `line`):
retrieval  a query with the documents judged for it; a document judged 0 is a negative
labelled   text, label
texts      text
pairs      first, second, score
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kinvec.files.problems import BadValue, DataError, Notes
from kinvec.files.records import Record, kind_of
from kinvec.files.writing import text_id

_TEXTS, _PLACE = pa.list_(pa.string()), [pa.field("file", pa.int32()), pa.field("line", pa.int64())]

SCHEMAS = {
    "retrieval": pa.schema([
        pa.field("query_id", pa.string()), pa.field("query", pa.string()),
        pa.field("pos_id", _TEXTS), pa.field("pos_doc", _TEXTS), pa.field("pos_score", pa.list_(pa.float64())),
        pa.field("neg_id", _TEXTS), pa.field("neg_doc", _TEXTS), pa.field("neg_score", pa.list_(pa.float64())),
        *_PLACE,
    ]),
    "labelled": pa.schema([pa.field("text", pa.string()), pa.field("label", pa.string()), *_PLACE]),
    "texts": pa.schema([pa.field("text", pa.string()), *_PLACE]),
    "pairs": pa.schema([
        pa.field("first", pa.string()), pa.field("second", pa.string()), pa.field("score", pa.float64()), *_PLACE,
    ]),
}  # fmt: skip

Columns = Mapping[str, Sequence[str]]
"""Role (`query`, `pos_doc`, `text`, …) → the file's column for it; several columns are joined by a space."""
Row = tuple[Any, ...]


def retrieval_row(record: Mapping[str, Any], columns: Columns) -> Row:
    """query_id, query, pos_id, pos_doc, pos_score, neg_id, neg_doc, neg_score of a retrieval example."""
    query = text_of(record, columns, "query")
    query_id = _ids(record, columns, "query_id", [query])[0]
    positives = _documents(record, columns, "pos", 1.0)
    if not positives:
        raise BadValue("no positive", f"'{_name(columns, 'pos_doc')}' is an empty list")
    negatives = _documents(record, columns, "neg", 0.0)
    judged_out = [document for document in positives if document[2] <= 0]
    kept = [document for document in positives if document[2] > 0]
    return judged_row(query_id, query, kept, judged_out + negatives)


def judged_row(
    query_id: str, query: str, positives: Sequence[tuple[str, str, float]], negatives: Sequence[tuple[str, str, float]]
) -> Row:
    """A retrieval row from (id, text, score) triples."""
    pos, neg = ([list(part) for part in zip(*some, strict=True)] or [[], [], []] for some in (positives, negatives))
    return (query_id, query, *pos, *neg)


def labelled_row(record: Mapping[str, Any], columns: Columns) -> Row:
    """text, label; a label may be a text or a whole number."""
    text = text_of(record, columns, "text")
    name = _name(columns, "label")
    label = record.get(name)
    if isinstance(label, int) and not isinstance(label, bool):
        return text, str(label)
    return text, text_of(record, columns, "label")


def texts_row(record: Mapping[str, Any], columns: Columns) -> Row:
    """Text."""
    return (text_of(record, columns, "text"),)


SAME = ("duplicate", "equivalent", "paraphrase", "entailment")
PAIR_LABELS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
PAIR_LABELS |= dict.fromkeys(SAME, 1.0) | {f"not_{word}": 0.0 for word in SAME}


def pairs_row(record: Mapping[str, Any], columns: Columns) -> Row:
    """first, second, score; a label of two, such as true and false or duplicate and not_duplicate, is 1 or 0."""
    name = _name(columns, "score")
    value = _cell(record, name)
    word = str(value).strip().lower() if isinstance(value, str | bool) else ""
    score = PAIR_LABELS[word] if word in PAIR_LABELS else number_of(value, name)
    return text_of(record, columns, "first"), text_of(record, columns, "second"), score


ROWS: dict[str, Callable[[Mapping[str, Any], Columns], Row]] = {
    "retrieval": retrieval_row, "labelled": labelled_row, "texts": texts_row, "pairs": pairs_row,
}  # fmt: skip


def text_of(record: Mapping[str, Any], columns: Columns, role: str) -> str:
    """The text of a role; where several columns make it, those that are not empty, joined by a space."""
    names = columns[role]
    parts = [checked_text(_cell(record, name), name, may_be_empty=len(names) > 1) for name in names]
    text = " ".join(part for part in parts if part.strip()) if len(parts) > 1 else parts[0]
    if not text.strip():
        raise BadValue("empty", f"{' and '.join(map(repr, names))} are empty")
    return text


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """The value, if it is a text that can be trained on."""
    if not isinstance(value, str):
        raise BadValue("schema", f"'{name}' is {kind_of(value)}, not a text")
    if not may_be_empty and (not value or value.isspace()):
        raise BadValue("empty", f"'{name}' is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadValue("encoding", f"'{name}' holds half a surrogate pair at character {error.start + 1}") from None
    return value


def _name(columns: Columns, role: str) -> str:
    return columns[role][0]


def _cell(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        have = ", ".join(map(str, list(record)[:8]))
        raise BadValue("schema", f"no '{name}' (the row has {have or 'nothing'})")
    return record[name]


def _documents(record: Mapping[str, Any], columns: Columns, side: str, score: float) -> list[tuple[str, str, float]]:
    """(id, text, score) of each document on a side, `pos` or `neg`; the negatives may be absent."""
    role = f"{side}_doc"
    if role not in columns:
        return []
    name = _name(columns, role)
    if len(columns[role]) > 1:  # several columns make one document
        value: Any = text_of(record, columns, role)
    else:
        value = record.get(name) if side == "neg" else _cell(record, name)
    if side == "neg" and value in (None, ""):
        return []
    values = as_list(value)
    texts = [checked_text(text, f"{name}[{i}]" if values is value else name) for i, text in enumerate(values)]
    scores = _scores(record, columns, f"{side}_score", [score] * len(texts))
    return list(zip(_ids(record, columns, f"{side}_id", texts), texts, scores, strict=True))


def as_list(value: Any) -> list[Any]:
    """The value, if it is a list, else a list of it."""
    return value if isinstance(value, list) else [value]


def _ids(record: Mapping[str, Any], columns: Columns, role: str, texts: list[str]) -> list[str]:
    value = record.get(_name(columns, role)) if role in columns else None
    if value is None or value == "":
        return [text_id(text) for text in texts]
    ids = ids_of(value, _name(columns, role))
    _same_length(_name(columns, role), ids, texts)
    return ids


def ids_of(value: Any, name: str) -> list[str]:
    """One id or a list of ids as a list; anything but texts is a `BadValue`."""
    for identity in as_list(value):
        if not isinstance(identity, str) or not identity.strip():
            what = "empty" if isinstance(identity, str) else kind_of(identity)
            example = identity if isinstance(identity, int | float) else "d1"
            raise BadValue("id", f"'{name}' is {what}; ids are texts", f'store ids as texts, as in "{example}"')
        checked_text(identity, name)
    return as_list(value)


def _scores(record: Mapping[str, Any], columns: Columns, role: str, default: list[float]) -> list[float]:
    value = record.get(_name(columns, role)) if role in columns else None
    if value is None or value == "":
        return default
    name, scores = _name(columns, role), as_list(value)
    _same_length(name, scores, default)
    return [number_of(score, name) for score in scores]


def _same_length(name: str, values: list[Any], documents: Sequence[Any]) -> None:
    if len(values) != len(documents):
        raise BadValue("schema", f"'{name}' has {len(values)} entries for {len(documents)} documents")


def number_of(value: Any, name: str) -> float:
    """A finite number; a cell of a text file counts where it reads as one."""
    try:
        number = math.nan if isinstance(value, bool | list | dict) or value is None else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        shown = kind_of(value) if not isinstance(value, str) else f"'{value[:40]}'"
        raise BadValue("schema", f"'{name}' is {shown}, not a finite number")
    return number


LISTS = ("pos_doc", "neg_doc", "pos_id", "neg_id", "pos_score", "neg_score")  # roles that may hold several entries


def parsed_cells(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    """Records of a delimited file, in which a JSON list of texts or numbers in a cell stands for several documents."""
    several = {name for role in LISTS for name in columns.get(role, ())}
    for line, record in records:
        yield line, {name: _parsed_cell(cell) if name in several else cell for name, cell in record.items()}


def _parsed_cell(cell: str) -> Any:
    if not cell.startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return value if all(isinstance(item, str | int | float) for item in value) else cell


def placed_rows(
    records: Iterable[Record], build: Callable[[Mapping[str, Any], Columns], Row], columns: Columns,
    name: str, number: int, notes: Notes,
) -> Iterator[Row]:  # fmt: skip
    """The rows that records make, each ending in the file's number and the line; what makes none is noted."""
    for line, record in records:
        try:
            yield *build(record, columns), number, line
        except BadValue as bad:
            notes.bad(DataError(bad.rule, name, line, bad.message, bad.remedy))
