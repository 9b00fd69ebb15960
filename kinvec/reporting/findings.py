"""What other parts of kinvec have left in a run: the guard's verdict, the audit of mined negatives, the findings of the
data doctor, and what cheaper vectors cost. Each is shaped as the docstring of its own module says; nothing if absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kinvec.contracts import Result
from kinvec.reporting.reading import read_json
from kinvec.reporting.rendering import Axis, axis

SUSPECTS, HUBS = 10, 10  # of an audit that are shown


def guard(run: Path) -> dict[str, Any] | None:
    """The forgetting guard (`kinvec.merging`), and the curves of its sweep by the share of the tuned weights."""
    told = read_json(run / "guard.json")
    if not told.get("said"):
        return None
    points = told.get("points") or []
    curves = [
        {
            "name": name,
            "metric": own["metric"],
            "floor": -own["tolerance"],
            "points": [(point["share"], point["guards"][name]["difference"]) for point in points],
        }
        for name, own in told["guards"].items()
    ]
    for curve in curves:
        curve["axis"] = axis([value for _, value in curve["points"]] + [curve["floor"], 0.0])
    gain = [(point["share"], point["dev"]) for point in points]
    return told | {
        "curves": curves if points else [],
        "gain": {"points": gain, "axis": axis([value for _, value in gain])} if points else None,
        "axis": axis([0.0, 1.0], tight=True),
    }


def audits(run: Path) -> list[dict[str, Any]]:
    """The audits (`kinvec.auditing`) of the mined data that the run was trained on, one a data set."""
    found = []
    for path in sorted(run.glob("audit*.json")):
        told = read_json(path)
        drawn = told.get("histogram") or {}
        if not drawn.get("edges"):
            continue
        shares = {name: _shares(drawn[name]) for name in ("positives", "negatives")}
        found.append(
            told | {
                "set": path.stem.removeprefix("audit").removeprefix("-"),
                "drawn": shares | {"edges": drawn["edges"]}, "axis": axis(drawn["edges"], tight=True),
                "highest": max(max(values) for values in shares.values()) or 1.0,
                "suspects": told["suspects"][:SUSPECTS], "hubs": told["hubs"][:HUBS],
            }
        )  # fmt: skip
    return found


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def doctor(run: Path) -> dict[str, Any] | None:
    """What the data doctor (`kinvec.doctor`) says of the data, with languages and labels as shares."""
    told = read_json(run / "doctor.json")
    if not told.get("sources"):
        return None
    sources = [
        source | {"languages": {side: _commonest(counts) for side, counts in source["languages"].items()}}
        for source in told["sources"]
    ]
    return told | {"sources": sources}


def _commonest(counts: Mapping[str, int], most: int = 5) -> list[tuple[str, float]]:
    total = sum(counts.values()) or 1
    return [(name, count / total) for name, count in sorted(counts.items(), key=lambda entry: -entry[1])[:most]]


def cheaper(measured: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """Quality against bytes of a vector (`kinvec.tasks.compression`), of the last result of each task that has it."""
    found = []
    for results in measured:
        result = next((result for result in reversed(results) if result.cheaper.get("rows")), None)
        if result is None:
            continue
        rows, measure = result.cheaper["rows"], result.cheaper["measure"]
        kinds = dict.fromkeys((row["precision"], row["rescored"]) for row in rows)
        lines = [
            {
                "precision": precision,
                "rescored": rescored,
                "points": [
                    (math.log2(row["bytes"]), row["metrics"][measure], row)
                    for row in rows
                    if (row["precision"], row["rescored"]) == (precision, rescored)
                ],
            }
            for precision, rescored in kinds
        ]
        found.append(
            {
                "name": result.task, "model": result.model, "measure": measure, "rows": rows, "lines": lines,
                "oversampling": result.cheaper.get("oversampling"),
                "colours": {precision: number for number, precision in enumerate(dict.fromkeys(p for p, _ in kinds))},
                "bytes": _doublings([row["bytes"] for row in rows]),
                "values": axis([row["metrics"][measure] for row in rows], low=0.0, high=1.0),
            }
        )  # fmt: skip
    return found


def _doublings(values: Sequence[int]) -> Axis:
    """A logarithmic axis of bytes: places are powers of two, and so are ticks."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = max(1, math.ceil((high - low) / 6))
    return Axis(low, max(high, low + 1), [float(tick) for tick in range(low, high + 1, step)])
