"""Checkpoints: torch distributed checkpoints with a manifest of checksums, written last; save, resume, keep the newest.

A checkpoint is a folder `step-00000012` of tensors by name (weights, optimiser moments, random state) plus
`manifest.json`: the step, plain values, and a checksum of every file. Without its manifest it does not count.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from kinvec import distributed
from kinvec.contracts import KinvecError
from kinvec.files import content_fingerprint, damaged, read_written, replace_folder, saying_full

MANIFEST = "manifest.json"

# What the metadata of a distributed checkpoint is made of. It is a pickle, and unpickling anything else could run code.
ALLOWED = {
    ("builtins", "set"),
    ("builtins", "slice"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "StorageMeta"),
    ("torch.distributed.checkpoint.storage", "StorageMeta"),
    ("torch.distributed.checkpoint._fsspec_filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *(("torch.distributed.checkpoint.planner", name) for name in (  # Megatron Core keeps the plan of the save, too
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in ALLOWED:
            raise KinvecError(
                f"the checkpoint's metadata asks for '{module}.{name}', which no checkpoint needs; refused"
            )
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    if not all(part.is_file() or part.is_dir() for part in path.glob("*")):
        raise KinvecError(f"{path}: a broken link, a pipe or a device is in it; a checkpoint has files alone")
    try:
        metadata = _Unpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
    except KinvecError:
        raise
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise KinvecError(f"{path}: the checkpoint's metadata cannot be read ({error})") from None
    if not isinstance(metadata, Metadata):
        raise KinvecError(f"{path}: the checkpoint's metadata cannot be read (it holds {type(metadata).__name__})")
    return metadata


class SafeReader(dcp.FileSystemReader):
    """A reader whose metadata has come through the allow-list: a foreign checkpoint cannot run code."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = _read_metadata(path)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The metadata read when the checkpoint was opened."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: set[int]) -> None:
    """Write the checkpoint of `step` beside and rename it, then delete all others but those of the steps in `keep`.

    Where tensors are spread over processes all of them call this, each writes its own parts, and rank 0 the rest.
    """
    final = place(folder, step)
    beside = final.with_name(f".{final.name}.tmp")
    if distributed.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    spread = any(map(distributed.sharded, tensors.values()))
    if spread:
        distributed.wait()
    try:
        write_state(beside, tensors, spread)
        if distributed.rank():
            return
        checksums = {path.name: content_fingerprint(path) for path in sorted(beside.iterdir())}
        manifest = {"format": 1, "step": step, "files": checksums, "values": dict(values)}
        manifest["checksum"] = _checksum(manifest)
        with open(beside / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        replace_folder(beside, final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for other, path in list(steps(folder)):
        if other not in keep | {step}:
            going = path.with_name(f".{path.name}.tmp")  # half-deleted it is no checkpoint either
            os.replace(path, going)
            shutil.rmtree(going, ignore_errors=True)


def write_state(folder: Path, state: Mapping[str, Any], spread: bool = False) -> None:
    """Write tensors (and other values) by name as a torch distributed checkpoint, of one process or of all."""
    with saying_full(folder, sum(getattr(value, "nbytes", 0) for value in state.values())), _one_process():
        try:
            group = distributed.beside() if spread else None
            dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder), process_group=group, no_dist=not spread)
        except CheckpointException as error:  # it wraps what the one rank met
            cause, _ = next(iter(error.failures.values()))
            raise cause from None


def steps(folder: Path) -> Iterator[tuple[int, Path]]:
    """The valid checkpoints of a folder, oldest first; what is half-written is another's, and left alone."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"step-\d{1,18}", path.name) and (path / MANIFEST).is_file():
            yield int(path.name.removeprefix("step-")), path


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The newest valid checkpoint, or None."""
    found = list(steps(folder))
    return found[-1][1] if found else None


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, after its files have been checked against their checksums.

    Raises `KinvecError` naming the damaged file.
    """
    try:
        manifest = read_written(path / MANIFEST)
        files, values = manifest["files"], manifest["values"]
        names = damaged(path, files) if manifest["checksum"] == _checksum(manifest) else [MANIFEST]
    except (TypeError, KeyError, AttributeError):
        names = [MANIFEST]
    if names:
        raise _damaged(path, names[0])
    return values


def _damaged(path: Path, name: str) -> KinvecError:
    return KinvecError(
        f"{path / name}: the checkpoint is damaged or gone; training goes on from an earlier one, or from the start"
    )


def names(path: Path) -> set[str]:
    """Names of the checkpoint's tensors."""
    return set(_read_metadata(path).state_dict_metadata)


def load_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the given tensors, in place, from the checkpoint. Raises `KinvecError` when names or shapes do not match."""
    reader = SafeReader(path)
    try:
        with _one_process():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise KinvecError(f"{path}: the checkpoint does not fit this model ({reason})") from None


@contextmanager
def _one_process() -> Iterator[None]:
    """Silence torch's warning that no process group is there; with one process that is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Of what the manifest says itself."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return content_fingerprint(json.dumps(said, sort_keys=True).encode())
