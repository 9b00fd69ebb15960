"""Checkpoints: round trip to the bit, whole or not there, checked before they are opened, and unable to run code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinvec import checkpoint
from kinvec.contracts import KinvecError
from kinvec.files import content_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


def state(step: int = 0) -> dict[str, Tensor]:
    """Tensors of the kinds a training state is made of."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(7, 5, generator=draw)
    return {
        "model.a.weight": weight,
        "model.a.bias": torch.randn(5, generator=draw).double(),
        "model.half": weight.bfloat16(),
        "optimizer.a.weight.exp_avg": weight.t().contiguous() * 1e-30,
        "optimizer.a.weight.step": torch.tensor(float(step)),
        "random.cpu": torch.get_rng_state(),
    }


def zeros() -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state().items()}


def save(folder: Path, step: int, keep: set[int] | None = None) -> Path:
    checkpoint.save(folder, step, state(step), {"step": step, "best_score": None, "note": "é"}, keep or set())
    return folder / f"step-{step:08d}"


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.read_values(path) == {"step": 3, "best_score": None, "note": "é"}
    assert checkpoint.names(path) == set(state())
    loaded = zeros()
    checkpoint.load_into(path, loaded)
    for key, value in state(3).items():
        assert torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype


def test_tensors_are_filled_in_place_and_some_may_be_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    checkpoint.load_into(path, {"model.a.weight": weight.data})
    assert torch.equal(weight, state(3)["model.a.weight"])


def test_the_newest_and_those_named_are_kept(tmp_path: Path) -> None:
    for step, keep in ((2, set()), (4, {2}), (6, {2, 4}), (8, {4, 6}), (9, {4, 999})):
        save(tmp_path, step, keep)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [4, 9]
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000009"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, {"x": torch.ones(2)}, {"step": 5, "again": True}, set())
    assert checkpoint.read_values(tmp_path / "step-00000005") == {"step": 5, "again": True}
    assert checkpoint.names(tmp_path / "step-00000005") == {"x"}


def test_no_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None and checkpoint.latest(tmp_path) is None


def test_what_a_killed_save_leaves_is_ignored_and_replaced(tmp_path: Path) -> None:
    good = save(tmp_path, 4)
    shutil.copytree(good, tmp_path / ".step-00000006.tmp")  # killed before the rename
    (tmp_path / ".step-00000006.tmp" / "manifest.json").unlink()
    shutil.copytree(good, tmp_path / "step-00000008")  # killed while it was deleted
    (tmp_path / "step-00000008" / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path) == good
    save(tmp_path, 6)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [6]
    assert not (tmp_path / ".step-00000006.tmp").exists()


def test_looking_for_checkpoints_leaves_the_one_that_another_process_writes(tmp_path: Path) -> None:
    """Of several processes one may look for those before the next, while rank 0 still sums the files of this one."""
    good = save(tmp_path, 4)
    half = shutil.copytree(good, tmp_path / ".step-00000006.tmp")
    assert list(checkpoint.steps(tmp_path)) == [(4, good)] and checkpoint.latest(tmp_path) == good
    assert sorted(os.listdir(half)) == sorted(os.listdir(good))


@pytest.mark.parametrize("where", ["tensors", "manifest", "rename"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    save(tmp_path, 4)
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target: tuple[Any, str] = {
        "tensors": (checkpoint.dcp, "save"), "manifest": (json, "dump"), "rename": (os, "replace"),
    }[where]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 8)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000004"
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def damaged(path: Path) -> list[Path]:
    return sorted(path.iterdir())


@pytest.mark.parametrize("place", [0, 0.5, 0.999])
def test_a_flipped_byte_is_named_with_its_file_and_the_remedy(tmp_path: Path, place: float) -> None:
    path = save(tmp_path, 4)
    for file in damaged(path):
        whole = file.read_bytes()
        at = int(place * len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(KinvecError, match=rf"{file.name}: the checkpoint is damaged.*goes on from an earlier one"):
            checkpoint.read_values(path)
        file.write_bytes(whole)
    checkpoint.read_values(path)


@pytest.mark.parametrize("change", ["cut short", "deleted"])
def test_a_file_cut_short_or_deleted_is_named(tmp_path: Path, change: str) -> None:
    path = save(tmp_path, 4)
    for file in damaged(path):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1]) if change == "cut short" else file.unlink()
        with pytest.raises(KinvecError, match=f"{file.name}: the checkpoint is damaged"):
            checkpoint.read_values(path)
        file.write_bytes(whole)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"step": 4}'])
def test_a_manifest_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 4)
    (path / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(KinvecError, match=r"manifest\.json: .*damaged"):
        checkpoint.read_values(path)


@pytest.mark.parametrize(
    "tensors",
    [{"model.a.weight": torch.zeros(7, 6)}, {"model.b.weight": torch.zeros(7, 5)}],
    ids=["another shape", "another name"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = save(tmp_path, 4)
    with pytest.raises(KinvecError, match="step-00000004: the checkpoint does not fit this model"):
        checkpoint.load_into(path, tensors)


# ---- the metadata is a pickle ----


class Bomb:
    """Unpickling it calls a function with arguments of the attacker's choice."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def bombs() -> dict[str, bytes]:
    marker = "bomb-went-off"
    with_metadata = {"state_dict_metadata": {"x": Bomb(os.mkdir, marker)}}
    return {
        "system": pickle.dumps(Bomb(os.system, f"mkdir {marker}")),
        "builtin": pickle.dumps(Bomb(exec, f"import os; os.mkdir({marker!r})")),
        "inside other values": pickle.dumps(with_metadata),
        "a torch function": pickle.dumps(Bomb(torch.load, marker)),
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x12hub.os.path.exists\x93\x8c\x01x\x85R.",
    }


@pytest.mark.parametrize("name", ["system", "builtin", "inside other values", "a torch function", "a dotted name"])
def test_a_metadata_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A foreign checkpoint whose checksums are right: whoever made the pickle made the manifest too."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 4)
    (path / ".metadata").write_bytes(bombs()[name])
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][".metadata"] = content_fingerprint(path / ".metadata")
    manifest["checksum"] = checkpoint._checksum(manifest)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    checkpoint.read_values(path)
    for use in (checkpoint.names, lambda p: checkpoint.load_into(p, zeros()), checkpoint.SafeReader):
        with pytest.raises(KinvecError, match="which no checkpoint needs; refused|cannot be read"):
            use(path)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(
    "data", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps(None)], ids=["empty", "no pickle", "a list", "None"]
)
def test_a_metadata_that_is_none_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = save(tmp_path, 4)
    (path / ".metadata").write_bytes(data)
    for use in (checkpoint.names, lambda p: checkpoint.load_into(p, zeros())):
        with pytest.raises(KinvecError, match="metadata cannot be read"):
            use(path)
