"""What this machine can do, and how its memory is let go of."""

from __future__ import annotations

import mmap

import numpy as np
import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself; where it does not, bf16 is emulated, hundreds of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def forget(array: np.ndarray) -> None:
    """Let go of the pages of a memory-mapped file, which otherwise stay this process's until it ends."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
