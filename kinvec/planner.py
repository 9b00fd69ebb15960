"""How a step fits into memory: measured bytes a token → how many chunks may keep their graphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from kinvec.batching import Pack
from kinvec.contracts import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MARGIN = 0.7  # of the budget goes to saved activations; gradients in flight and the loss take the rest
CHUNK_TOKENS = 16384
"""Tokens a chunk. A constant, not a function of free memory, so that the same recipe gives the same bits anywhere."""


def parse_bytes(text: str) -> int:
    """`6GiB`, `500MB` → bytes. Raises `RecipeError` for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in UNITS:
        raise RecipeError(f"'{text}' is no amount of memory; write 'auto' or a number with a unit, such as 6GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def memory_budget(setting: str, device: torch.device) -> int:
    """Bytes that activations may take: as set, or half of what is free now."""
    if setting != "auto":
        return parse_bytes(setting)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return psutil.virtual_memory().available // 2


def saved_bytes_per_token(model: nn.Module, embed: Callable[[Pack], Tensor], sample: Pack) -> float:
    """Bytes that the graph of one token holds, counted (not estimated) over one forward pass of `sample`."""
    with torch.random.fork_rng(), saving(model) as saved:
        vectors = embed(sample)
        del vectors
    return sum(saved.values()) / max(sum(sample.lengths), 1)


@contextmanager
def saving(model: nn.Module) -> Iterator[dict[int, int]]:
    """Fills with the bytes of every storage that a graph made in the block holds, by its address; without weights."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that held its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield seen


def chunks_to_keep(chunk_tokens: list[int], bytes_per_token: float, budget: int) -> int:
    """How many chunks, from the first on, may keep their graphs within the budget; the largest must be recomputable."""
    tokens = int(budget * MARGIN / max(bytes_per_token, 1.0))
    if sum(chunk_tokens) <= tokens:
        return len(chunk_tokens)
    tokens -= max(chunk_tokens)  # room to recompute one chunk beside those kept
    kept = 0
    for size in chunk_tokens:
        tokens -= size
        if tokens < 0:
            break
        kept += 1
    return kept
