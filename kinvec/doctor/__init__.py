"""The data doctor: what `kinvec check` prints, and what a run keeps of its data as `doctor.json`.

Both are of this shape:

    {"verdict": str,                       # of all sources, one sentence
     "sources": [{
        "source": str, "wrong": bool, "verdict": str,
        "summary": {"kind": str, "rows": int, …},
        "looked": {rule: str},             # what was looked for, and in how much: "all 10,003 texts"
        "not_looked": {rule: str},         # what was not, and why or what to give so that it is
        "findings": [{                     # worst first
           "severity": "error" | "warning" | "note", "rule": str, "file": str, "line": int,
           "count": int, "share": float | None,   # of what was looked at, 0 to 1
           "message": str, "remedy": str,
           "examples": [{"note": str, "texts": [{"text": str, "file": str, "line": int}]}]}],
        "lengths": {side: {"edges": [float], "counts": [int]}},   # characters; log-spaced, one more edge than counts
        "languages": {side: {code: int}},  # texts of the sample; "und": none can be told, "zxx": it is none
        "labels": {label: int}}]}          # commonest first, at most 200; empty where there are none

A side is `queries`, `documents` or `texts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from kinvec import checks
from kinvec.checks import Evaluation, Finding, Keys, TokenLimit
from kinvec.contracts import Encoder
from kinvec.doctor import rules
from kinvec.doctor.texts import texts_of
from kinvec.files import DataError, Table, beir, evenly, open_data, write_lines

LABELS = 200  # shown
HEALTHY = "fit to train on; nothing found"
SEVERITIES = ("error", "warning", "note")
REPEATS = {
    "texts": f"read some; without the rows that nearly repeat an earlier one: {checks.WRITE}",
    "queries": f"read some; without the rows that, documents and all, nearly repeat an earlier one: {checks.WRITE}",
    "documents": "in a batch one is a false negative of the other: objective.guide=MODEL masks it",
}


@dataclass(frozen=True)
class Effort:
    """How much is looked at, at most: rows, characters of a side for near duplicates, texts of a side for languages."""

    rows: int | None = None
    characters: int = 4_000_000_000
    languages: int = 2000


QUICK = Effort(rows=30_000, characters=30_000_000, languages=1000)  # for a run: some seconds, however large the data


@dataclass
class Checked:
    """What was found in one source, as in the module's docstring."""

    source: str
    summary: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    looked: dict[str, str] = field(default_factory=dict)
    not_looked: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    languages: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    table: Table | None = field(default=None, repr=False)

    @property
    def drop(self) -> Int64[np.ndarray, " r"]:
        """The rows of the table that are better left out."""
        return np.unique(
            np.concatenate([np.empty(0, np.int64), *(f.drop for f in self.findings if f.drop is not None)])
        )

    @property
    def wrong(self) -> bool:
        """Whether training on it would be wrong."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}
        said = ", ".join(_counted(count, severity) for severity, count in counts.items() if count)
        if self.wrong:
            return f"training on this would be wrong: {said}"
        things = len(self.findings)
        return f"fit to train on, with {_counted(things, 'thing')} to look at ({said})" if things else HEALTHY

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        found = {name: value for name, value in vars(self).items() if name not in ("source", "table", "findings")}
        findings = [finding.to_json() for finding in self.findings]
        return {"source": self.source, "wrong": self.wrong, "verdict": self.verdict, "findings": findings, **found}


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def to_json(found: Sequence[Checked]) -> dict[str, Any]:
    """All sources and one verdict."""
    verdict = found[0].verdict if len(found) == 1 else "; ".join(f"{one.source}: {one.verdict}" for one in found)
    return {"verdict": verdict, "sources": [one.to_json() for one in found]}


def write_clean(found: Checked, path: str | Path) -> int:
    """Write the rows that are not better left out as JSON lines, which read as they did; returns how many they are."""
    assert found.table is not None, "a source that cannot be read has no rows"
    kept = np.setdiff1d(np.arange(len(found.table)), found.drop)
    batches = checks.chosen_batches(found.table, found.table.arrow.schema.names[:-2], kept)  # without file and line
    rows = (row for batch in batches for row in batch.to_pylist())
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
    return len(kept)


def check_source(
    source: str | Path, *, split: str = "train", kind: str | None = None, columns: Mapping[str, Any] | None = None,
    evaluation: str | Path | None = None, limit: TokenLimit | None = None, encoder: Encoder | None = None,
    skip_bad: bool = False,
) -> Checked:  # fmt: skip
    """Training data under all rules.

    `evaluation` is data whose test split must share no query with it; a BEIR folder is held against its own test split.
    With `limit` texts that a model cuts are counted, with `encoder` false negatives are suspected. With `skip_bad` rows
    that cannot be read are warnings only. Raises `KinvecError` if there is no such source, or no evaluation data can be
    read.
    """
    try:
        table = open_data(source, split=split, kind=kind, columns=columns, skip_bad=True)
    except DataError as error:
        return Checked(str(source), findings=[checks.as_finding("error", error)])
    folder, judged = Path(source), None
    own = beir.is_beir(folder) and split != "test" and "test" in beir.splits(folder)
    if evaluation is not None or own:
        same_corpus = own and evaluation in (None, source)
        judged = checks.open_evaluation(evaluation or source, same_corpus=same_corpus)
    found = examine(table, judged, limit=limit, encoder=encoder)
    found.findings += checks.unreadable(table, skip_bad)
    if beir.is_beir(folder):
        found.findings += checks.folder_findings(folder)
    return _sorted(found)


def examine(
    table: Table, evaluation: Evaluation | None = None, *, rows: Int64[np.ndarray, " n"] | None = None,
    limit: TokenLimit | None = None, encoder: Encoder | None = None, effort: Effort | None = None,
) -> Checked:  # fmt: skip
    """A table, or some rows of it in their order, under all rules but those of reading."""
    effort = effort or Effort()
    rows = np.arange(len(table)) if rows is None else rows
    if effort.rows is not None and len(rows) > effort.rows:
        rows = rows[evenly(len(rows), effort.rows)]
    keys = checks.keys_of(table, None if len(rows) == len(table) else rows)
    found = Checked(table.source, checks.summarise(table, keys), checks.row_findings(table, keys), table=table)
    found.looked["rows"] = (
        f"{len(keys):,} of {len(table):,} rows" if len(keys) < len(table) else f"all {len(keys):,} rows"
    )
    if evaluation is not None:
        found.findings += checks.leakage(table, keys, evaluation)
        found.looked["leakage"] = f"{found.looked['rows']}, against {evaluation.name}"
    else:
        found.not_looked["leakage"] = "needs evaluation data: kinvec check … --eval DATA"
    _examine_texts(found, table, keys, evaluation, effort)
    if table.kind == "labelled":
        findings, labels = rules.label_balance(table, keys)
        found.findings += findings
        found.labels = dict(list(labels.items())[:LABELS])
        found.looked["labels"] = found.looked["rows"]
    _examine_with_model(found, table, keys, limit, encoder)
    return _sorted(found)


def _examine_texts(found: Checked, table: Table, keys: Keys, evaluation: Evaluation | None, effort: Effort) -> None:
    alike: dict[str, list[Int64[np.ndarray, " _"]]] = {}
    repeats: list[Finding] = []
    for texts in texts_of(table, keys):
        if not len(texts):
            continue
        side = texts.side
        drawn = rules.sketch(texts, effort.characters)
        findings, groups = rules.near_duplicates(drawn, REPEATS[side])
        repeats += findings
        if table.kind == "labelled":
            found.findings += rules.near_contradictions(texts, groups)
        alike |= {name: [texts.keys[group] for group in groups] for name in texts.columns}
        found.looked[f"near duplicates, {side}"] = drawn.looked
        if evaluation is not None and side != "documents" and table.kind != "pairs":
            what = "a query" if side == "queries" else "a text"
            found.findings += rules.near_leakage(drawn, evaluation, evaluation.asked, what)
        if evaluation is not None and side == "documents" and not evaluation.same_corpus and evaluation.documents:
            found.findings += rules.near_leakage(drawn, evaluation, [evaluation.documents], "a document")
        findings, found.lengths[side] = rules.lengths(texts, "read them; drop what is no text of its kind")
        found.findings += findings
        findings, found.languages[side], looked = rules.odd_languages(
            texts, effort.languages, "read them; drop what the model cannot read"
        )
        found.findings += findings
        found.looked[f"languages, {side}"] = looked
    if evaluation is not None and table.kind == "pairs":
        found.not_looked["near leakage"] = "of pairs only equal ones are looked for"
    if repeats:
        repeats[0] = replace(repeats[0], drop=keys.numbers[rules.near_repeats(keys, alike)])
    found.findings += repeats


def _examine_with_model(
    found: Checked, table: Table, keys: Keys, limit: TokenLimit | None, encoder: Encoder | None
) -> None:
    if limit is not None:
        findings, lengths = checks.truncation(table, limit)
        found.findings += findings
        found.summary |= lengths
        found.looked["truncation"] = (
            "all rows" if len(table) <= checks.SAMPLED_ROWS else f"{checks.SAMPLED_ROWS:,} rows"
        )
    if encoder is not None and table.kind == "retrieval":
        from kinvec.doctor.suspects import false_negatives  # imports torch and scikit-learn: seconds

        findings, looked = false_negatives(table, keys, encoder)
        found.findings += findings
        found.looked["false negatives"] = looked
    for rule, given in (("truncation", limit), ("false negatives", encoder)):
        if given is None and (table.kind == "retrieval" or rule == "truncation"):
            found.not_looked[rule] = "needs a model: kinvec check … --model MODEL"


def _sorted(found: Checked) -> Checked:
    found.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return found
