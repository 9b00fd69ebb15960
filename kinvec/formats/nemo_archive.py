"""A `.nemo` archive, hostile until proven otherwise: every member is checked before one byte of it is written.

NeMo writes an uncompressed tar (older ones are gzipped) with `model_config.yaml` and the weights. Nothing of the
archive's owners, modes, links or times is taken over: regular files are copied into a fresh folder, and that is all.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from kinvec.config import parse_yaml
from kinvec.contracts import KinvecError

CONFIG = "model_config.yaml"
MOST_MEMBERS = 20_000
MOST_BYTES = 64 << 30  # of all members together; the largest BERT takes a few GiB
MOST_MEMBER_BYTES = 32 << 30
MOST_UNFOLDING = 20  # bytes of members for each of the archive: trained weights hardly shrink, and zeros a thousandfold
MOST_HEADER_BYTES = 16 << 20  # tarfile reads an extended header in one piece, into memory
MOST_CONFIG_BYTES = 4 << 20
DEEPEST = 8
CHUNK_BYTES = 1 << 20


class Refused(KinvecError):
    """The archive is damaged or means harm; nothing of it was used."""


class _Careful:
    """A file for tarfile to read, which refuses to read more than `MOST_HEADER_BYTES` in one piece."""

    def __init__(self, file: BufferedIOBase, name: Path) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise Refused(f"{self._name}: a header in the archive claims {size:,} bytes; refused")
        return self._file.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive open for reading, whether gzipped or not."""
    try:
        with open(archive, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if zipped else file
            careful: Any = _Careful(stream, archive)
            with tarfile.open(fileobj=careful, mode="r:") as tar:
                yield tar
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"{archive}: not a .nemo archive, or one cut short ({error})") from None


def _checked(tar: tarfile.TarFile, archive: Path) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath]]:
    """The archive's regular files with their places, each checked as soon as its header is read."""
    files: set[str] = set()
    folders: set[str] = set()
    total, most = 0, MOST_UNFOLDING * archive.stat().st_size
    for count, member in enumerate(tar, 1):
        path = _place(member, archive)
        if member.size < 0:  # tarfile would go back to where it has been
            raise Refused(f"{archive}: '{member.name}' claims {member.size:,} bytes; refused")
        total += member.size
        if count > MOST_MEMBERS:
            raise Refused(f"{archive}: the archive has more than {MOST_MEMBERS:,} members; refused")
        if member.size > MOST_MEMBER_BYTES or total > min(MOST_BYTES, most):
            raise Refused(
                f"{archive}: '{member.name}' makes the archive's contents too large ({total:,} bytes); refused"
            )
        if member.isdir():
            continue
        key, above = str(path).casefold(), {str(parent).casefold() for parent in path.parents}
        if key in files or key in folders or above & files:
            raise Refused(f"{archive}: '{member.name}' is in the archive twice; refused")
        files.add(key)
        folders |= above
        yield member, path


def _place(member: tarfile.TarInfo, archive: Path) -> PurePosixPath:
    """Where a member belongs, inside the folder; refuses what is no plain file or folder, or would lie elsewhere."""
    name = member.name
    if member.issym() or member.islnk():
        raise Refused(f"{archive}: '{name}' is a link to '{member.linkname}'; links are refused")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise Refused(f"{archive}: '{name}' is neither a plain file nor a folder; refused")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not name.isprintable():
        raise Refused(f"{archive}: '{name}' would be written outside the target folder; refused")
    if len(path.parts) > DEEPEST:
        raise Refused(f"{archive}: '{name}' lies deeper than {DEEPEST} folders; refused")
    if member.isreg() and not path.parts:
        raise Refused(f"{archive}: a file in the archive has no name; refused")
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Write the archive's files into the fresh, empty `folder`. Raises `Refused` before anything harmful is written."""
    with _opened(archive) as tar:
        for member, path in _checked(tar, archive):
            target = folder.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None, "checked: a regular file"
            with open(target, "xb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            if target.stat().st_size != member.size:
                raise Refused(f"{archive}: '{member.name}' is cut short; the archive is damaged")


def read_config(archive: Path) -> tuple[dict[str, Any], list[str]]:
    """The model's settings and the names of all files, without unpacking the archive."""
    config, names = None, []
    with _opened(archive) as tar:
        for member, path in _checked(tar, archive):
            names.append(str(path))
            if names[-1] == CONFIG and (file := tar.extractfile(member)):
                config = parse_config(file.read(MOST_CONFIG_BYTES + 1), archive)
    if config is None:
        raise KinvecError(f"{archive}: there is no {CONFIG} in it, so it is not a .nemo archive")
    return config, names


def parse_config(raw: bytes, archive: Path) -> dict[str, Any]:
    """The settings of `model_config.yaml`: plain values only, nothing in it can run."""
    if len(raw) > MOST_CONFIG_BYTES:
        raise Refused(f"{archive}: its {CONFIG} is larger than {MOST_CONFIG_BYTES >> 20} MiB; refused")
    try:
        config = parse_yaml(raw)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise Refused(f"{archive}: its {CONFIG} is not plain YAML ({reason})") from None
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = config["model"]  # the whole training configuration: the model's part counts
    if not isinstance(config, dict):
        raise KinvecError(f"{archive}: its {CONFIG} holds no settings")
    return config


def pack(folder: Path, archive: Path) -> None:
    """Write all files of `folder` into the tar `archive`, uncompressed, named `./…` as NeMo writes them."""
    with tarfile.open(archive, "w:") as tar:
        tar.add(folder, arcname=".", filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time: who made it when is nobody's business, and equal models give equal archives."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
