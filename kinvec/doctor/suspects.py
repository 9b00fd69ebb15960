"""Suspected false negatives: documents that a model scores near a query's positive, though nobody judged them relevant.

The limit is that of mining: above 95 % of the score of the query's lowest positive (NV-Retriever, Moreira et al. 2024).
A sample of rows is scored: each query with its own negatives, and with the documents of the other rows, which would be
its negatives in a batch. Shapes: q = queries of the sample, n = its distinct documents, d = dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from kinvec.checks import PLACES, Finding, Keys, Severity, quoted
from kinvec.contracts import Encoder
from kinvec.files import Table, evenly, text_key
from kinvec.mining import MiningSettings, ceiling
from kinvec.tasks.evaluation import scaling

ROWS, DOCUMENTS = 300, 1000  # of the sample, at most: half a minute on a CPU with a small model
MANY = 0.05  # share of the queries from which on suspects are a warning


@dataclass(frozen=True)
class Scored:
    """The sample: scores of queries with documents, each query's ceiling, and what is known of each pair."""

    rows: Int64[np.ndarray, " q"]
    documents: list[str]
    scores: Float32[np.ndarray, "q n"]
    lowest: Float32[np.ndarray, " q"]
    positive: Bool[np.ndarray, "q n"]
    negative: Bool[np.ndarray, "q n"]
    own_text: Bool[np.ndarray, "q n"]


def score_sample(table: Table, keys: Keys, encoder: Encoder) -> Scored:
    """Encode and score evenly spread rows. A query's positives are those of all rows of the sample with its text."""
    a_row = (len(keys.of["pos_doc"]) + len(keys.of["neg_doc"])) / len(keys)
    rows = evenly(len(keys), max(1, min(ROWS, int(DOCUMENTS / max(1.0, a_row)))))
    examples = [table.example(int(keys.numbers[row])) for row in rows]
    texts: dict[int, str] = {}
    positives: dict[int, set[int]] = {}
    for example in examples:
        texts |= {text_key(text): text for text in (*example.negatives, *example.positives)}
        positives.setdefault(text_key(example.query), set()).update(map(text_key, example.positives))
    number = {key: at for at, key in enumerate(texts)}
    positive, negative, own_text = (np.zeros((len(rows), len(texts)), bool) for _ in range(3))
    for at, example in enumerate(examples):
        asked = text_key(example.query)
        positive[at, [number[key] for key in positives[asked]]] = True
        negative[at, [number[text_key(text)] for text in example.negatives]] = True
        own_text[at, [number[asked]] if asked in number else []] = True
    scale = scaling(getattr(encoder, "similarity", "cosine"))
    queries = scale(encoder.encode_queries([example.query for example in examples]))
    scores = queries @ scale(encoder.encode_documents(list(texts.values()))).T
    lowest = np.where(positive, scores, np.inf).min(axis=1).astype(np.float32)
    return Scored(rows, list(texts.values()), scores, lowest, positive, negative, own_text)


def false_negatives(table: Table, keys: Keys, encoder: Encoder) -> tuple[list[Finding], str]:
    """Findings for the rows' own negatives and for those of a batch; and how much was looked at, in words."""
    scored = score_sample(table, keys, encoder)
    limits = np.array([ceiling(float(lowest), MiningSettings()) for lowest in scored.lowest])[:, None]
    above = (scored.scores > limits) & ~scored.positive & ~scored.own_text
    source, model = table.source, encoder.name
    judged = int(scored.negative.any(axis=1).sum())
    found = _finding(
        table, keys, scored, above & scored.negative, judged, "false negative",
        "queries have a negative that may be an answer",
        f"read them; mine others: kinvec mine --model {model} --data {source} --out mined",
    ) if judged else []  # fmt: skip
    found += _finding(
        table, keys, scored, above & ~scored.negative, len(scored.rows), "batch negative",
        "queries have a document of another row that may be an answer: in a batch, a false negative",
        f"let a model mask them: objective.guide={model}",
    )  # fmt: skip
    looked = f"{len(scored.rows):,} of {len(keys):,} rows with {len(scored.documents):,} documents, judged by {model}"
    return found, looked


def _finding(
    table: Table, keys: Keys, scored: Scored, suspects: np.ndarray, of: int, rule: str, what: str, remedy: str
) -> list[Finding]:  # fmt: skip
    """One finding for the queries that have suspects; those farthest above their positive are shown."""
    queries = np.flatnonzero(suspects.any(axis=1))
    if not len(queries):
        return []
    worst = np.where(suspects, scored.scores, -np.inf)
    gap = worst.max(axis=1)[queries] - scored.lowest[queries]
    queries = queries[np.argsort(-gap, kind="stable")]
    share = len(queries) / of
    severity: Severity = "warning" if share >= MANY else "note"
    message = f"{what} (a score above 95 % of their positive's; {of:,} sampled)"
    row = int(scored.rows[queries[0]])
    file, line = table.files[keys.files[row]], int(keys.lines[row])
    shown = [_shown(table, keys, scored, query, int(worst[query].argmax())) for query in queries[:PLACES].tolist()]
    return [Finding(severity, rule, file, line, message, remedy, len(queries), round(share, 4), shown)]


def _shown(table: Table, keys: Keys, scored: Scored, query: int, suspect: int) -> dict[str, Any]:
    row = int(scored.rows[query])
    own = int(np.where(scored.positive[query], scored.scores[query], np.inf).argmin())
    asked = str(table.arrow.value("query", int(keys.numbers[row])))
    note = f"query, suspect ({scored.scores[query, suspect]:.2f}) and positive ({scored.lowest[query]:.2f})"
    texts = (asked, scored.documents[suspect], scored.documents[own])
    return {"note": note, "texts": [quoted(table, keys, row, text) for text in texts]}
