"""Archives as NeMo writes them, made here by other means than kinvec's, for tests of what reads and writes them."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import kinvec
from kinvec import checkpoint
from kinvec.contracts import KinvecError

HEADS, WIDTH, LAYERS = 4, 32, 2  # of the tiny model

MCORE = {
    "attention.output.dense": "self_attention.linear_proj", "attention.output.LayerNorm": "post_att_layernorm",
    "intermediate.dense": "mlp.linear_fc1", "output.dense": "mlp.linear_fc2", "output.LayerNorm": "post_mlp_layernorm",
    "qkv": "self_attention.linear_qkv",
}  # fmt: skip
OTHER = {
    "attention.output.dense": "self_attention.dense", "attention.output.LayerNorm": "input_layernorm",
    "intermediate.dense": "mlp.dense_h_to_4h", "output.dense": "mlp.dense_4h_to_h",
    "output.LayerNorm": "post_attention_layernorm", "qkv": "self_attention.query_key_value",
}  # fmt: skip
AROUND = {
    "embeddings.word_embeddings.weight": "embedding.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "embedding.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "embedding.tokentype_embeddings.weight",
    "embeddings.LayerNorm.weight": "encoder.initial_layernorm.weight",
    "embeddings.LayerNorm.bias": "encoder.initial_layernorm.bias",
    "pooler.dense.weight": "pooler.dense.weight", "pooler.dense.bias": "pooler.dense.bias",
}  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors, without the buffer that old versions of transformers stored beside them."""
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if "position_ids" not in k}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        v.dtype == theirs[k].dtype and torch.equal(v, theirs[k]) for k, v in ours.items()
    )


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "r:") as tar:
        tar.extractall(folder, filter="data")
    return folder


def share(tensor: Tensor, axis: int, rank: int, ranks: int) -> Tensor:
    return tensor.chunk(ranks, dim=axis)[rank].clone()


def rank_of_nemo(
    hf: Mapping[str, Tensor], names: Mapping[str, str], prefix: str, rank: int = 0, ranks: int = 1,
    legacy: bool = False, layers: Iterable[int] = range(LAYERS),
) -> dict[str, Tensor]:  # fmt: skip
    """One rank's tensors, written head by head as a loop: another way to the same layout than kinvec's."""
    words = hf["embeddings.word_embeddings.weight"]
    padded = torch.cat([words, torch.zeros(-len(words) % (128 * ranks), words.shape[1])])
    state = {f"{prefix}{AROUND[name]}": hf[name] for name in AROUND}
    state[f"{prefix}embedding.word_embeddings.weight"] = share(padded, 0, rank, ranks)
    size, own = WIDTH // HEADS, range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    for number, layer in enumerate(layers):
        inside = f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            three = [hf[f"{inside}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            if legacy:
                rows = [part[head * size : (head + 1) * size] for part in three for head in own]
            else:
                rows = [part[head * size : (head + 1) * size] for head in own for part in three]
            state[f"{prefix}encoder.layers.{number}.{names['qkv']}.{kind}"] = torch.cat(rows)
            for module in set(names) - {"qkv"}:
                tensor = hf[f"{inside}{module}.{kind}"]
                if module == "intermediate.dense":
                    tensor = share(tensor, 0, rank, ranks)
                elif module.endswith("output.dense") and kind == "weight":
                    tensor = share(tensor, 1, rank, ranks)
                state[f"{prefix}encoder.layers.{number}.{names[module]}.{kind}"] = tensor
    return state


CONFIG = {
    "num_attention_heads": HEADS, "num_layers": LAYERS, "hidden_size": WIDTH, "layernorm_epsilon": "1e-12",
    "transformer_block_type": "post_ln", "encoder_seq_length": 24,
    "tokenizer": {"library": "huggingface", "type": "a/b"},
    "target": "nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel",
}  # fmt: skip


def archive_of(path: Path, files: Mapping[str, Any], zipped: bool = False, **config: Any) -> Path:
    """A foreign `.nemo`: state dictionaries (saved by torch), bytes, or folders by name, and the settings."""
    content = path.with_suffix(".content")
    for name, value in files.items():
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            (content / name).write_bytes(value)
        elif isinstance(value, Path):
            shutil.copytree(value, content / name)
        else:
            torch.save(value, content / name)
    content.mkdir(exist_ok=True)
    (content / "model_config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    with tarfile.open(path, "w:gz" if zipped else "w:") as tar:
        tar.add(content, arcname=".")
    return path


def one_file(hf: Mapping[str, Tensor], **how: Any) -> dict[str, Any]:
    names = how.pop("names", OTHER)
    prefix = how.pop("prefix", "model.language_model.")
    return {"model_weights.ckpt": rank_of_nemo(hf, names, prefix, **how)}


def ranks_of_nemo(hf: Mapping[str, Tensor], width: int, stages: int, legacy: bool = False) -> dict[str, Any]:
    files = {}
    for stage in range(stages):
        layers = list(range(LAYERS))[stage * LAYERS // stages : (stage + 1) * LAYERS // stages]
        for rank in range(width):
            state = rank_of_nemo(hf, OTHER, "model.language_model.", rank, width, legacy, layers)
            if stages > 1:
                first, last = ("pooler.",), ("embedding.", "encoder.initial")  # what the other stage has
                state = {k: v for k, v in state.items() if not any(n in k for n in (last if stage else first))}
                if stage:
                    state["model.word_embeddings.weight"] = torch.zeros(3, WIDTH)
            place = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if stages > 1 else f"mp_rank_{rank:02d}"
            files[f"{place}/model_weights.ckpt"] = state
    return files


def sharded(hf: Mapping[str, Tensor], folder: Path, prefix: str = "model.", stacked: bool = True) -> dict[str, Any]:
    numbered = rank_of_nemo(hf, MCORE, prefix)
    state: dict[str, Any] = {k: v for k, v in numbered.items() if not stacked or ".layers." not in k}
    for name in [k for k in numbered if stacked and ".layers.0." in k]:
        layers = [numbered[name.replace(".0.", f".{layer}.")] for layer in range(LAYERS)]
        state[name.replace(".0.", ".")] = torch.stack(layers)
    state[f"{prefix}encoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = [io.BytesIO(b"x")]
    checkpoint.write_state(folder, state)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return {"model_weights": folder}


def changed(hf: Mapping[str, Tensor], drop: str = "-", more: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    state = rank_of_nemo(hf, OTHER, "model.language_model.")
    added = {f"model.language_model.{name}": tensor for name, tensor in (more or {}).items()}
    return {"model_weights.ckpt": {k: v for k, v in state.items() if drop not in k} | added}


def refused(archive: Path, bert: Path | None, says: str) -> None:
    """Converting raises one sentence with these words, and leaves nothing behind."""
    before = sorted(archive.parent.iterdir())
    with pytest.raises(KinvecError, match=says) as caught:
        kinvec.convert(archive, archive.parent / "back", tokenizer=str(bert) if bert else None)
    said = str(caught.value)
    assert said.startswith(str(archive)) and "\n" not in said and ".work" not in said
    assert sorted(archive.parent.iterdir()) == before
