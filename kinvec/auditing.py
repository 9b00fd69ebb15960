"""What to think of mined negatives: scores of positives and negatives, queries with too few, suspects, hubs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from kinvec.contracts import RetrievalData
from kinvec.mining import Mined, MiningSettings

BINS = 40
SHOWN = 100  # suspects listed
HUBS = 20
SNIPPET = 200


def audit(data: RetrievalData, found: Sequence[Mined], settings: MiningSettings) -> dict[str, Any]:
    """Counts, histograms of scores, the share each source brought, likely false negatives, and hubs.

    A suspect scored above the limits: perhaps a positive that nobody judged. A hub is a document that is a negative of
    many queries.
    """
    positives = np.array([score for mined in found for score in mined.positive_scores])
    negatives = np.array([score for mined in found for score in mined.scores])
    few = sum(len(mined.negatives) < settings.negatives for mined in found)
    sources = Counter(source for mined in found for source in mined.sources)
    return {
        "queries": len(found),
        "documents": len(data.corpus),
        "wanted": settings.negatives,
        "negatives": len(negatives),
        "too_few": few,
        "too_few_share": few / max(len(found), 1),
        "mean_scores": {"positives": _mean(positives), "negatives": _mean(negatives)},
        "histogram": _histogram(positives, negatives),
        "sources": {name: count / len(negatives) for name, count in sources.most_common()},
        "suspected": sum(mined.suspected for mined in found),
        "suspects": _suspects(data, found),
        "hubs": _hubs(data, found),
    }


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def _histogram(positives: np.ndarray, negatives: np.ndarray) -> dict[str, list[float]]:
    both = np.concatenate([positives, negatives])
    edges = np.histogram_bin_edges(both, BINS)
    counts = {
        name: np.histogram(values, edges)[0].tolist()
        for name, values in (("positives", positives), ("negatives", negatives))
    }
    return {"edges": edges.round(4).tolist(), **counts}


def _suspects(data: RetrievalData, found: Sequence[Mined]) -> list[dict[str, Any]]:
    """The most suspicious candidate of each query, those farthest above its lowest positive first."""
    queries = list(data.qrels)
    worst = [(mined.suspect[1] - min(mined.positive_scores), mined, *mined.suspect) for mined in found if mined.suspect]
    worst.sort(key=lambda entry: -entry[0])
    return [
        {
            "query_id": queries[mined.query], "query": data.queries[queries[mined.query]],
            "doc_id": data.corpus.ids[row], "text": _snippet(data.corpus.texts[row]), "score": round(score, 4),
            "positive_id": data.corpus.ids[mined.positives[int(np.argmin(mined.positive_scores))]],
            "positive_score": round(min(mined.positive_scores), 4),
        }
        for _, mined, row, score in worst[:SHOWN]
    ]  # fmt: skip


def _hubs(data: RetrievalData, found: Sequence[Mined]) -> list[dict[str, Any]]:
    counts = Counter(row for mined in found for row in mined.negatives)
    return [
        {"doc_id": data.corpus.ids[row], "queries": count, "share": round(count / len(found), 4),
         "text": _snippet(data.corpus.texts[row])}
        for row, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:HUBS] if count > 1
    ]  # fmt: skip


def _snippet(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SNIPPET else f"{line[:SNIPPET]}…"
