"""The embeddings folder: `query.npy`, `query.ids`, `doc.npy`, `doc.ids`, perhaps `qrels.tsv`, and `manifest.json` last.

Vectors are float32 rows in plain NumPy files, ids one a line in the same order. A side of more than `SHARD_WINDOWS`
windows is written as shards `doc-00000.npy`, `doc-00001.npy`, … of equal length (the last one shorter).

It is made window by window: each is encoded, written beside and renamed (`doc.0000012.CHECKSUM.part`), and a shard's
parts are joined when they are all there. Windows are counted from the start of the source, so a run that was killed
repeats at most one of them and ends with the same bytes. Until the manifest is there, `progress.json` says whose folder
it is. Both have checksums of the files: a reader refuses a damaged one, and its maker makes it again.

Shapes: n = texts, d = dimensions.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

from kinvec.config import differences
from kinvec.console import say
from kinvec.contracts import KinvecError, Qrels, one_sentence
from kinvec.files.writing import (
    beside_path,
    content_fingerprint,
    damaged,
    read_written,
    replace_folder,
    replacing,
    sweep,
    sweep_beside,
    write_json,
)

KIND, FORMAT = "kinvec embeddings", 1
MANIFEST, PROGRESS, QRELS = "manifest.json", "progress.json", "qrels.tsv"
WINDOW = 8192  # texts encoded and written at a time: what a kill can cost
SHARD_WINDOWS = 122  # windows of a shard: 999,424 rows

# --- Whose folder is it? ----------------------------------------------------------------------------------------------


def read_state(folder: Path) -> dict[str, Any] | None:
    """The manifest of an embeddings folder, or what was noted when it was begun; None if it is not one of ours.

    Raises `KinvecError` where it names files that are not in the folder: the damaged ones of those would be removed.
    """
    for name in (MANIFEST, PROGRESS):
        found = read_written(folder / name)
        if isinstance(found, dict) and found.get("kind") == KIND and found.get("format") == FORMAT:
            parts = [found.get(key, {}) for key in ("rows", "checksums", "settings")]
            if not all(isinstance(part, dict) for part in parts):
                raise KinvecError(f"{folder / name}: damaged; embed again, into another folder")
            for other in chain(*parts[:2]):
                if Path(other).name != other:
                    raise KinvecError(f"{folder / name}: '{other}' is not in the folder; refused")
            return found | {"finished": name == MANIFEST}
    return None


def refuse_foreign(folder: Path) -> None:
    """Raise `KinvecError` unless vectors may be written into `folder`: absent, empty, or an embeddings folder."""
    if folder.exists() and not folder.is_dir():
        raise KinvecError(f"{folder} is a file; name a folder for the vectors")
    if folder.is_dir() and read_state(folder) is None and any(folder.iterdir()):
        raise KinvecError(f"{folder} holds other things than vectors of ours; name an empty or a new folder")


def refuse_changed(folder: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise `KinvecError`, naming what differs, unless `folder` was begun with exactly these settings."""
    changed = "; ".join(differences(state["settings"], settings))
    if changed:
        raise KinvecError(f"{folder} was made with other settings ({changed}); name another folder, or add --force")


# --- Writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def listed(
    folder: Path, sides: Mapping[str, Iterable[tuple[str, str]]], judgements: Iterable[tuple[str, str, int]]
) -> Iterator[tuple[Path, dict[str, int]]]:
    """Read every source once to its end, so that what is wrong with it is said before anything is encoded.

    Gives a folder beside `folder` with the ids and the judgements in it, for `begin` to put into its place within the
    block, and the rows of each side.
    """
    sweep_beside(folder)
    beside = beside_path(folder.with_name(f"{folder.name}.new"))
    try:  # a signal may come as soon as the folder is there
        beside.mkdir(parents=True)
        rows = {side: _write_ids(beside / f"{side}.ids", side, texts) for side, texts in sides.items()}
        _write_judgements(beside / QRELS, judgements)
        yield beside, rows
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_ids(path: Path, side: str, texts: Iterable[tuple[str, str]]) -> int:
    rows = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        for identity, _ in texts:
            if "\n" in identity or "\r" in identity or not identity:
                raise KinvecError(
                    f"the {side} id {identity!r} (row {rows + 1:,}) does not fit on a line; give it another"
                )
            file.write(identity + "\n")
            rows += 1
    if not rows:
        raise KinvecError(f"there is no {side} to embed; give a file with at least one text")
    return rows


def _write_judgements(path: Path, judgements: Iterable[tuple[str, str, int]]) -> None:
    lines = iter(judgements)
    first = next(lines, None)
    if first is None:
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"{query}\t{document}\t{grade}\n" for query, document, grade in chain([first], lines))


def begin(folder: Path, beside: Path, rows: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Move what `listed` made to `folder`, in one step; from here on it is ours and can be continued."""
    state = {"kind": KIND, "format": FORMAT, "rows": dict(rows), "settings": dict(settings)}
    state["checksums"] = {path.name: content_fingerprint(path) for path in sorted(beside.iterdir())}
    write_json(beside / PROGRESS, state)
    replace_folder(beside, folder)
    return state


Encode = Callable[[Iterator[Sequence[str]]], Iterator[np.ndarray]]  # windows of texts → their vectors


def write_side(
    folder: Path,
    side: str,
    rows: int,
    texts: Iterator[tuple[str, str]],
    encode: Encode,
    advance: Callable[[int, bool], None] = lambda n, new: None,
) -> None:
    """Encode what is not there yet of one side, holding two windows of texts, however many rows there are.

    `encode` gives the vectors of each window of an iterator, and may take the next one before it gives those of the
    last (`encoders.each`). `advance` is told the rows of every window once they are there, and whether they are new.
    """
    windows = enumerate(_windows(texts))
    for name in shard_names(side, rows):
        whole, parts, asked = (folder / name).exists(), dict[int, Path](), deque[int]()
        absent = _absent(folder, side, islice(windows, SHARD_WINDOWS), parts, asked, whole, advance)
        for vectors in encode(absent):
            window = asked.popleft()
            parts[window] = _write_part(folder, _part_name(side, window), vectors)
            advance(len(vectors), True)
        if not whole:
            _join([parts[window] for window in sorted(parts)], folder / name)
        for part in parts.values():
            part.unlink(missing_ok=True)


def _absent(
    folder: Path, side: str, windows: Iterator[tuple[int, list[str]]], parts: dict[int, Path], asked: deque[int],
    whole: bool, advance: Callable[[int, bool], None],
) -> Iterator[list[str]]:  # fmt: skip
    """The windows that are still to be encoded, their numbers put into `asked`; the others' files into `parts`."""
    for window, batch in windows:
        if part := _part(folder, _part_name(side, window)):
            parts[window] = part
        if part or whole:
            advance(len(batch), False)
        else:
            asked.append(window)
            yield batch


def _part_name(side: str, window: int) -> str:
    return f"{side}.{window:07d}"


def _part(folder: Path, name: str) -> Path | None:
    """The window of that name if it is there and whole; what is left of a damaged one is removed."""
    for path in folder.glob(f"{name}.*part"):
        if path.name == f"{name}.{content_fingerprint(path)}.part":
            return path
        path.unlink()
    return None


def _write_part(folder: Path, name: str, vectors: np.ndarray) -> Path:
    path = folder / f"{name}.part"
    write_array(path, np.ascontiguousarray(vectors, dtype=np.float32))
    return path.rename(folder / f"{name}.{content_fingerprint(path)}.part")


def finish(folder: Path, state: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Check that every row is there and write the manifest, which says `about` too (model, prompts, versions)."""
    rows = state["rows"]
    sides = {side: {"rows": n, "files": shard_names(side, n), "ids": f"{side}.ids"} for side, n in rows.items()}
    for side, said in sides.items():
        shapes = [np.load(folder / name, mmap_mode="r").shape for name in said["files"]]
        found, dimension = sum(shape[0] for shape in shapes), shapes[0][1]
        if found != said["rows"]:
            raise KinvecError(
                f"the {side} file had {said['rows']:,} rows and then {found:,}; add --force to start afresh"
            )
    begun = state.get("checksums", {})
    if names := damaged(folder, begun):
        raise KinvecError(f"{folder / names[0]}: damaged since the folder was begun; add --force to start afresh")
    qrels = {"qrels": QRELS} if (folder / QRELS).exists() else {}
    about = {"dimension": dimension, **about}
    manifest = {"kind": KIND, "format": FORMAT, **about, **sides, **qrels, "rows": rows, "settings": state["settings"]}
    made = [name for said in sides.values() for name in said["files"]]
    made += [about["ranges"]] if "ranges" in about else []
    manifest["checksums"] = {**begun, **{name: content_fingerprint(folder / name) for name in made}}
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def mended(folder: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a folder; of a finished one with damaged files, that of one where these have still to be made.

    None where vectors alone would not mend it: ids are damaged, or the vectors were stored in another form since.
    """
    sweep(folder)
    names = damaged(folder, state.get("checksums", {})) if state["finished"] else []
    if not names:
        return state
    say(f"{folder}: {', '.join(names)}: damaged or gone; made again")
    shards = {name for side, n in state["rows"].items() for name in shard_names(side, n)}
    if not shards.issuperset(names) or "ranges" in state:
        return None
    for name in names:  # before the manifest, which would know of them if this were killed
        (folder / name).unlink(missing_ok=True)
    kept = {name: checksum for name, checksum in state["checksums"].items() if name not in shards}
    begun = {key: state[key] for key in ("kind", "format", "rows", "settings")} | {"checksums": kept}
    write_json(folder / PROGRESS, begun)
    (folder / MANIFEST).unlink()
    return begun | {"finished": False}


Source = Callable[[], Iterator[tuple[str, str]]]


def kept(folder: Path, sides: Mapping[str, tuple[Source, Encode]], settings: Mapping[str, Any]) -> dict[str, Vectors]:
    """The vectors of every side's texts, kept in `folder`: those that are there if model and texts are the same.

    A folder that was left half-way is continued; one of other `settings` is made anew, and said so. Raises
    `KinvecError` for a folder of other things.
    """
    refuse_foreign(folder)
    state = read_state(folder)
    if state is not None and state["settings"] != dict(settings):
        say(f"{folder}: the vectors there are of another model or other texts; encoding anew")
        state = None
    state = state and mended(folder, state)
    if state is None:
        with listed(folder, {side: texts() for side, (texts, _) in sides.items()}, ()) as (beside, rows):
            state = begin(folder, beside, rows, settings) | {"finished": False}
    if not state.pop("finished"):
        for side, (texts, encode) in sides.items():
            write_side(folder, side, state["rows"][side], texts(), encode)
        finish(folder, state, {})
    return {side: open_vectors(folder, side) for side in sides}


def shard_names(side: str, rows: int) -> list[str]:
    """The files of a side: one, or shards where there are more rows than one shard holds."""
    shards = -(-rows // (WINDOW * SHARD_WINDOWS))
    return [f"{side}.npy"] if shards == 1 else [f"{side}-{shard:05d}.npy" for shard in range(shards)]


def _windows(texts: Iterator[tuple[str, str]]) -> Iterator[list[str]]:
    while batch := [text for _, text in islice(texts, WINDOW)]:
        yield batch


def write_array(path: Path, array: Shaped[np.ndarray, "n d"]) -> None:
    """Write a plain NumPy file, beside and renamed."""
    write_blocks(path, array.shape, [array], array.dtype)


def _join(parts: Sequence[Path], target: Path) -> None:
    """Concatenate arrays into one NumPy file, holding one of them at a time."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    write_blocks(target, (sum(shape[0] for shape in shapes), shapes[0][1]), map(np.load, parts))


def write_blocks(
    path: Path, shape: tuple[int, ...], blocks: Iterable[Shaped[np.ndarray, "_ d"]], dtype: DTypeLike = np.float32
) -> None:
    """Write a plain NumPy file [n, d] block by block, beside and renamed. Raises `OSError` where the disk is full.

    (`np.save` raises one without its reason there, and a memory map ends the process without a word.)
    """
    said = np.lib.format.dtype_to_descr(np.dtype(dtype))
    with replacing(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": said, "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)


# --- NeMo's layout ----------------------------------------------------------------------------------------------------

NEMO_SIDES = {"query": ("test_queries",), "doc": ("test_docs", "test_doc")}  # its code and its documentation differ


def write_nemo_layout(folder: Path, rows: Mapping[str, int], consumed_samples: int) -> Path:
    """The same vectors as NeMo's GPT embedding model writes them, beside ours: one file a side, under its names.

    `consumed_samples<N>/test_queries/query.{npy,ids}` and `…/test_docs/doc.{npy,ids}`; N counts training samples.
    """
    final = folder / f"consumed_samples{consumed_samples}"
    beside = beside_path(final)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for side, n in rows.items():
            place = beside / NEMO_SIDES[side][0]
            place.mkdir(parents=True)
            _join([folder / name for name in shard_names(side, n)], place / f"{side}.npy")
            shutil.copyfile(folder / f"{side}.ids", place / f"{side}.ids")
        return replace_folder(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _side_folder(folder: Path, side: str) -> Path:
    """Where a side's files are: in the folder itself, or in a subfolder of NeMo's names."""
    places = [folder, *(folder / name for name in NEMO_SIDES[side])]
    places += [inner / name for inner in sorted(folder.glob("consumed_samples*")) for name in NEMO_SIDES[side]]
    return next((place for place in places if (place / f"{side}.ids").exists()), folder)


# --- Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """One side of an embeddings folder: ids, and the memory-mapped shards [n, d] in their order."""

    ids: list[str]
    shards: list[np.ndarray]


def open_vectors(folder: str | Path, side: str) -> Vectors:
    """`side` (query or doc) of an embeddings folder: ours, NeMo's, or made by other means (files without a manifest).

    Raises `KinvecError` where it is unfinished or a file is missing, is no array of rows or does not match its ids.
    """
    folder = Path(folder)
    if (folder / PROGRESS).exists() and not (folder / MANIFEST).exists():
        raise KinvecError(f"{folder} is not finished; run the same kinvec embed again, it continues")
    _refuse_damaged(folder, side)
    folder = _side_folder(folder, side)
    paths = [folder / f"{side}.npy"] if (folder / f"{side}.npy").exists() else sorted(folder.glob(f"{side}-*.npy"))
    if not paths or not all(path.is_file() for path in (*paths, folder / f"{side}.ids")):
        raise KinvecError(f"{folder} has no vectors of the {side} side ({side}.npy and {side}.ids); run kinvec embed")
    shards = [open_array(path) for path in paths]
    try:
        ids = (folder / f"{side}.ids").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise KinvecError(
            f"{folder / f'{side}.ids'}: not UTF-8 ({error.reason} at byte {error.start}); embed again"
        ) from None
    rows = sum(len(shard) for shard in shards)
    if rows != len(ids) or len(set(ids)) != rows:
        what = f"{len(set(ids)):,} different ones" if rows == len(ids) else f"{len(ids):,}"
        raise KinvecError(f"{folder}: {rows:,} {side} vectors need as many ids, but {side}.ids has {what}; embed again")
    return Vectors(ids, shards)


def _refuse_damaged(folder: Path, side: str) -> None:
    """Raise `KinvecError` where a file of the side, or the judgements, is not what the manifest says."""
    said = (read_state(folder) or {}).get("checksums", {})
    if names := damaged(folder, {name: sum for name, sum in said.items() if name == QRELS or name.startswith(side)}):
        raise KinvecError(f"{folder / names[0]}: damaged or gone; the same kinvec embed makes it again, and only it")


def open_array(path: Path) -> np.ndarray:
    """The rows of a NumPy file, memory-mapped. Raises `KinvecError` where it is none; nothing in it is run."""
    if not path.is_file():
        raise KinvecError(f"{path}: the file is missing, or is none; embed again")
    with open(path, "rb") as file:
        if file.read(8) != b"\x93NUMPY\x01\x00":  # version 1 has every array of numbers, and a header of 64 KiB at most
            raise KinvecError(f"{path}: no plain NumPy array; embed again")
    with one_sentence(f"{path}: no plain NumPy array, or cut short", "embed again"):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise KinvecError(f"{path}: holds no rows of numbers; embed again")
    return found


def open_judgements(folder: str | Path) -> Qrels | None:
    """The judgements that came with an embeddings folder, None if none did."""
    from kinvec.files.beir import read_qrels
    from kinvec.files.problems import Notes

    path = Path(folder) / QRELS
    return read_qrels(path, str(path), Notes(strict=True)).grades if path.is_file() else None
