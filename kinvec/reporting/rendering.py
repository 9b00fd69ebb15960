"""Page out: the templates filled with what was collected, and what they call: axes, numbers, snippets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

Number = float | int  # JSON has both for the same thing


def render(data: Mapping[str, Any]) -> str:
    """The page, from what `collect` returned."""
    return _templates().get_template("report.html.j2").render(data)


@cache
def _templates() -> Environment:
    """Compiled once for all pages of a process."""
    templates = Environment(
        loader=PackageLoader("kinvec"),
        autoescape=lambda name: name is None or not name.endswith((".css", ".js")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "number": number,
        "signed": signed,
        "p_value": p_value,
        "compact": compact,
        "snippet": snippet,
        "embed": embed,
    }
    templates.globals |= {"axis": axis, "zip": zip}
    return templates


def embed(value: Any) -> str:
    """A value as JSON that may stand in a <script>: nothing in it closes the element or ends a line of JavaScript.

    Raises `ValueError` for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from values to per cent of a plot's width or height, with round ticks."""

    low: Number
    high: Number
    ticks: list[float]

    def at(self, value: Number) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def down(self, value: Number) -> float:
        """Per cent from the top: the place of the value on a vertical axis."""
        return round(100 - self.at(value), 3)


def axis(
    values: Sequence[Number], *, low: Number = -math.inf, high: Number = math.inf, ticks: int = 4, tight: bool = False
) -> Axis:
    """An axis that shows all values, within [low, high] where those bound what is possible.

    Ends are round numbers, or with `tight` the values' own. Ticks are 1, 2, 2.5 or 5 times a power of ten apart.
    """
    first, last = (min(values), max(values)) if len(values) else (0.0, 1.0)
    span = (last - first) or abs(first) / 10 or 1.0
    rough = span / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    start, end = math.floor(first / step) * step, math.ceil(last / step) * step
    if end <= start:
        start, end = (start, start + step) if start + step <= high else (start - step, start)
    marks = [round(start + i * step, 12) for i in range(round((end - start) / step) + 1)]
    if tight and last > first:
        start, end = first, last
    start, end = max(start, low), min(end, high)
    return Axis(start, end, [mark for mark in marks if start - step * 1e-6 <= mark <= end + step * 1e-6])


def number(value: Number) -> str:
    """A metric to four places."""
    return f"{value:.4f}"


def signed(value: Number) -> str:
    """A difference to four places, with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def p_value(p: Number) -> str:
    """`< 0.001`, or `= 0.034`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def compact(value: Number) -> str:
    """A tick's label: 1,200 · 0.25 · 2e-5."""
    if value and abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4f}".rstrip("0").rstrip(".").replace("-", "−")


def snippet(text: str | None, length: int = 170) -> str:
    """The beginning of a text, cut between words."""
    text = " ".join((text or "").split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"
