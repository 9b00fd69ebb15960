"""Fewer bytes for a vector: half precision, a byte or a bit for each dimension, and back.

Shapes: n = vectors, d = dimensions, c = bytes of a vector's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int8, Shaped, UInt8

from kinvec.files.vectors import write_array

Ranges = Float32[np.ndarray, "2 d"]
"""Of each dimension the smallest and the largest value, over the vectors that are to be stored."""


def ranges_of(blocks: Iterable[Float32[np.ndarray, "_ d"]]) -> Ranges:
    """The ranges over all rows of all blocks."""
    found = [np.stack([block.min(axis=0), block.max(axis=0)]) for block in blocks if len(block)]
    return np.stack([np.min([low for low, _ in found], axis=0), np.max([high for _, high in found], axis=0)])


def to_int8(vectors: Float32[np.ndarray, "n d"], ranges: Ranges) -> Int8[np.ndarray, "n d"]:
    """The nearest of 256 even steps from a dimension's smallest value, −128, to its largest, 127; beyond, the end.

    sentence-transformers' `quantize_embeddings` has the same ranges and steps, and takes the step below.
    """
    low, step = ranges[0], _step(ranges)
    return (np.clip(np.rint((vectors - low) / step), 0, 255) - 128).astype(np.int8)


def from_int8(codes: Int8[np.ndarray, "n d"], ranges: Ranges) -> Float32[np.ndarray, "n d"]:
    """The values that the codes stand for, each within half a step of what was coded."""
    return (codes.astype(np.float32) + 128) * _step(ranges) + ranges[0]


def _step(ranges: Ranges) -> Float32[np.ndarray, " d"]:
    step = (ranges[1] - ranges[0]) / np.float32(255)
    return np.where(step > 0, step, np.float32(1))


def to_bits(vectors: Float32[np.ndarray, "n d"]) -> UInt8[np.ndarray, "n c"]:
    """A bit for each dimension, 1 where its value is above 0; eight to a byte, the first dimension highest."""
    return np.packbits(vectors > 0, axis=1)


def from_bits(bits: UInt8[np.ndarray, "n c"], d: int) -> Float32[np.ndarray, "n d"]:
    """1 and −1 for the bits: inner products are then d − 2 × the Hamming distance, exactly."""
    return np.unpackbits(bits, axis=1, count=d).astype(np.float32) * 2 - 1


@dataclass(frozen=True)
class Precision:
    """How a vector is stored: bits for each dimension, to storage and back.

    A `coarse` one is searched with stored queries, whose products are cheap, and profits from rescoring the best.
    """

    bits: int
    store: Callable[[Float32[np.ndarray, "n d"], Ranges], Shaped[np.ndarray, "n c"]]
    restore: Callable[[Shaped[np.ndarray, "n c"], Ranges], Float32[np.ndarray, "n d"]]
    coarse: bool = False

    def bytes(self, dimensions: int) -> int:
        """Of one stored vector."""
        return -(-dimensions * self.bits // 8)


PRECISIONS = {
    "float32": Precision(32, lambda v, _: v, lambda v, _: v),
    "float16": Precision(16, lambda v, _: v.astype(np.float16), lambda v, _: v.astype(np.float32)),
    "int8": Precision(8, to_int8, from_int8, coarse=True),
    "binary": Precision(1, lambda v, _: to_bits(v), lambda v, ranges: from_bits(v, ranges.shape[1]), coarse=True),
}  # fmt: skip


# --- Shards on disk ---------------------------------------------------------------------------------------------------

BLOCK_ROWS = 65_536  # vectors in float32 at a time


@dataclass(frozen=True)
class Restored:
    """A shard of stored vectors as float32 rows: has a length, and gives slices of rows, restored as they are read."""

    stored: Shaped[np.ndarray, "n c"]
    precision: str
    ranges: Ranges

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, rows: slice) -> Float32[np.ndarray, "_ d"]:
        return PRECISIONS[self.precision].restore(np.asarray(self.stored[rows]), self.ranges)


def store(
    shards: Sequence[Path], ranges_file: Path, precision: str, m: int, scale: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Rewrite float32 shards [_, d] as their first `m` dimensions, scaled by `scale`, in `precision`.

    The ranges over all shards are written first and the shards one by one, each beside and renamed: the same call
    goes on where one was killed. Memory is that of a stored shard.
    """

    def blocks(path: Path) -> Iterable[Float32[np.ndarray, "_ d"]]:
        shard = np.load(path, mmap_mode="r")
        return (scale(shard[start : start + BLOCK_ROWS, :m]) for start in range(0, len(shard), BLOCK_ROWS))

    if not ranges_file.exists():
        write_array(ranges_file, ranges_of(block for path in shards for block in blocks(path)))
    ranges, how = np.load(ranges_file), PRECISIONS[precision]
    form = how.store(ranges, ranges)  # two rows as they are stored: their type and width
    for path in shards:
        there = np.load(path, mmap_mode="r")
        if (there.dtype, there.shape[1]) != (form.dtype, form.shape[1]):
            write_array(path, np.concatenate([how.store(block, ranges) for block in blocks(path)]))
