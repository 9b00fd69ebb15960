"""What a user names, a file, a folder or a hub data set, as a plan: which rows, of which kind, by which key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinvec.contracts import KinvecError
from kinvec.files import beir, hub, nli
from kinvec.files.arrow import fingerprint_of
from kinvec.files.forms import Form, records_of
from kinvec.files.problems import DataError, Notes
from kinvec.files.records import Record
from kinvec.files.roles import Layout, layout_of, roles_of
from kinvec.files.rows import ROWS, Row, parsed_cells, placed_rows
from kinvec.files.writing import content_fingerprint, read_written

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".conllu")
OTHER_NAMES = {"dev": ("validation", "valid", "val"), "validation": ("dev", "valid", "val")}  # of a split


@dataclass(frozen=True)
class Plan:
    """How to get the rows of a source. `key` changes with the content and with how it is read, never with its place."""

    kind: str
    key: str
    files: tuple[str, ...]
    produce: Callable[[Notes], Iterator[Row]]


def plan_of(source: str, split: str, kind: str | None, columns: Mapping[str, Any] | None) -> Plan:
    """The plan for a source. Raises `KinvecError` if it is not there or is nothing known."""
    if not source:
        raise KinvecError("no data is named; name a file, a folder or a hub data set")
    path = Path(source).expanduser()
    if not path.exists():
        if hub.is_hub_name(source):
            return _dataset_plan(hub.open_hub(source, split), source, kind, columns)
        raise KinvecError(absent(source))
    if parts := nli.part_paths(path, split):
        return _nli_plan(parts, source, kind)
    if path.is_file():
        return _files_plan([path], source, kind, columns)
    if beir.is_beir(path):
        return _beir_plan(path, source, split, kind)
    if hub.is_saved(path):
        return _dataset_plan(hub.open_saved(path, split), source, kind, columns)
    return _files_plan(split_files(path, split), source, kind, columns)


def absent(source: str) -> str:
    """That there is nothing of this name, and what of a near name there is."""
    path = Path(source).expanduser()
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
    return f"{source}: there is no such file or folder; {hint}"


def existing(source: str) -> Path:
    """The path of a source. Raises `KinvecError`, with a near name as a hint, if there is none."""
    path = Path(source).expanduser()
    if not path.exists():
        raise KinvecError(absent(source))
    return path


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a folder, or of its `data/`, whose name ends in a split's (`sts-train.csv`), or its numbered parts.

    A folder with a single data file (no .txt) has it for its `train` split. Raises `KinvecError` where there is none,
    or a choice.
    """
    inside = (p for d in (folder, folder / "data") if d.is_dir() for p in d.iterdir())
    everything = sorted(p for p in inside if p.suffix in SUFFIXES and p.is_file())
    for name in (split, *OTHER_NAMES.get(split, ())):
        whole = [p for p in everything if re.search(rf"(^|[._-]){re.escape(name)}$", p.stem)]
        parts = [p for p in everything if re.search(rf"(^|[._-]){re.escape(name)}-\d+(-of-\d+)?$", p.stem)]
        if len(whole) == 1 or (parts and not whole):
            return whole or parts
        if whole:
            several = ", ".join(p.name for p in whole)
            raise KinvecError(f"{folder}: there are several files of the split '{name}' ({several}); name one of them")
    if len(everything) == 1 and split == "train" and everything[0].suffix != ".txt":
        return everything
    have = ", ".join(p.name for p in everything) or "no data file"
    raise KinvecError(
        f"{folder}: there is no file of the split '{split}' (there is {have}); name a file or another split"
    )


def has_split(source: str | Path, split: str) -> bool:
    """Whether a folder has a part of that name; a hub data set is not asked."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return False
    if beir.is_beir(path):
        return split in beir.splits(path)
    if hub.is_saved(path):
        return split in hub.saved_splits(path)
    try:
        return bool(nli.part_paths(path, split) or split_files(path, split))
    except KinvecError:
        return False


def _beir_plan(folder: Path, source: str, split: str, kind: str | None) -> Plan:
    if kind == "texts":
        corpus = folder / "corpus.jsonl"
        key = fingerprint_of("texts", content_fingerprint(corpus))
        return Plan("texts", key, (str(corpus),), lambda notes: beir.text_rows(corpus, notes))
    if kind not in (None, "retrieval"):
        raise KinvecError(f"{source}: a BEIR folder holds retrieval data (or texts), not {kind}; leave out the kind")
    files = (str(beir.qrels_path(folder, split)),)
    key = beir.beir_fingerprint(folder, split)
    return Plan("retrieval", key, files, lambda notes: beir.training_rows(folder, split, notes))


def _nli_plan(parts: list[Path], source: str, kind: str | None) -> Plan:
    names = [str(part) for part in parts]
    key = fingerprint_of("nli", *map(content_fingerprint, parts))

    return _plan_of_nli(lambda notes: nli.line_pairs(parts, names, notes), key, (names[0],), source, kind)


def _plan_of_nli(
    rows: Callable[[Notes], Iterator[Row]], key: str, files: tuple[str, ...], source: str, kind: str | None
) -> Plan:
    if kind == "pairs":
        return Plan("pairs", fingerprint_of(key, kind), files, lambda notes: nli.pair_rows(rows, notes))
    return Plan("retrieval", key, files, lambda notes: nli.retrieval_rows(key, rows, notes, source))


def _dataset_plan(dataset: Any, source: str, kind: str | None, columns: Mapping[str, Any] | None) -> Plan:
    from itertools import islice

    from kinvec.files.roles import SAMPLE, checked_columns

    sample = [record for _, record in islice(hub.dataset_records(dataset), SAMPLE)]
    if not sample:
        raise DataError("empty", source, 0, "there is no row in it", "give it at least one")
    layout = Layout(Form("dataset"), *roles_of(sample, source, kind, checked_columns(columns)))
    key = fingerprint_of(hub.dataset_fingerprint(dataset), layout.options())
    return _plan_of_records(layout, key, [(source, lambda notes: hub.dataset_records(dataset))], source, kind)


def _files_plan(paths: list[Path], source: str, kind: str | None, columns: Mapping[str, Any] | None) -> Plan:
    names = [str(path) for path in paths]
    layout = layout_of(paths[0], names[0], kind, columns)
    key = fingerprint_of([_content(path) for path in paths], layout.options())
    wanted = sorted({part for parts in layout.columns.values() for part in parts})

    def reader(path: Path, name: str) -> Callable[[Notes], Iterator[Record]]:
        return lambda notes: records_of(path, name, layout.form, notes, wanted)

    return _plan_of_records(layout, key, [(n, reader(p, n)) for p, n in zip(paths, names, strict=True)], source, kind)


def _content(path: Path) -> str:
    """The file's fingerprint. Raises `KinvecError` where it is of mined data and their manifest knows another."""
    found = content_fingerprint(path)
    said = read_written(path.with_name("manifest.json"))
    noted = said.get("checksums") if isinstance(said, dict) and said.get("kind") == "kinvec mined data" else None
    if isinstance(noted, dict) and noted.get(path.name, found) != found:
        raise KinvecError(
            f"{path}: not as kinvec mine wrote it; where it is damaged, the same kinvec mine makes it again, and where "
            "you have edited it, copy it out of this folder"
        )
    return found


def _plan_of_records(
    layout: Layout, key: str, readers: list[tuple[str, Callable[[Notes], Iterator[Record]]]], source: str,
    kind: str | None,
) -> Plan:  # fmt: skip
    build = nli.nli_row if layout.kind == "nli" else ROWS[layout.kind]

    def rows(notes: Notes) -> Iterator[Row]:
        for number, (name, read) in enumerate(readers):
            records = read(notes)
            if layout.form.name == "delimited" and layout.kind == "retrieval":
                records = parsed_cells(records, layout.columns)
            yield from placed_rows(records, build, layout.columns, name, number, notes)

    files = tuple(name for name, _ in readers)
    if layout.kind == "nli":
        return _plan_of_nli(rows, key, files, source, kind)
    return Plan(layout.kind, key, files, rows)
