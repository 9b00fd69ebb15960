"""What is a matter of degree: near duplicates, near leaks, odd lengths and languages, labels out of balance.

Every rule takes the texts of a side, or the labels, and gives findings; counts are of distinct texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from kinvec.checks import PLACES, WRITE, Evaluation, Finding, Keys, Severity, quoted, repeated, shortened
from kinvec.doctor import near
from kinvec.doctor.languages import COMMON, NO_LANGUAGE, UNKNOWN, languages
from kinvec.doctor.texts import Texts
from kinvec.files import Table, evenly, text_keys

MANY = 0.01  # share from which on a matter of degree is a warning, below it a note
ENOUGH = 50  # texts from which on some can be called odd
ODD = 5.0  # robust standard deviations of the logarithm of the length
TIMES = 4.0  # and at least so many times longer or shorter than the median
BARS = 24  # of a histogram
FEW = 8  # texts of a label: MTEB's classification learns from so many
GROUP = 4  # texts shown of a group
AT_ONCE = 1024
SIGNED = 4_000_000  # texts whose signatures are held at most: 512 MB

Examples = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Sketch:
    """Texts of a side with their signatures; `numbers` are those looked at."""

    texts: Texts
    numbers: Int64[np.ndarray, " c"]
    signed: UInt8[np.ndarray, "c 128"]

    def read(self, places: Int64[np.ndarray, " _"]) -> list[str]:
        """The texts at places of `numbers`."""
        return self.texts.read(self.numbers[places])

    @property
    def looked(self) -> str:
        """How much was looked at, in words."""
        return _extent(len(self.numbers), len(self.texts), self.texts.side)


def sketch(texts: Texts, characters: int) -> Sketch:
    """Signatures of all texts, or of so many evenly spread ones as have about this many characters."""
    numbers = texts.spread(SIGNED, characters)
    return Sketch(texts, numbers, near.signatures(texts.batches(numbers), len(numbers)))


def _extent(some: int, of: int, side: str) -> str:
    return f"all {of:,} {side}" if some == of else f"{some:,} of {of:,} {side}, evenly spread"


def _finding(
    texts: Texts, first: int, rule: str, message: str, remedy: str, count: int, of: int, examples: Examples
) -> Finding:
    """At the place of text `first`; a warning where `count` is a large share `of` what was looked at."""
    row, share = int(texts.row[first]), count / of
    file, line = texts.table.files[texts.of.files[row]], int(texts.of.lines[row])
    severity: Severity = "warning" if share >= MANY else "note"
    return Finding(severity, rule, file, line, message, remedy, count, round(share, 4), examples)


# --- Near duplicates ------------------------------------------------------------------------------------------------


def near_duplicates(drawn: Sketch, remedy: str) -> tuple[list[Finding], list[Int64[np.ndarray, " _"]]]:
    """Texts that nearly repeat another of their side; and the groups of them, by their numbers, largest first."""
    texts = drawn.texts
    pairs, similar, more = near.near_pairs(drawn.signed, drawn.read)
    grouped = near.groups(pairs, len(drawn.numbers))
    if not grouped:
        return [], []
    examples = []
    for group in grouped[:PLACES]:
        best = float(similar[np.isin(pairs[:, 0], group)].max())
        shown = texts.contrasted(drawn.numbers[group[:GROUP]])
        examples.append({"note": f"{len(group)} texts, similarity up to {best:.2f}", "texts": shown})
    count = sum(len(group) - 1 for group in grouped)
    told = f"groups: {len(grouped):,}; {drawn.looked}{'; there may be more' if more else ''}"
    shared = f"{near.NEAR:.0%} of their character 5-grams or more are shared"
    message = f"{texts.side} that nearly repeat another: {shared} ({told})"
    first = int(drawn.numbers[grouped[0][1]])
    found = _finding(texts, first, "near duplicate", message, remedy, count, len(drawn.numbers), examples)
    return [found], [drawn.numbers[group] for group in grouped]


def near_leakage(drawn: Sketch, evaluation: Evaluation, asked: Sequence[Sequence[str]], what: str) -> list[Finding]:
    """Texts of a side that nearly repeat one of the evaluation's, and repeat none of them."""
    texts = drawn.texts
    known = np.concatenate([text_keys(side) for side in asked])
    others = evenly(sum(map(len, asked)), SIGNED)
    new = np.flatnonzero(~np.isin(texts.keys[drawn.numbers], known))
    signed = np.concatenate([near.signatures(_batches(asked, others), len(others)), drawn.signed[new]])

    def read(places: Int64[np.ndarray, " _"]) -> list[str]:
        theirs = [_nth(asked, number) for number in others[places[places < len(others)]].tolist()]
        return theirs + drawn.read(new[places[places >= len(others)] - len(others)])

    pairs, similar, more = near.near_pairs(signed, read, references=len(others))
    mine, best = np.unique(pairs[:, 1], return_index=True)
    if not len(mine):
        return []
    numbers = drawn.numbers[new[mine - len(others)]]
    name = "its test split" if evaluation.same_corpus else evaluation.name
    examples = [
        {
            "note": f"similarity {similar[at]:.2f}",
            "texts": [
                texts.quoted(int(number)),
                {"text": shortened(_nth(asked, int(others[pairs[at, 0]]))), "file": evaluation.name, "line": 0},
            ],
        }
        for at, number in sorted(zip(best.tolist(), numbers.tolist(), strict=True))[:PLACES]
    ]
    message = (
        f"{texts.side} that nearly repeat {what} of {name} ({drawn.looked}{'; there may be more' if more else ''})"
    )
    remedy = f"read them: where they say the same, results would be learned by heart; train without them: {WRITE}"
    first = int(numbers.min())
    found = _finding(texts, first, "near leakage", message, remedy, len(mine), len(drawn.numbers), examples)
    rows = [texts.of.rows(name)[np.isin(texts.of.of[name], texts.keys[numbers])] for name in texts.columns]
    return [replace(found, severity="warning", drop=texts.of.numbers[np.unique(np.concatenate(rows))])]


def _nth(sides: Sequence[Sequence[str]], number: int) -> str:
    """Text `number` of several sequences end to end."""
    for side in sides:
        if number < len(side):
            return side[number]
        number -= len(side)
    raise IndexError(number)


def _batches(sides: Sequence[Sequence[str]], numbers: Int64[np.ndarray, " c"]) -> Iterator[list[str]]:
    """The texts of these numbers, which ascend, in several sequences end to end: one pass, little held at a time."""
    texts, start = chain.from_iterable(sides), 0
    while batch := list(islice(texts, AT_ONCE)):
        first, last = np.searchsorted(numbers, [start, start + len(batch)])
        yield [batch[number - start] for number in numbers[first:last].tolist()]
        start += len(batch)


def near_repeats(keys: Keys, groups: Mapping[str, Sequence[Int64[np.ndarray, " _"]]]) -> Int64[np.ndarray, " r"]:
    """The rows all of whose texts are, or nearly repeat, those of an earlier row, under the same label.

    `groups` has, by column, the keys of texts that nearly repeat each other: each stands for the first of its group.
    """
    of = dict(keys.of)
    for name, found in groups.items():
        alike = np.concatenate([np.empty(0, np.int64), *(group[1:] for group in found)])
        first = np.repeat([group[0] for group in found], [len(group) - 1 for group in found])
        order = np.argsort(alike)
        if len(alike):
            at = np.minimum(np.searchsorted(alike[order], of[name]), len(alike) - 1)
            same = alike[order][at] == of[name]
            of[name] = np.where(same, first[order][at], of[name])
    return repeated(replace(keys, of=of))


def near_contradictions(texts: Texts, groups: Sequence[Int64[np.ndarray, " _"]]) -> list[Finding]:
    """Texts that nearly repeat another and stand under another label."""
    labels = texts.of.of["label"]
    torn = [group for group in groups if len(np.unique(labels[texts.row[group]])) > 1]
    if not torn:
        return []
    examples = []
    for group in torn[:PLACES]:
        different = np.sort(np.unique(labels[texts.row[group]], return_index=True)[1])
        rows = texts.of.numbers[texts.row[group[different]]].tolist()
        names = [str(texts.table.arrow.value("label", row)) for row in rows]
        examples.append({"note": " and ".join(names), "texts": texts.contrasted(group[different])})
    message = f"{texts.side} that nearly repeat one under another label (groups: {len(torn):,})"
    count = sum(len(np.unique(labels[texts.row[group]])) - 1 for group in torn)
    found = _finding(
        texts,
        int(torn[0][0]),
        "near contradiction",
        message,
        "read them; decide for one label",
        count,
        len(texts),
        examples,
    )
    return [replace(found, severity="warning")]


# --- Lengths --------------------------------------------------------------------------------------------------------


def lengths(texts: Texts, remedy: str) -> tuple[list[Finding], dict[str, list[float]]]:
    """Texts far longer or shorter than the others, and a histogram of the lengths in characters.

    Far: `ODD` robust standard deviations of the logarithm (1.4826 × the median distance from the median), and `TIMES`
    the median.
    """
    logs = np.log(np.maximum(texts.lengths, 1))
    edges = (
        np.linspace(logs.min(), logs.max(), BARS + 1) if logs.max() > logs.min() else np.array([logs[0], logs[0] + 1])
    )
    histogram = {"edges": np.exp(edges).round(1).tolist(), "counts": np.histogram(logs, edges)[0].tolist()}
    if len(logs) < ENOUGH:
        return [], histogram
    median = float(np.median(logs))
    limit = max(ODD * 1.4826 * float(np.median(np.abs(logs - median))), float(np.log(TIMES)))
    found = []
    for rule, far in (("long", logs - median > limit), ("short", median - logs > limit)):
        if far.any():
            found.append(_odd_lengths(texts, rule, np.flatnonzero(far), float(np.exp(median)), remedy))
    return found, histogram


def _odd_lengths(texts: Texts, rule: str, odd: Int64[np.ndarray, " o"], median: float, remedy: str) -> Finding:
    long = rule == "long"
    order = odd[np.argsort(texts.lengths[odd] * (-1 if long else 1), kind="stable")]
    counted = [f"{length:,} character{'s' if length > 1 else ''}" for length in texts.lengths[order[:PLACES]]]
    examples = [
        {"note": note, "texts": [texts.quoted(int(number))]}
        for note, number in zip(counted, order[:PLACES], strict=True)
    ]
    message = f"{texts.side} that are far {rule}er than the others: {counted[0]}, where the median is {median:,.0f}"
    return _finding(texts, int(order[0]), rule, message, remedy, len(odd), len(texts), examples)


# --- Languages ------------------------------------------------------------------------------------------------------


def odd_languages(texts: Texts, limit: int, remedy: str) -> tuple[list[Finding], dict[str, int], str]:
    """Texts in a language that few are in, how many are in each, and how many were looked at, in words."""
    numbers = texts.spread(limit)
    codes = languages(texts.read(numbers))
    counts = Counter(codes)
    looked = _extent(len(numbers), len(texts), texts.side)
    own = {code for code, count in counts.items() if count >= COMMON * len(codes)} - {NO_LANGUAGE, UNKNOWN}
    odd = [place for place, code in enumerate(codes) if code not in own | {UNKNOWN}]
    if not odd or not own or len(codes) < ENOUGH:
        return [], dict(counts.most_common()), looked
    rare = Counter(codes[place] for place in odd)
    named = ", ".join(f"{_called(code)} {count}" for code, count in rare.most_common(PLACES))
    main = " or ".join(code for code, _ in counts.most_common() if code in own)
    examples = [{"note": _called(codes[place]), "texts": [texts.quoted(int(numbers[place]))]} for place in odd[:PLACES]]
    message = f"{texts.side} that are not in {main}: {named} ({looked})"
    first = int(numbers[odd[0]])
    found = _finding(texts, first, "language", message, remedy, len(odd), len(codes), examples)
    return [found], dict(counts.most_common()), looked


def _called(code: str) -> str:
    return "no language" if code == NO_LANGUAGE else code


# --- Labels ---------------------------------------------------------------------------------------------------------


def label_balance(table: Table, keys: Keys) -> tuple[list[Finding], dict[str, int]]:
    """Labels that few texts have, or most; and how many texts each has.

    The effective number of labels is the exponential of the entropy: how many equally common ones would be as diverse
    (Hill 1973, order 1).
    """
    _, first, counts = np.unique(keys.of["label"], return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    first, counts = first[order], counts[order]
    names = [str(table.arrow.value("label", int(keys.numbers[row]))) for row in first]
    balance = dict(zip(names, counts.tolist(), strict=True))
    effective = _effective(counts / counts.sum())
    found: list[Finding] = []
    if len(keys) < ENOUGH:
        return found, balance
    few = np.flatnonzero(counts < FEW)
    if len(few):
        named = ", ".join(f"{names[i]} {counts[i]}" for i in few[::-1][:PLACES])
        alone = int((counts == 1).sum())
        message = f"labels have fewer than {FEW} texts ({named})" + (
            f"; {alone} have one, which has no positive" if alone else ""
        )
        remedy = "gather more texts of them, or leave them out: data.labels=[…] takes those named"
        found.append(
            _label_finding("warning" if alone else "note", table, keys, first[few], names, message, remedy, few)
        )
    if len(counts) > 1 and effective < len(counts) / 2:
        message = (
            f"labels are out of balance: {names[0]} has {counts[0]:,} texts, {names[-1]} {counts[-1]:,}; as diverse as "
            f"{effective:.1f} equally common ones of {len(counts)}"
        )
        remedy = "for training, none: batches draw all labels alike; judge label by label, not by accuracy in all alone"
        found.append(_label_finding("note", table, keys, first[:1], names, message, remedy, np.arange(len(counts))))
    return found, balance


def _effective(shares: Float[np.ndarray, " l"]) -> float:
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _label_finding(
    severity: Severity, table: Table, keys: Keys, rows: np.ndarray, names: Sequence[str], message: str, remedy: str,
    labels: np.ndarray,
) -> Finding:  # fmt: skip
    examples = [
        {
            "note": names[label],
            "texts": [quoted(table, keys, int(row), table.arrow.value("text", int(keys.numbers[row])))],
        }
        for label, row in list(zip(labels.tolist(), rows.tolist(), strict=False))[-PLACES:]
    ]
    row = int(rows[-1])
    file, line = table.files[keys.files[row]], int(keys.lines[row])
    share = round(len(labels) / len(names), 4) if len(labels) < len(names) else None
    return Finding(severity, "labels", file, line, message, remedy, len(labels), share, examples)
