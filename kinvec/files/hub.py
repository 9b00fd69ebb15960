"""Data sets of the `datasets` library: a folder that `save_to_disk` wrote, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinvec.contracts import KinvecError, one_sentence
from kinvec.files.arrow import fingerprint_of
from kinvec.files.reading import read_object
from kinvec.files.records import Record
from kinvec.files.writing import content_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"(hub:)?(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]+))?")

_WORD = re.compile(r"[\w-][\w.-]*")


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def is_hub_name(source: str) -> bool:
    """`owner/name`, `owner/name:configuration`, or anything after `hub:`; a name with a file's suffix is a file."""
    match = HUB_NAME.fullmatch(source)
    return bool(match) and (source.startswith("hub:") or ("/" in source and not Path(source.split(":")[0]).suffix))


def saved_splits(path: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote; none where it holds a single data set."""
    names = path / "dataset_dict.json"
    found = read_object(names).get("splits") if names.is_file() else []
    if not isinstance(found, list) or not all(isinstance(name, str) and _WORD.fullmatch(name) for name in found):
        raise KinvecError(f"{names}: 'splits' is no list of names; save the data set again (save_to_disk)")
    return found


def open_saved(path: Path, split: str) -> Dataset:
    """A data set that `save_to_disk` wrote; of several, that of the split.

    Raises `KinvecError` where it is not there, or is damaged. Arrow believes what a file says of its own lengths, so
    all of it is checked first.
    """
    from datasets import load_from_disk

    if splits := saved_splits(path):
        if split not in splits:
            raise KinvecError(f"{path}: there is no split '{split}'; name one of {', '.join(splits)}")
        path = path / split
    with one_sentence(f"{path}: cannot be read", "save the data set again (save_to_disk)"):
        for file in read_object(path / "state.json").get("_data_files") or ():
            if not _WORD.fullmatch(file["filename"]) or not (path / file["filename"]).is_file():
                raise KinvecError(f"{path / 'state.json'}: '{file['filename']}' is no file beside it; refused")
            _check_arrow(path / file["filename"])
        found = load_from_disk(str(path))
    return found


def _check_arrow(path: Path) -> None:
    import pyarrow as pa

    left = path.stat().st_size
    with pa.memory_map(str(path)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            batch.validate(full=True)
            left -= batch.nbytes
            if left < 0:
                raise KinvecError(f"{path}: compressed, as save_to_disk writes none; refused")


def open_hub(source: str, split: str) -> Dataset:
    """A data set of the hub, downloaded or from the library's cache, memory-mapped. No code of the data set is run.

    Raises `KinvecError`, saying that there is no such file either, where the hub does not give it.
    """
    from datasets import load_dataset

    match = HUB_NAME.fullmatch(source)
    assert match is not None, source
    try:
        return load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # the library raises a dozen kinds: no network, no such name, no such split, …
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"there is no such file or folder, and as a hub data set it could not be loaded ({why})"
        raise KinvecError(f"{source}: {what}; check the name") from None


def dataset_fingerprint(dataset: Dataset) -> str:
    """Of its files' content where it lies in files, so that a copy is recognised; else the library's own."""
    files = [content_fingerprint(file["filename"]) for file in dataset.cache_files]
    whole = dataset._indices is None and files
    return fingerprint_of("dataset", files if whole else dataset._fingerprint, dataset.column_names)


def dataset_records(dataset: Dataset) -> Iterator[Record]:
    """Rows with their number, counted from 1; class numbers are given their names."""
    names = {column: f.names for column, f in dataset.features.items() if hasattr(f, "names") and hasattr(f, "int2str")}
    row = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1024):
        for record in batch.to_pylist():
            row += 1
            yield row, {column: _named(value, names.get(column)) for column, value in record.items()}


def _named(value: Any, names: list[str] | None) -> Any:
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
