"""What this machine can do, how its threads are used, and how memory is kept and let go of."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits

Given = TypeVar("Given")
Made = TypeVar("Made")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself; where it does not, bf16 is emulated, hundreds of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def multiplies_bytes() -> bool:
    """Whether the processor adds products of bytes in 32 bits; others add two in 16, which may not hold them."""
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch, oneDNN or Python says that memory has ended."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return True
    return str(error) == "could not create a primitive"  # oneDNN had no room for its code; it names what it cannot do


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads, in torch, NumPy and the tokenizer; None leaves their choice."""
    if threads:
        torch.set_num_threads(threads)
        threadpool_limits(threads)
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))


def ahead(make: Callable[[Given], Made], given: Iterable[Given], device: torch.device) -> Generator[Made, None, None]:
    """`make` of each, in order; while the caller computes with one on a GPU, a thread makes the next, and no more.

    What `make` raises comes out where its turn is. On a CPU both want the same cores, and nothing is made before it is
    asked for (docs/experiments.md).
    """
    if device.type == "cpu":
        yield from map(make, given)
        return
    each = iter(given)
    with ThreadPoolExecutor(1, "ahead") as thread:
        made = [make(first) for first in islice(each, 1)]  # one alone needs no thread
        for following in each:
            begun = thread.submit(make, following)
            yield made.pop()
            made.append(begun.result())
        yield from made


def keep_pages() -> None:
    """Let the C library keep freed memory instead of returning it to the system after every large tensor.

    By default glibc maps each large block anew and the system zeroes its pages on first touch; a training step then
    spends a sixth of its time in page faults (docs/experiments.md). Does nothing where the C library is another one.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**26)


def release_pages() -> None:
    """Give the system back what is free: kept pages fragment over many steps of different shapes, and would pile up."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def forget(array: np.ndarray) -> None:
    """Let go of the pages of a memory-mapped file, which otherwise stay this process's until it ends."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
