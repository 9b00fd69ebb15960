"""Which column plays which role, and so what kind of data a file holds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError, RecipeError
from kinvec.files.forms import Form, form_of, records_of
from kinvec.files.problems import DataError, Notes

SAMPLE = 100  # records looked at
KINDS = ("retrieval", "pairs", "labelled", "texts")

# Kind → role → the column names it is known by, the first found wins; `columns: {role: name}` takes any other.
# The kinds are tried in this order. `nli` becomes retrieval: premise, what it entails, what it contradicts.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "retrieval": {
        "query": ("query", "question", "anchor"),
        "pos_doc": ("pos_doc", "positive", "positives", "pos", "context", "passage", "answer"),
        "neg_doc": ("neg_doc", "negative", "negatives", "neg"),
        "query_id": ("query_id", "qid"),
        "pos_id": ("pos_id", "doc_id", "pos_ids"),
        "neg_id": ("neg_id", "neg_ids"),
        "pos_score": ("pos_score", "score", "scores", "pos_scores"),
        "neg_score": ("neg_score", "neg_scores"),
    },
    "nli": {
        "premise": ("premise", "sentence1"),
        "hypothesis": ("hypothesis", "sentence2"),
        "label": ("gold_label", "label"),
    },
    "pairs": {
        "first": ("first", "sentence1", "text1", "sentence_a", "question1"),
        "second": ("second", "sentence2", "text2", "sentence_b", "question2"),
        "score": ("score", "similarity_score", "similarity", "label", "labels", "is_duplicate"),
    },
    "labelled": {
        "text": ("text", "sentence", "headline"),
        "label": ("label", "category", "intent", "class", "label_text"),
    },
    "texts": {"text": ("text", "sentence")},
}
NEEDED = {
    "retrieval": ("query", "pos_doc"), "nli": ("premise", "hypothesis", "label"), "pairs": ("first", "second", "score"),
    "labelled": ("text", "label"), "texts": ("text",),
}  # fmt: skip
ROLES = {role for aliases in ALIASES.values() for role in aliases}
KNOWN_COLUMNS = {name for aliases in ALIASES.values() for names in aliases.values() for name in names}
NLI_LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1, "": -1}  # no label: the annotators disagreed
NAMING = "--column query=NAME (check, evaluate, mine) or columns: {query: NAME} (in a recipe)"
KNOWN = "known are query and pos_doc; first, second and score; premise, hypothesis and label; text and label; text"


@dataclass(frozen=True)
class Layout:
    """How a file is parsed, the kind of data it holds, and role → columns (several are joined by a space)."""

    form: Form
    kind: str
    columns: Mapping[str, tuple[str, ...]]

    def options(self) -> list[Any]:
        """What of it changes the rows that are read; part of their fingerprint."""
        return [vars(self.form), self.kind, {role: list(names) for role, names in sorted(self.columns.items())}]


def layout_of(path: Path, name: str, kind: str | None, columns: Mapping[str, Any] | None) -> Layout:
    """The layout of a file by its content; `kind` and `columns` override what would be found.

    Raises `KinvecError` for a file that is empty or fits no kind, `RecipeError` for a role or kind that does not exist.
    """
    given = checked_columns(columns)
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"there is no kind of data '{kind}'; there are {', '.join(KINDS)}")
    form = form_of(path, name, KNOWN_COLUMNS | {part for parts in given.values() for part in parts})
    sample = sample_of(path, name, form)
    if form.name == "delimited" and not form.header and not given:
        given = _by_shape(name, sample, kind)
    return Layout(form, *roles_of(sample, name, kind, given))


def sample_of(path: Path, name: str, form: Form) -> list[dict[str, Any]]:
    """The first records. Raises the first problem where there is no good record among them."""
    notes = Notes(strict=False)
    found = [record for _, record in islice(records_of(path, name, form, notes), SAMPLE)]
    if not found:
        raise (
            notes.kept[0]
            if notes.kept
            else DataError("empty", name, 0, "there is no row in it", "give it at least one")
        )
    return found


def named_columns(given: Sequence[str]) -> dict[str, str]:
    """What a command line says of columns, `ROLE=NAME` each. Raises `RecipeError` for anything else."""
    if wrong := next((pair for pair in given if "=" not in pair), None):
        raise RecipeError(f"--column {wrong} names no column; write ROLE=NAME, for example --column query=question")
    return dict(pair.split("=", 1) for pair in given)


def checked_columns(columns: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Role → column names, from what a user wrote: a name, several joined by '+', or a list of them."""
    given = {}
    for role, value in (columns or {}).items():
        if role not in ROLES:
            near = difflib.get_close_matches(role, sorted(ROLES), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the roles are {', '.join(sorted(ROLES))}"
            raise RecipeError(f"columns: there is no role '{role}'; {hint}")
        given[role] = tuple(map(str, value)) if isinstance(value, list | tuple) else tuple(str(value).split("+"))
    return given


def present(given: Mapping[str, tuple[str, ...]], names: Sequence[str], source: str) -> dict[str, tuple[str, ...]]:
    """The columns that a user named, as they are in a file of these; a name may have a '+' in it.

    Raises `KinvecError` for one that is not there.
    """
    found = {role: ("+".join(parts),) if "+".join(parts) in names else parts for role, parts in given.items()}
    absent = next((part for parts in found.values() for part in parts if part not in names), None)
    if absent is not None:
        raise KinvecError(f"{source}: there is no column '{absent}'; name those there are in columns: {_listed(names)}")
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:12])


def roles_of(
    sample: list[dict[str, Any]], name: str, kind: str | None, given: Mapping[str, tuple[str, ...]]
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The kind that records like these hold, and the columns of each role."""
    names = list(dict.fromkeys(str(key) for record in sample for key in record))
    given, have = present(given, names, name), _listed(names)
    candidates = {None: tuple(ALIASES), "retrieval": ("retrieval", "nli"), "pairs": ("nli", "pairs")}.get(
        kind, (kind or "",)
    )
    for candidate in candidates:
        roles = {
            role: given.get(role) or next((part,) for part in aliases if part in names)
            for role, aliases in ALIASES[candidate].items()
            if role in given or any(part in names for part in aliases)
        }
        if roles.get("text") == ("headline",) and "short_description" in names:
            roles["text"] = ("headline", "short_description")
        if all(role in roles for role in NEEDED[candidate]) and (candidate != "nli" or _is_nli(sample, roles)):
            optional = {role: names[:1] for role, names in ALIASES[candidate].items()}  # may come after the sample
            return candidate, optional | roles
    wanted = f"{kind} data needs {' and '.join(NEEDED[kind])}" if kind else _nearest(names)
    raise DataError(
        "schema",
        name,
        1,
        f"the columns are {have}, but {wanted}",
        f"rename them, or say which is which: {NAMING}",
    )


def _nearest(names: list[str]) -> str:
    if any(part in names for part in ALIASES["retrieval"]["query"]):
        return "'pos_doc' is missing beside the query"
    return KNOWN


def _is_nli(sample: list[dict[str, Any]], roles: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the labels are the three of inference; entailment or not is one of two, as other pairs have them."""
    labels = {str(record.get(roles["label"][0])) for record in sample}
    if "not_entailment" in labels:
        return False
    return roles["premise"] == ("premise",) or bool(labels & {"entailment", "contradiction"})


def _by_shape(name: str, sample: list[dict[str, Any]], kind: str | None) -> dict[str, tuple[str, ...]]:
    """The columns of a delimited file without a header, where its shape is known.

    The STS Benchmark (Cer et al. 2017): genre, file, year, id, score, first, second; in some rows two of licence.
    """
    if kind in (None, "pairs") and all(re.fullmatch(r"\d+(\.\d+)?", r.get("4", "")) and "6" in r for r in sample):
        return {"score": ("4",), "first": ("5",), "second": ("6",)}
    raise DataError(
        "schema",
        name,
        1,
        f"the first line names no known column ({KNOWN})",
        f"add a header line, or say which is which, by name or number from 0: {NAMING}",
    )
