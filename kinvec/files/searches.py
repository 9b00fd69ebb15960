"""Data as evaluation and encoding want it: search problems, scored pairs, and plain streams of (id, text)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinvec.contracts import Corpus, KinvecError, LabelledData, PairData, Problem, Qrels, RecipeError, RetrievalData
from kinvec.files import beir
from kinvec.files.arrow import ArrowStrings, cached_table, fingerprint_of
from kinvec.files.forms import Form, form_of, records_of
from kinvec.files.problems import BadValue, DataError, Notes
from kinvec.files.roles import ALIASES, KNOWN_COLUMNS, NEEDED, checked_columns, present, sample_of
from kinvec.files.rows import Row, as_list, checked_text, ids_of, number_of
from kinvec.files.sources import existing, has_split
from kinvec.files.table import Table, detect_kind, open_data
from kinvec.files.writing import text_id


def open_retrieval(
    source: str | Path, *, split: str = "test", columns: Mapping[str, Any] | None = None, kind: str | None = None
) -> RetrievalData:
    """A search problem: a BEIR folder's, or that of retrieval examples (any form, SQuAD too); or a reranking of them.

    The distinct documents of examples, positives and negatives, are the corpus; negatives are judged 0, positives with
    their score if it is a whole number, else 1. Raises `DataError` where one id has two texts, or a judged query of a
    BEIR folder has none.
    """
    path = Path(source).expanduser()
    if path.is_dir() and beir.is_beir(path):
        return _open_beir(path, split, kind or "retrieval")
    table = open_data(source, split=split, kind="retrieval", columns=columns)
    queries, qrels = _judged(table)
    key = fingerprint_of(table.fingerprint, "corpus")
    corpus = cached_table(key, beir.DOCUMENTS, lambda notes: _distinct_documents(table, notes), Notes(), table.source)
    texts = Corpus(ArrowStrings(corpus, "id"), ArrowStrings(corpus, "text"))
    kind = kind or "retrieval"
    return RetrievalData(texts, queries, qrels, table.fingerprint, name=path.stem, split=split, kind=kind)


def _open_beir(folder: Path, split: str, kind: str) -> RetrievalData:
    notes = Notes(strict=True)
    path = beir.qrels_path(folder, split)
    judgements = beir.read_qrels(path, str(path), notes)
    qrels, file = judgements.grades, folder / "queries.jsonl"
    queries = beir.judged_queries(file, str(file), qrels, notes)
    for query, judged in qrels.items():
        if query not in queries:
            line = judgements.lines[query, next(iter(judged))]
            what = f"query '{query}' is judged but is not in queries.jsonl"
            raise DataError("missing", str(path), line, what, "add it, or drop the judgement")
    corpus = beir.documents(folder / "corpus.jsonl", notes)
    texts = Corpus(ArrowStrings(corpus, "id"), ArrowStrings(corpus, "text"))
    fingerprint = beir.beir_fingerprint(folder, split)
    return RetrievalData(texts, queries, qrels, fingerprint, name=folder.resolve().name, split=split, kind=kind)


def _judged(table: Table) -> tuple[dict[str, str], Qrels]:
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    for row in _rows(table, ["query_id", "query", "pos_id", "pos_score", "neg_id", "file", "line"]):
        query_id, query, positives, scores, negatives, file, line = row
        if queries.setdefault(query_id, query) != query:
            raise _two_texts(table, "query_id", query_id, file, line)
        judged = qrels.setdefault(query_id, {})
        for document in negatives:
            judged.setdefault(document, 0)
        for document, score in zip(positives, scores, strict=True):
            judged[document] = max(judged.get(document, 0), int(score) if score.is_integer() else 1)
    return queries, qrels


def _distinct_documents(table: Table, notes: Notes) -> Iterator[Row]:
    """id, text and line of every document of the examples, once, in order of appearance."""
    seen: dict[str, int] = {}
    for ids, texts, negative_ids, negatives, file, line in _rows(
        table, ["pos_id", "pos_doc", "neg_id", "neg_doc", "file", "line"]
    ):
        for identity, text in zip(ids + negative_ids, texts + negatives, strict=True):
            known, key = seen.get(identity), hash(text)
            if known is None:
                seen[identity] = key
                yield identity, text, line
            elif known != key:
                notes.bad(_two_texts(table, "document id", identity, file, line))


def _two_texts(table: Table, what: str, identity: str, file: int, line: int) -> DataError:
    message = f"the {what} '{identity}' stands for another text than before"
    return DataError("conflict", table.files[file], line, message, "give each text its own id")


def _rows(table: Table, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    for batch in table.batches(columns):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def open_pairs(
    source: str | Path, *, split: str = "test", columns: Mapping[str, Any] | None = None, kind: str | None = None
) -> PairData:
    """Scored pairs of texts; `split` picks the part of a folder or hub data set.

    Pairs whose scores are 0 and 1 are a pair classification, others a similarity, unless `kind` says which. Raises
    `KinvecError` where all scores are equal, or for a pair classification more than two.
    """
    table = open_data(source, split=split, kind="pairs", columns=columns)
    first, second = (ArrowStrings(table.arrow, name) for name in ("first", "second"))
    scores = [score for batch in table.batches(["score"]) for score in batch.column(0).to_pylist()]
    kind, different = kind or kind_of_pairs(scores), len(set(scores))
    if different < 2:
        raise KinvecError(f"{source}: all scores are {scores[0]:g}; give pairs that are alike and pairs that are not")
    if kind == "pair-classification" and different > 2:
        raise KinvecError(
            f"{source}: a pair classification has two labels, such as 0 and 1, and here are {different:,}"
        )
    return PairData(first, second, scores, table.fingerprint, name=Path(source).stem, split=split, kind=kind)


def kind_of_pairs(scores: Iterable[float]) -> str:
    """How pairs of these scores are measured."""
    return "pair-classification" if set(scores) == {0.0, 1.0} else "similarity"


def open_labelled(
    source: str | Path, *, split: str = "test", columns: Mapping[str, Any] | None = None, kind: str | None = None
) -> LabelledData:
    """Labelled texts, and those of the split `train` beside them for classifiers to learn from.

    Where there is no such split, or it is the one to be judged, the texts are clustered. Raises `KinvecError` there if
    `kind` is classification.
    """
    table = open_data(source, split=split, kind="labelled", columns=columns)
    texts, labels = (ArrowStrings(table.arrow, name) for name in ("text", "label"))
    name, training = Path(source).stem, None
    if kind != "clustering" and split != "train" and (has_split(source, "train") or not Path(source).exists()):
        training = open_data(source, split="train", kind="labelled", columns=columns)
    if training is None or training.fingerprint == table.fingerprint:
        if kind == "classification":
            what = "labelled texts are judged by classifiers that learn from others"
            remedy = "give a folder or data set with a train split, such as train.csv beside test.csv"
            raise KinvecError(f"{source}: {what}; {remedy}, or cluster them (--task clustering)")
        return LabelledData(texts, labels, [], [], table.fingerprint, name=name, split=split, kind="clustering")
    key = fingerprint_of(table.fingerprint, training.fingerprint)
    known, known_labels = (ArrowStrings(training.arrow, name) for name in ("text", "label"))
    return LabelledData(texts, labels, known, known_labels, key, name=name, split=split)


OPENERS: dict[str, Callable[..., Problem]] = {
    "retrieval": open_retrieval, "pairs": open_pairs, "labelled": open_labelled,
}  # fmt: skip

TASKS = {
    "retrieval": "retrieval", "reranking": "retrieval", "similarity": "pairs", "pair-classification": "pairs",
    "classification": "labelled", "clustering": "labelled",
}  # fmt: skip
"""What can be measured → the kind of data it is measured on."""


def open_problem(
    source: str | Path, *, split: str = "test", columns: Mapping[str, Any] | None = None, task: str | None = None
) -> Problem:
    """What a model can be measured on, whichever kind it is, or as the `task` (a key of `TASKS`) wants it.

    Raises `KinvecError` for plain texts, `RecipeError` for an unknown task.
    """
    if task is not None and task not in TASKS:
        raise RecipeError(f"there is no task '{task}'; there are {', '.join(TASKS)}")
    kind = TASKS[task] if task else detect_kind(source, split=split, columns=columns)
    if kind not in OPENERS:
        raise KinvecError(
            f"{source} holds {kind}, which cannot be scored; give judged queries and documents, scored pairs, or "
            "labelled texts"
        )
    return OPENERS[kind](source, split=split, columns=columns, kind=task)


def read_queries(
    source: str | Path, *, split: str = "train", columns: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """(id, text) of every query of a source, in its order, streamed.

    A file of queries (`_id` or `query_id` beside `text`, `query` or `question`; or one text a line), or the one in a
    BEIR folder, gives every row; retrieval examples give each query once. `columns` are the names of `query` (or
    `text`) and `query_id`, where they are others. A query without an id has one made from its text. Raises `DataError`
    at the first row that is no query, `KinvecError` for a column that is not there.
    """
    return _texts(str(source), QUERIES, split, columns)


def read_documents(
    source: str | Path, *, split: str = "train", columns: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """(id, text) of every document of a source, in its order, streamed; a title is joined in front by one space.

    As `read_queries`, with `pos_doc` (or `text`) and `pos_id`; retrieval examples give each positive and negative once.
    Empty documents are given too.
    """
    return _texts(str(source), DOCUMENTS, split, columns)


def read_judgements(source: str | Path, *, columns: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, grade) of every row of a query file that carries `doc_id` (a text or a list), streamed.

    The grade is the row's `score` where it has one, else 1. Nothing where the rows carry no document ids. `columns` as
    in `read_queries`.
    """
    path = existing(str(source))
    if not path.is_dir():
        side = _as_named(path, str(source), QUERIES, columns)
        for judged in _each(path, str(source), side, _judged_by):
            yield from judged


def _judged_by(record: Mapping[str, Any], side: _Side) -> list[tuple[str, str, int]]:
    key = next((key for key in ("doc_id", "pos_id") if record.get(key)), None)
    if key is None:
        return []
    query_id, _ = _entry(record, side)
    documents, scores = ids_of(record[key], key), as_list(record.get("score", 1.0))
    if not documents:
        return []
    if len(scores) not in (1, len(documents)):
        raise BadValue("schema", f"'score' has {len(scores)} entries for {len(documents)} documents")
    scores = scores * len(documents) if len(scores) == 1 else scores
    return [
        (query_id, document, int(number_of(score, "score"))) for document, score in zip(documents, scores, strict=True)
    ]


@dataclass(frozen=True)
class _Side:
    """What makes a file one of queries or of documents: names of its ids and texts, the first found wins."""

    beir_file: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]  # where they stand in retrieval rows: (ids, texts)
    may_be_empty: bool
    named: tuple[str, ...] = ()  # the columns of the text, all of them, where a user says so
    title: str | None = None  # what is joined in front of it otherwise


QUERIES = _Side(
    "queries.jsonl", ("_id", "query_id", "qid", "id"), ("query", "question", "text", "anchor", "sentence"),
    (("query_id", "query"),), False,
)  # fmt: skip
DOCUMENTS = _Side(
    "corpus.jsonl", ("_id", "doc_id", "docid", "id"),
    ("text", "doc", "document", "passage", "contents", "sentence", "pos_doc"),
    (("pos_id", "pos_doc"), ("neg_id", "neg_doc")), True, title="title",
)  # fmt: skip


def _texts(source: str, side: _Side, split: str, columns: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    path = existing(source)
    if path.is_dir() and beir.is_beir(path):
        path, source = path / side.beir_file, str(path / side.beir_file)
    if path.is_dir() or _holds_examples(path, source, side, columns or {}):
        yield from _of_examples(open_data(source, split=split, kind="retrieval", columns=columns), side)
    else:
        yield from _each(path, source, _as_named(path, source, side, columns), _entry)


def _each(path: Path, source: str, side: _Side, read: Callable[[dict[str, Any], _Side], Any]) -> Iterator[Any]:
    """What `read` makes of every row; what is wrong with one is told with its place."""
    for line, record in records_of(path, source, _form(path, source, side), Notes(strict=True)):
        try:
            yield read(record, side)
        except BadValue as bad:
            raise DataError(bad.rule, source, line, bad.message, bad.remedy) from None


def _as_named(path: Path, source: str, side: _Side, columns: Mapping[str, Any] | None) -> _Side:
    """The side with the columns that the user named."""
    identity, text = side.columns[0]
    given = {role: parts for role, parts in checked_columns(columns).items() if role in (identity, text, "text")}
    if not given:
        return side
    form = _form(path, source, replace(side, named=tuple(part for parts in given.values() for part in parts)))
    given = present(given, _names(path, source, form), source)
    return replace(side, ids=given.get(identity, side.ids), named=given.get(text, given.get("text", ())))


def _holds_examples(path: Path, source: str, side: _Side, given: Mapping[str, Any]) -> bool:
    names, aliases = _names(path, source, _form(path, source, side)), ALIASES["retrieval"]
    return all(role in given or any(alias in names for alias in aliases[role]) for role in NEEDED["retrieval"])


def _names(path: Path, source: str, form: Form) -> list[str]:
    return list(dict.fromkeys(name for record in sample_of(path, source, form) for name in record))


def _form(path: Path, source: str, side: _Side) -> Form:
    return form_of(path, source, {*KNOWN_COLUMNS, *side.ids, *side.texts, *side.named})


def _entry(record: Mapping[str, Any], side: _Side) -> tuple[str, str]:
    names = side.named or tuple(name for name in side.texts if name in record)[:1]
    if not names or any(name not in record for name in names):
        wanted = ", ".join(side.named or side.texts)
        remedy = "name it: --column text=NAME"
        raise BadValue("schema", f"none of {wanted} is in the row (it has {', '.join(record) or 'nothing'})", remedy)
    text = " ".join(checked_text(record[name], name, may_be_empty=side.may_be_empty) for name in names)
    if side.title and not side.named and record.get(side.title):
        text = f"{checked_text(record[side.title], side.title)} {text}"
    text = text.strip() if side.title else text
    key = next((key for key in side.ids if record.get(key) not in (None, "")), None)
    ids = ids_of(record[key], key) if key else []
    return (ids[0] if ids else text_id(text)), text


def _of_examples(table: Table, side: _Side) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for row in _rows(table, [column for pair in side.columns for column in pair]):
        for ids, texts in zip(row[::2], row[1::2], strict=True):
            for identity, text in zip(as_list(ids), as_list(texts), strict=True):
                if identity not in seen:
                    seen.add(identity)
                    yield identity, text
