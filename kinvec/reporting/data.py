"""What the run learned from: counts, lengths of texts in tokens, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kinvec.reporting.reading import flat
from kinvec.reporting.rendering import axis


def described(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data.json` in the order of the page: counts, token lengths, warnings, and whatever else the run recorded."""
    known = ("counts", "tokens", "warnings", "sets")
    limit = data.get("max_length")
    return {
        "counts": flat(data.get("counts") or {}),
        "lengths": [lengths(side, summary, limit) for side, summary in (data.get("tokens") or {}).items()],
        "warnings": [str(warning) for warning in data.get("warnings") or []],
        "other": flat({key: value for key, value in data.items() if key not in known}),
    }


def lengths(side: str, summary: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Token lengths as bars of `from`–`to` tokens; `cut` where all of a bar's texts are longer than the maximum."""
    stored = summary.get("histogram") or {"counts": [], "edges": []}
    ends = zip(stored["counts"], stored["edges"], stored["edges"][1:], strict=False)
    bars = [{"count": n, "from": a, "to": b, "cut": limit is not None and a >= limit} for n, a, b in ends]
    return {
        "side": side,
        "bars": bars,
        "highest": max((bar["count"] for bar in bars), default=1),
        "axis": axis(stored["edges"], tight=True),
        "limit": limit,
        **{key: summary.get(key) for key in ("mean", "p95", "max", "truncated_share", "sampled")},
    }
