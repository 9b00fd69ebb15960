"""The weights inside an unpacked `.nemo`: one file, one file a rank, or the sharded folder; tensors only, nothing runs.

Shapes: L = layers.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from kinvec import checkpoint
from kinvec.contracts import KinvecError
from kinvec.formats.nemo_archive import Refused
from kinvec.formats.nemo_bert import (
    EXTRA_STATES,
    LEFT_OUT,
    count_layers,
    expected,
    from_nemo,
    join_ranks,
    shorten,
    stack_layers,
)
from kinvec.vetting import refuse_bomb

SHARDED, WHOLE = "model_weights", "model_weights.ckpt"
BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
            "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
_RANK = re.compile(r"(?:mp_rank|tp_rank)_(\d+)(?:_pp_rank_(\d+))?")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def write_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the non-mcore form: all tensors in `model_weights.ckpt`."""
    torch.save(dict(tensors), folder / WHOLE)


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], layers: int) -> None:
    """Write the mcore form: a torch distributed checkpoint with stacked layers, in the folder `model_weights`."""
    state: dict[str, Any] = stack_layers(tensors, layers)
    for module in EXTRA_STATES:  # Transformer Engine asks for its state, which is empty unless trained in 8 bits
        for layer in range(layers):
            state[f"model.encoder.layers.{module}._extra_state/shard_{layer}_{layers}"] = _empty_state()
    place = folder / SHARDED
    place.mkdir()
    checkpoint.write_state(place, state)
    _forget_place(place)
    torch.save({}, place / "common.pt")
    (place / "metadata.json").write_text(json.dumps(BACKENDS), "utf-8")


def _forget_place(folder: Path) -> None:
    """Take the path where it was written out of the metadata: whose machine it was is nobody's business."""
    metadata = checkpoint.SafeReader(folder).read_metadata()
    metadata.storage_meta = StorageMeta(checkpoint_id=folder.name)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _empty_state() -> list[io.BytesIO]:
    """What Transformer Engine saves when there is nothing to save, in a list as Megatron Core has it."""
    nothing = io.BytesIO()
    torch.save(None, nothing)
    return [nothing]


def read_weights(folder: Path, heads: int, legacy: bool) -> dict[str, Tensor]:
    """Hugging Face's tensors of an unpacked archive, whichever form its weights have, but for the heads complete.

    Raises `KinvecError` when there are none, when they are incomplete, or when they hold more than tensors.
    """
    try:
        tensors = _read(folder, heads, legacy)
    except (RuntimeError, IndexError) as error:  # torch's, for tensors that cannot be cut or joined
        raise KinvecError(f"the shapes of its weights do not fit each other ({str(error).splitlines()[0]})") from None
    words, positions, types = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
    if words in tensors:  # num_tokentypes 0: nothing is added, as of one type that is zero
        tensors.setdefault(types, torch.zeros_like(tensors[words][:1]))
    missing = [name for name in expected(max(1, count_layers(tensors))) if name not in tensors]
    if missing:
        raise KinvecError(f"the weights lack {len(missing)} tensors, '{missing[0]}' among them")
    if tensors[words].ndim != 2 or tensors[positions].ndim != 2:
        raise KinvecError("its embeddings are no tables")
    return tensors


def _read(folder: Path, heads: int, legacy: bool) -> dict[str, Tensor]:
    if (folder / SHARDED).is_dir():
        return from_nemo(_read_sharded(folder / SHARDED), heads, legacy)
    if (folder / WHOLE).is_file():
        return from_nemo(_read_file(folder / WHOLE), heads, legacy)
    ranks = {
        (int(match[2] or 0), int(match[1])): path
        for path in folder.iterdir()
        if path.is_dir() and (match := _RANK.fullmatch(path.name))
    }
    if not ranks:
        raise KinvecError(f"there are no weights in it (neither {WHOLE} nor {SHARDED}/)")
    return _read_ranks({rank: _read_file(path / WHOLE) for rank, path in ranks.items()}, heads, legacy)


def _read_ranks(files: Mapping[tuple[int, int], Mapping[str, Tensor]], heads: int, legacy: bool) -> dict[str, Tensor]:
    """The tensors of all (pipeline stage, tensor-parallel rank) files; a stage numbers its layers from 0."""
    stages, width = max(stage for stage, _ in files) + 1, max(rank for _, rank in files) + 1
    missing = [(s, r) for s in range(stages) for r in range(width) if (s, r) not in files]
    if missing or heads % width:
        raise KinvecError(
            f"the weights are split over {stages} pipeline stages and {width} tensor-parallel ranks, "
            + (
                f"of which stage {missing[0][0]}, rank {missing[0][1]} is missing"
                if missing
                else f"not by {heads} heads"
            )
        )
    whole: dict[str, Tensor] = {}
    layers = 0
    for stage in range(stages):
        ranks = [from_nemo(files[stage, rank], heads // width, legacy, layers) for rank in range(width)]
        whole |= join_ranks(ranks)
        layers = count_layers(whole)
    return whole


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file. What else it holds is refused, for to open it would be to run it."""
    if not path.is_file():
        raise KinvecError(f"{path.parent.name}/{path.name} is missing")
    refuse_bomb(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([io.BytesIO]):  # extra states are plain bytes
            warnings.simplefilter("ignore")  # torch's remarks on old ways of pickling
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        what = f"asks for '{asked[1]}'" if asked else "holds more than tensors"
        raise Refused(f"{path.name} {what}, and to open that would run code; refused") from None
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise KinvecError(f"{path.name} is damaged or cut short ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict):
        raise KinvecError(f"{path.name} holds no tensors by name")
    return _tensors_of(state, path)


def _tensors_of(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    tensors, most = {}, path.stat().st_size
    for name, value in state.items():
        if LEFT_OUT.search(shorten(str(name))):
            continue
        if not isinstance(value, Tensor) or value.dtype not in TYPES or value.layout != torch.strided:
            raise KinvecError(f"{path.name}: '{name}' is no tensor of floating-point numbers")
        most -= value.numel() * value.element_size()
        if most < 0:  # views of a small storage can pretend any size
            raise Refused(f"{path.name}: '{name}' claims more bytes than the file has; refused")
        # it may be a view, also of what another is a view of
        tensors[str(name)] = value.clone(memory_format=torch.contiguous_format)
    return tensors


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of a torch distributed checkpoint, by its own names, with layers stacked on the first axis."""
    try:
        said = json.loads((folder / "metadata.json").read_text("utf-8"))
        backend = said["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        backend = BACKENDS["sharded_backend"] if (folder / ".metadata").is_file() else "unknown"
    if backend != BACKENDS["sharded_backend"]:
        raise KinvecError(
            f"its weights are sharded by '{backend}', which is not read; "
            "convert them to torch_dist with NeMo's convert_zarr_to_torch_dist.py first"
        )
    try:
        entries = _entries(folder, checkpoint.SafeReader(folder).read_metadata())
    except (AttributeError, TypeError, IndexError) as error:
        raise Refused(f"the metadata of its sharded weights cannot be read ({error}); refused") from None
    state = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    checkpoint.load_into(folder, state)
    return state


def _entries(folder: Path, metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The metadata of the tensors that count.

    Refuses what points outside the folder, promises more than its files hold, or leaves holes.
    """
    for place in (metadata.storage_data or {}).values():
        if Path(place.relative_path).name != place.relative_path or not (folder / place.relative_path).is_file():
            raise Refused(
                f"its sharded weights point to the file '{place.relative_path}', which is not one of theirs; refused"
            )
    held = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    promised = 0
    entries = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not LEFT_OUT.search(shorten(name))
    }
    for name, entry in entries.items():
        if entry.properties.dtype not in TYPES or min(entry.size, default=0) < 1:
            raise KinvecError(f"'{name}' is no tensor of floating-point numbers")
        promised += math.prod(entry.size) * entry.properties.dtype.itemsize
        if promised > held:
            raise Refused(
                f"its sharded weights promise at least {promised:,} bytes, but their files hold {held:,}; refused"
            )
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise KinvecError(f"the shards of '{name}' do not make up the whole tensor")
    return entries
