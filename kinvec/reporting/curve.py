"""The learning curve, and what each of several data sets gave to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kinvec.reporting.rendering import axis, number

POINTS = 400  # of a learning curve that are drawn: more than a screen tells apart
SMOOTHING = 0.9  # of the loss: each point keeps this share of the last


def learning_curve(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Loss (raw and smoothed), learning rate and dev metric over the steps, thinned to what a screen can show."""
    steps = sorted(steps, key=lambda step: step["step"])
    smooth: list[float] = []
    weight = total = 0.0
    for step in steps:  # bias-corrected exponential mean, as Adam's
        weight, total = SMOOTHING * weight + 1 - SMOOTHING, SMOOTHING * total + (1 - SMOOTHING) * step.get("loss", 0.0)
        smooth.append(total / weight)
    dev_name = next((name for step in steps for name in step.get("dev") or {}), None)
    dev = [(step["step"], step["dev"][dev_name]) for step in steps if dev_name in (step.get("dev") or {})]
    kept = sorted({*range(0, len(steps), math.ceil(len(steps) / POINTS) or 1), len(steps) - 1} - {-1})
    best = max(dev, key=lambda point: point[1], default=None)
    thin = [steps[i] for i in kept]
    return {
        "steps": len(steps),
        "step": [step["step"] for step in thin],
        "loss": [step.get("loss", 0.0) for step in thin],
        "smooth": [smooth[i] for i in kept],
        "lr": [step.get("lr", 0.0) for step in thin],
        "dev": dev,
        "dev_name": dev_name,
        "val_loss": [
            (step["step"], step["dev"]["val_loss"]) for step in steps if "val_loss" in (step.get("dev") or {})
        ],
        "best": best,
        "axis": axis([0.0, *(step["step"] for step in thin)], tight=True),
        "tokens": sum(step.get("tokens", 0) for step in steps),
        "tokens_per_second": float(np.median([step.get("tokens_per_s", 0.0) for step in steps])) if steps else 0.0,
        "readout": [_readout(step, dev_name) for step in thin],
    }


def shares(steps: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of several data sets: rows each has and gave so far, and the mean loss in its first and last tenth of steps."""
    total = sum(sum(step.get("sets", {}).values()) for step in steps)
    told = []
    for name, own in described.items():
        losses = [step[f"loss/{name}"] for step in steps if f"loss/{name}" in step]
        tenth = max(1, len(losses) // 10)
        seen = sum(step.get("sets", {}).get(name, 0) for step in steps)
        told.append(
            {
                "name": name, **own, "seen": seen, "share": seen / max(total, 1),
                "first": float(np.mean(losses[:tenth])) if losses else None,
                "last": float(np.mean(losses[-tenth:])) if losses else None,
            }
        )  # fmt: skip
    return told


def _readout(step: Mapping[str, Any], dev_name: str | None) -> str:
    parts = [f"step {step['step']:,}", f"loss {step.get('loss', 0.0):.4f}", f"learning rate {step.get('lr', 0.0):.2e}"]
    if dev_name in (step.get("dev") or {}):
        parts.append(f"dev {dev_name} {number(step['dev'][dev_name])}")
    return " · ".join(parts)
