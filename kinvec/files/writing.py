"""Writers that never leave half a file, and the hashes by which files and texts are recognised.

A file is written beside its place, flushed to the disk and renamed; whoever reads sees the old one or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from jaxtyping import Int64

CHUNK_BYTES = 1 << 20


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 in one step: beside the place, synced, renamed. Missing parent folders are made."""
    return write_lines(path, [text], end="")


def write_lines(path: str | Path, lines: Iterable[str], end: str = "\n") -> Path:
    """Write lines, one held at a time, as `write_text` writes a text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(f"{line}{end}" for line in lines)
    return path


@contextmanager
def replacing(path: Path, mode: str, **how: Any) -> Iterator[IO[Any]]:
    """A file beside `path` to write into, opened with `mode` and `how`; synced and renamed at the end, or gone."""
    beside = beside_path(path)
    try:
        with open(beside, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON in one step, keys in their own order, other scripts' letters as they are."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def replace_folder(tmp: str | Path, final: str | Path) -> Path:
    """Move the finished folder `tmp` to `final`; a folder that was there is gone only once the new one is in place."""
    tmp, final = Path(tmp), Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = beside_path(final.with_name(f"{final.name}.old"))  # `tmp` may have the name beside `final`
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(tmp, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return final


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left beside the files and folders that it was writing inside `folder`."""
    for path in list(Path(folder).rglob(".*.tmp")):
        _tidy(path)


def sweep_beside(path: str | Path) -> None:
    """Remove what killed processes left beside `path` while they were making or replacing it as a whole."""
    path = Path(path).absolute()
    left = re.compile(rf"\.{re.escape(path.name)}(\.new|\.old)*\.\d+\.tmp")
    for other in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        if left.fullmatch(other.name):
            _tidy(other)


def _tidy(path: Path) -> None:
    """Remove a leftover; but a folder that had just been moved away for its successor, which never came, goes back."""
    replaced = re.fullmatch(r"\.(.+)\.old\.\d+\.tmp", path.name)
    if replaced and path.exists() and not path.with_name(replaced[1]).exists():
        os.replace(path, path.with_name(replaced[1]))
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def beside_path(path: Path) -> Path:
    """Where a file or folder is built before it is renamed to `path`; one place a process, on the same disk."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def saying_full(folder: str | Path, size: int) -> Iterator[None]:
    """Turn what a library raises inside into the `OSError` of a full disk, where fewer than `size` bytes are free.

    torch and safetensors have error types of their own for a write that fails.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or shutil.disk_usage(folder).free >= size:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def content_fingerprint(source: str | Path | bytes) -> str:
    """The xxh3-128 of bytes, of a file's content, or of all files of a folder with their relative names, in hex.

    The place and the name of the file or folder do not count: a copy has the same fingerprint.
    """
    if isinstance(source, bytes):
        return xxhash.xxh3_128_hexdigest(source)
    path, digest = Path(source), xxhash.xxh3_128()
    if path.is_dir():
        for inner in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{inner.relative_to(path).as_posix()}\0{content_fingerprint(inner)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def damaged(folder: str | Path, checksums: Mapping[str, str]) -> list[str]:
    """The files of a folder that are gone, or whose content is no longer of the fingerprint noted under their name.

    Reads all of them: xxh3 takes a second for some GiB, so the disk sets the pace.
    """
    places = {name: Path(folder) / name for name in checksums}
    return [name for name, path in places.items() if not path.is_file() or content_fingerprint(path) != checksums[name]]


def read_written(path: str | Path) -> Any:
    """The value of a JSON file of ours; None where there is none, or it is damaged, for it to be made again."""
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else None  # a pipe or a device would never end
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def normalise(text: str) -> str:
    """The text as it is compared: case folded, white space of any kind and length made one space."""
    return " ".join(text.casefold().split())


def text_key(text: str) -> int:
    """The xxh3-64 of the normalised text as a signed 64-bit integer; two different texts share it once in 2**64."""
    return exact_key(normalise(text))


def exact_key(text: str) -> int:
    """The xxh3-64 of the text (or id) as it is, as a signed 64-bit integer."""
    key = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
    return key - (1 << 64) if key >> 63 else key


def text_keys(texts: Iterable[str]) -> Int64[np.ndarray, " n"]:
    """`text_key` of every text, as int64 [n]: 8 bytes a text, whatever its length."""
    return np.fromiter((text_key(text) for text in texts), dtype=np.int64)


def text_id(text: str) -> str:
    """The id of a text that came without one: the xxh3-128 of the text as it is, in hex; equal texts share it."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
