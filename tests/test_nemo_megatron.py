"""The sharded folder as Megatron Core reads and writes it: `pip install --no-deps megatron-core`, else skipped."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

import kinvec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (it needs none of its needs)"
)

# Reads every tensor and every extra state of the folder argv[1] with nothing missing and nothing unexpected, one by one
# for each layer as a model asks for them, and writes them to argv[2]. Megatron Core asks CUDA to wait; there is none.
BOTH_WAYS = """
import io, os, sys, torch
torch.cuda.synchronize, torch.cuda.current_device = (lambda *_: None), (lambda: torch.device("cpu"))
import torch.distributed as dist, torch.distributed.checkpoint
from megatron.core import dist_checkpointing as megatron
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor


def main(source, target):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    entries = torch.distributed.checkpoint.FileSystemReader(source).read_metadata().state_dict_metadata
    asked = {}
    for name, entry in entries.items():
        if "_extra_state/" in name:
            key, _, place = name.partition("/shard_")
            layer, layers = map(int, place.split("_"))
            asked[name] = ShardedObject(key, io.BytesIO(), (layers,), (layer,))
        elif ".layers." in name:
            layers, *shape = entry.size
            for layer in range(layers):
                one = ShardedTensor.from_rank_offsets(name, torch.zeros(shape), (0, layer, layers), prepend_axis_num=1)
                asked[f"{name}/{layer}"] = one
        else:
            asked[name] = ShardedTensor.from_rank_offsets(name, torch.zeros(entry.size))
    found = megatron.load({"state_dict": dict(asked)}, source, strict="raise_all")["state_dict"]
    for name, value in found.items():
        if "_extra_state" in name:
            value.seek(0)
            assert torch.load(value) is None, name
        asked[name].data = value
    os.makedirs(target)
    megatron.save({"state_dict": asked}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_megatron_core_reads_our_folder_and_we_read_its(tiny_folder: Path, tmp_path: Path) -> None:
    kinvec.convert(tiny_folder, tmp_path / "ours.nemo", tokenizer="bert-base-uncased")
    content = tmp_path / "content"
    with tarfile.open(tmp_path / "ours.nemo", "r:") as tar:
        tar.extractall(content, filter="data")
    (tmp_path / "both_ways.py").write_text(BOTH_WAYS)
    command = [sys.executable, str(tmp_path / "both_ways.py"), str(content / "model_weights"), str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(content / "model_weights")
    (tmp_path / "theirs").rename(content / "model_weights")
    with tarfile.open(tmp_path / "theirs.nemo", "w:") as tar:
        tar.add(content, arcname=".")
    kinvec.convert(tmp_path / "theirs.nemo", tmp_path / "back")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "back"))
    assert set(ours) == set(theirs) and all(equal(ours[name], theirs[name]) for name in ours)
