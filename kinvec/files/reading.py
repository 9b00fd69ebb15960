"""Small JSON files, such as settings and manifests, which a stranger may have written: a value, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError

MOST_BYTES = 64 << 20  # of such a file; Python takes some twenty times as much for it


def read_json(path: str | Path) -> Any:
    """The file's value. Raises `KinvecError`, naming it, where it is missing, too large, or no JSON."""
    path = Path(path)
    if not path.is_file():  # nor a pipe or a device, which would never end
        raise KinvecError(f"{path}: the file is missing, or is none")
    with open(path, "rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise KinvecError(f"{path}: larger than {MOST_BYTES >> 20} MiB, which no such file is")
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise KinvecError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise KinvecError(f"{path}: not valid JSON ({error})") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The file's object, by its keys. Raises `KinvecError` as `read_json`, and where it holds another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise KinvecError(f"{path}: holds a {type(value).__name__}, not an object with named values")
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of `log.jsonl`; the last line of a run that still goes may be half a line and is left out."""
    steps = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    steps.append(json.loads(line))
                except (ValueError, RecursionError):
                    continue
    return [step for step in steps if isinstance(step, dict) and "step" in step]
