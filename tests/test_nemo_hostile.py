"""Nothing hostile gets out of a `.nemo`: members, settings, pickles, metadata; and damage anywhere is one sentence."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nemo_archives import CONFIG, MCORE, OTHER, archive_of, rank_of_nemo, refused, same, sharded, unpacked, weights
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import kinvec
from kinvec import checkpoint
from kinvec.contracts import KinvecError
from kinvec.formats import nemo_archive, nemo_weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Surprise:
    """Pickled, it asks to run a command when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch surprised",)


def member(
    name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def tar_of(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for info, content in [member("./model_config.yaml", yaml.safe_dump(CONFIG).encode()), *members]:
            tar.addfile(info, io.BytesIO(content) if len(content) >= info.size else None)
    return path


def negative(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A header of less than nothing, after which the reading would go on before it."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {"size": str(size)}
    return info, b""


def sized(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A header that claims more than follows."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info, b"\0" * 512


HOSTILE_MEMBERS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "an absolute path": ([member("/tmp/out")], "outside the target folder"),
    "a path upwards": ([member("a/../../out")], "outside the target folder"),
    "a windows path": ([member("..\\out")], "outside the target folder"),
    "a drive": ([member("C:out")], "outside the target folder"),
    "a control character": ([member("a\x1b[2Jb")], "outside the target folder"),
    "a symbolic link": ([member("a", b"", tarfile.SYMTYPE, "/etc/passwd")], "is a link to '/etc/passwd'"),
    "a hard link": ([member("a", b"", tarfile.LNKTYPE, "model_config.yaml")], "is a link"),
    "a device": ([member("a", b"", tarfile.CHRTYPE)], "neither a plain file nor a folder"),
    "a pipe": ([member("a", b"", tarfile.FIFOTYPE)], "neither a plain file nor a folder"),
    "a name twice": ([member("model_weights.ckpt"), member("./model_weights.ckpt")], "is in the archive twice"),
    "a name twice but for case": ([member("A/b"), member("a/B")], "is in the archive twice"),
    "a file as folder": ([member("a"), member("a/b")], "is in the archive twice"),
    "too deep": ([member("a/" * 30 + "b")], "deeper than"),
    "less than nothing": ([negative("a", -1 << 40)], r"claims -1,099,511,627,776 bytes"),
    "too large": ([sized("a", 40 << 30)], "too large"),
    "too many": ([member(f"f{i}") for i in range(60)], "more than 50 members"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_hostile_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(nemo_archive, "MOST_MEMBERS", 50)
    members, says = HOSTILE_MEMBERS[kind]
    refused(tar_of(tmp_path / "m.nemo", members), None, says)
    assert not Path("/tmp/out").exists()


def test_all_members_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_archive, "MOST_BYTES", 10_000)
    refused(tar_of(tmp_path / "m.nemo", [member(f"f{i}", b"x" * 4000) for i in range(3)]), None, "too large")


def test_a_bomb_is_not_unfolded(tmp_path: Path) -> None:
    """A gzipped archive of kilobytes whose extended header would be read into memory in one piece: 64 MiB."""
    info = tarfile.TarInfo("bomb")
    info.type, info.size = tarfile.XHDTYPE, 64 << 20
    with gzip.open(tmp_path / "m.nemo", "wb") as file:
        file.write(info.tobuf())
        for _ in range(64):
            file.write(b"\0" * (1 << 20))
    refused(tmp_path / "m.nemo", None, "claims 67,108,864 bytes")


def test_a_gzipped_archive_does_not_fill_the_disk(tmp_path: Path) -> None:
    """Zeros shrink a thousandfold: some KiB of them would be 64 MiB."""
    with tarfile.open(tmp_path / "m.nemo", "w:gz") as tar:
        info, content = member("zeros", bytes(64 << 20))
        tar.addfile(info, io.BytesIO(content))
    refused(tmp_path / "m.nemo", None, "too large")


@pytest.mark.parametrize("cut", [0, 100, 600, 5000])
def test_an_archive_cut_short_is_refused(archives: dict[bool, Path], tmp_path: Path, cut: int) -> None:
    (tmp_path / "m.nemo").write_bytes(archives[True].read_bytes()[:cut])
    refused(tmp_path / "m.nemo", None, "cut short|no model_config.yaml|no weights|damaged")


@pytest.mark.parametrize("noise", [b"not an archive" * 100, b"\x1f\x8bnot gzip either" * 50])
def test_what_is_no_archive_is_refused(tmp_path: Path, noise: bytes) -> None:
    (tmp_path / "m.nemo").write_bytes(noise)
    refused(tmp_path / "m.nemo", None, "not a .nemo archive")


def settings_archive(path: Path, raw: bytes) -> Path:
    with tarfile.open(path, "w:") as tar:
        info, content = member("model_config.yaml", raw)
        tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"a: !!python/object/apply:os.system ['touch surprised']", "not plain YAML"),
        (b"[" * 2000, "not plain YAML"),
        (b"\xff\xfe\x00", "not plain YAML"),
        (b"- a\n- b", "holds no settings"),
        (b"a: " + b"x" * (5 << 20), "larger than 4 MiB"),
    ],
)
def test_settings_are_plain_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(settings_archive(tmp_path / "m.nemo", raw), None, says)
    with pytest.raises(KinvecError, match=says):
        kinvec.info(str(tmp_path / "m.nemo"))


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain pickle"])
def test_a_pickled_surprise_in_the_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    if protocol == "plain pickle":
        pickle.dump({"model.x": Surprise()}, buffer)
    else:
        torch.save({"model.x": Surprise()}, buffer, _use_new_zipfile_serialization=protocol == "zip")
    refused(archive_of(tmp_path / "m.nemo", {"model_weights.ckpt": buffer.getvalue()}), None, "refused")


def test_a_pickled_surprise_in_the_metadata_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    files = sharded(weights(bert), tmp_path / "shards")
    (tmp_path / "shards/.metadata").write_bytes(pickle.dumps(Surprise()))
    refused(archive_of(tmp_path / "m.nemo", files), bert, "posix.system.*refused")


def test_a_pickled_surprise_in_a_shard_is_refused(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    files = sharded(weights(bert), tmp_path / "shards")
    surprise = io.BytesIO()
    torch.save(Surprise(), surprise)

    def point(metadata: Metadata) -> None:
        size = (tmp_path / "shards/__0_0.distcp").stat().st_size
        for place in metadata.storage_data.values():
            place.offset, place.length = size, surprise.getbuffer().nbytes

    edited(tmp_path / "shards", point)
    with open(tmp_path / "shards/__0_0.distcp", "ab") as file:
        file.write(surprise.getvalue())
    refused(archive_of(tmp_path / "m.nemo", files), bert, "does not fit")
    assert not (tmp_path / "surprised").exists()


def test_a_surprise_among_the_extra_states_is_never_opened(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    state = {name: tensor for name, tensor in rank_of_nemo(weights(bert), MCORE, "model.").items()}
    checkpoint.write_state(tmp_path / "shards", state | {"model.a._extra_state/shard_0_1": Surprise()})
    kinvec.convert(
        archive_of(tmp_path / "m.nemo", {"model_weights": tmp_path / "shards"}), tmp_path / "back", tokenizer=str(bert)
    )
    assert same(weights(tmp_path / "back"), weights(bert))
    assert not (tmp_path / "surprised").exists()


def edited(folder: Path, edit: Callable[[Metadata], object]) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _elsewhere(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../model_config.yaml"


def _endless(metadata: Metadata) -> None:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.size = torch.Size([1 << 20, *entry.size])


def _holes(metadata: Metadata) -> None:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.chunks = []


def _nonsense(metadata: Metadata) -> None:
    metadata.state_dict_metadata = [1, 2]  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_elsewhere, "not one of theirs"),
        (_endless, "promise at least"),
        (_holes, "do not make up"),
        (_nonsense, "cannot be read"),
    ],
)
def test_metadata_that_lies_is_refused(
    bert: Path, tmp_path: Path, edit: Callable[[Metadata], object], says: str
) -> None:
    (tmp_path / "shards").mkdir()
    files = sharded(weights(bert), tmp_path / "shards")
    edited(tmp_path / "shards", edit)
    refused(archive_of(tmp_path / "m.nemo", files), bert, says)


def test_tensors_cannot_pretend_a_size(tmp_path: Path, bert: Path) -> None:
    state = rank_of_nemo(weights(bert), OTHER, "model.language_model.")
    state["model.language_model.pooler.dense.weight"] = torch.zeros(1).expand(1 << 20, 1 << 10)
    refused(archive_of(tmp_path / "m.nemo", {"model_weights.ckpt": state}), bert, "claims more bytes than the file has")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("kinvec/modules.json", b'[{"type": "x.Transformer", "path": "../../.."}]', "leads outside its folder"),
        ("kinvec/modules.json", b"{}", "modules.json"),
        ("kinvec/code.py", b"import os", "no file of a model folder"),
        ("kinvec/pytorch_model.bin", b"x", "no file of a model folder"),
    ],
)
def test_our_own_folder_is_not_trusted_either(
    archives: dict[bool, Path], tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    folder = unpacked(archives[True], tmp_path / "x")
    (folder / name).write_bytes(content)
    with tarfile.open(tmp_path / "m.nemo", "w:") as tar:
        tar.add(folder, arcname=".")
    refused(tmp_path / "m.nemo", None, says)


def test_views_of_one_storage_are_read_as_tensors_of_their_own(tmp_path: Path) -> None:
    """Transposed, repeated and shared: a stranger's file may hold any of them, and safetensors writes none."""
    base = torch.arange(6.0).view(2, 3)
    given = {"a": base, "b": base.T, "c": base[:, :1].expand(2, 3), "d": base[1]}
    torch.save(given, tmp_path / "model_weights.ckpt")
    read = nemo_weights._read_file(tmp_path / "model_weights.ckpt")
    save_file(read, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == given.keys() and all(torch.equal(written[name], given[name]) for name in given)


@settings(max_examples=30, deadline=None)
@example(mcore=False, part=0.9375, flips=[(3530, 1)])  # a stride that is none of a whole tensor
@given(
    mcore=st.booleans(),
    part=st.floats(0, 1, exclude_max=True),
    flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_a_damaged_archive_is_read_or_refused_in_one_sentence(
    archives: dict[bool, Path], mcore: bool, part: float, flips: list[tuple[int, int]]
) -> None:
    """Bytes changed anywhere in the header or the content of one member."""
    raw = bytearray(archives[mcore].read_bytes())
    with tarfile.open(archives[mcore], "r:") as tar:
        members = tar.getmembers()
    hit = members[int(part * len(members))]
    start, end = hit.offset, hit.offset_data + hit.size
    for place, change in flips:
        raw[start + place % (end - start)] ^= change
    with tempfile.TemporaryDirectory() as folder:
        archive, back = Path(folder) / "m.nemo", Path(folder) / "back"
        archive.write_bytes(raw)
        try:
            kinvec.convert(archive, back)
        except KinvecError as error:
            assert str(error).startswith(str(archive)) and "\n" not in str(error)
        assert set(Path(folder).iterdir()) <= {archive, back}


def test_a_plan_in_the_metadata_is_read(tmp_path: Path) -> None:
    """Megatron Core's newer metadata keeps the plans of the save beside the tensors' places."""
    checkpoint.write_state(tmp_path, {"a": torch.arange(6.0)})
    whole = torch.Size([6])
    chunk = ChunkStorageMetadata(torch.Size([0]), whole)

    def add(metadata: Metadata) -> None:
        data = TensorWriteData(chunk, metadata.state_dict_metadata["a"].properties, whole)  # type: ignore[union-attr]
        item = WriteItem(next(iter(metadata.storage_data)), WriteItemType.TENSOR, tensor_data=data)
        metadata.all_local_plans = [SavePlan([item])]  # type: ignore[attr-defined]

    edited(tmp_path, add)
    state = {"a": torch.zeros(6)}
    checkpoint.load_into(tmp_path, state)
    assert torch.equal(state["a"], torch.arange(6.0))
