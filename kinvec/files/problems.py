"""One way to say what is wrong with a row: rule, file, line, what it is, what to do; and who listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kinvec.contracts import KinvecError, presentable

KEPT_PER_RULE = 20  # problems kept with their place; all are counted
REMEDY = "correct it, or drop such rows with --skip-bad (train: data.skip_bad=true)"


class BadValue(ValueError):
    """A row cannot be used; says what and how to mend it, but not where: the reader knows the file and the line."""

    def __init__(self, rule: str, message: str, remedy: str = REMEDY) -> None:
        super().__init__(message)
        self.rule, self.message, self.remedy = rule, message, remedy


class DataError(KinvecError):
    """A place in a data file that is wrong. Reads as `file.jsonl:27: what it is; what to do`."""

    def __init__(self, rule: str, file: str, line: int, message: str, remedy: str = REMEDY) -> None:
        message = presentable(message)  # it is kept beside the rows as well
        where = f"{file}:{line}" if line else file
        super().__init__(f"{where}: {message}" + (f"; {remedy}" if remedy else ""))
        self.rule, self.file, self.line, self.message, self.remedy = rule, file, line, message, remedy

    def parts(self, root: str) -> list[Any]:
        """What `at(root, …)` makes it from again, wherever the source lies then."""
        inside = self.file.startswith(root)
        return [self.rule, inside, self.file.removeprefix(root), self.line, self.message, self.remedy]

    @classmethod
    def at(cls, root: str, rule: str, inside: bool, file: str, line: int, message: str, remedy: str) -> DataError:
        return cls(rule, root + file if inside else file, line, message, remedy)


@dataclass
class Notes:
    """What a reader has to say. Strict: the first problem is raised. Else all are counted and the first ones kept.

    `remarks` are no problems: what was left out by rule, such as queries that no document was judged relevant to.
    """

    strict: bool = True
    kept: list[DataError] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    remarks: list[DataError] = field(default_factory=list)

    def bad(self, error: DataError) -> None:
        if self.strict:
            raise error
        self.counts[error.rule] += 1
        if self.counts[error.rule] <= KEPT_PER_RULE:
            self.kept.append(error)

    def take(self, other: Notes) -> None:
        """Note what another one noted; if strict its first problem is raised."""
        if self.strict and other.kept:
            raise other.kept[0]
        self.kept += other.kept
        self.counts += other.counts
        self.remarks += other.remarks

    def to_json(self, root: str) -> dict[str, Any]:
        """As plain values, with file names relative to `root`, so that a moved copy names its own place."""
        kept, remarks = ([e.parts(root) for e in errors] for errors in (self.kept, self.remarks))
        return {"kept": kept, "counts": dict(self.counts), "remarks": remarks}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], root: str) -> Notes:
        kept, remarks = ([DataError.at(root, *parts) for parts in value[name]] for name in ("kept", "remarks"))
        return cls(False, kept, Counter(value["counts"]), remarks)
