"""Texts in the plane, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kinvec.contracts import Result
from kinvec.reporting.reading import main_metric
from kinvec.reporting.rendering import snippet

COLOURS = 8  # labels of a picture that have a colour of their own


def plane(base: Result, tuned: Result | None) -> dict[str, Any] | None:
    """The texts in the plane before and after, by label; of many labels those that the base recovers worst."""
    if "tsne_x" not in base.per_query:
        return None
    worst: dict[str, list[float]] = {}
    for label, value in zip(base.per_query["label"], base.per_query[main_metric(base)], strict=True):
        worst.setdefault(label, []).append(value)
    labels = sorted(worst, key=lambda label: float(np.mean(worst[label])))[:COLOURS]
    named = sorted(labels)
    colour = {label: number for number, label in enumerate(named)}
    sides = [(title, _places(side, colour)) for title, side in (("Before", base), ("After", tuned)) if side]
    return {"labels": named, "others": len(worst) - len(named), "sides": sides}


def _places(result: Result, colour: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each text's place in per cent of a square, at one scale in both directions; texts without a colour first."""
    rows = zip(*(result.per_query[column] for column in ("tsne_x", "tsne_y", "label", "query")), strict=True)
    found = [(x, y, label, text) for x, y, label, text in rows if x is not None]
    xs, ys = ([row[i] for row in found] for i in (0, 1))
    scale = 94 / (max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0)
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    dots = [
        {
            "x": round(50 + (x - middle[0]) * scale, 1), "y": round(50 - (y - middle[1]) * scale, 1),
            "colour": colour.get(label), "title": f"{label}: {snippet(text, 90)}",
        }
        for x, y, label, text in found
    ]  # fmt: skip
    return sorted(dots, key=lambda dot: dot["colour"] is not None)
