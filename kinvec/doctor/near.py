"""Near duplicates: texts that share most of their character 5-grams, found by MinHash and confirmed exactly.

A text is the set of its shingles: every run of five characters of its letters and digits, case folded, with one space
for whatever stands between them. Two texts are near duplicates if the Jaccard similarity of these sets,
|A ∩ B| / |A ∪ B|, is at least `NEAR`. Pairs worth looking at come from signatures of 128 bytes a text: MinHash by one
permutation (Li, Owen and Zhang 2012), empty bins filled from others at fixed random distances (after Shrivastava and Li
2014), of each minimum the lowest byte (b-bit MinHash, Li and König 2010). Texts whose signatures agree in all eight
bytes of a band are compared. A pair of similarity 0.8 agrees in one of the 32 bands with a probability of 0.997, one of
0.5 with 0.12; nothing is reported that was not counted out.

Everything is the same from run to run: the hashes are fixed. Shapes: n = texts, s = shingles, p = pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from unicodedata import category

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8, UInt32, UInt64

NEAR = 0.8  # Jaccard similarity from which on two texts are near duplicates
SHINGLE = 5  # characters
BINS = 128  # bytes of a signature
BAND = 8  # bytes that must agree
DOUBT = 0.15  # a pair is counted out if its signatures say at least NEAR − DOUBT: four standard errors of 128 bins
PAIRS = 50_000  # counted out at most
CHUNK = 1 << 14  # characters hashed at a time: the arrays stay in the nearest cache, for a third of the time

SPACE = ord(" ")
MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64
)  # odd, of xxHash and of the golden ratio
EMPTY = np.uint32(0xFFFFFFFF)

Read = Callable[[np.ndarray], list[str]]
"""Texts by their numbers."""


@cache
def _folded() -> UInt32[np.ndarray, "65536"]:
    """Each character's case-folded letter, mark or digit; a space where it is none of these."""
    letters = (chr(code) if category(chr(code))[0] in "LMN" else " " for code in range(1 << 16))
    folds = ((letter, letter.casefold()) for letter in letters)
    return np.array([ord(fold) if len(fold) == 1 else ord(letter) for letter, fold in folds], dtype=np.uint32)


def shingles(texts: Sequence[str]) -> tuple[UInt64[np.ndarray, " s"], Int64[np.ndarray, " s"]]:
    """A hash of every shingle, repeats too, and the number of the text it stands in, in order."""
    characters = "".join(f"{text} " for text in texts).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(characters, dtype="<u4")
    owner = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    folded = _folded()[np.minimum(codes, 0xFFFF)]
    if len(codes) and codes.max() > 0xFFFF:
        folded = np.where(codes > 0xFFFF, codes, folded)
    kept = folded != SPACE
    kept[1:] |= kept[:-1]  # of a run of spaces the first; a text ends in one, so it begins with none
    letters, owner = folded[kept].astype(np.uint64), owner[kept]
    if len(letters) < SHINGLE:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    a, b = MULTIPLIERS
    pairs = letters[:-1] * a + letters[1:]
    fives = (pairs[:-3] * b + pairs[2:-1]) * a + letters[4:]
    inside = owner[:-4] == owner[4:]
    hashes = fives[inside]
    hashes ^= hashes >> np.uint64(29)
    hashes *= b
    return hashes, owner[:-4][inside]


def signatures(batches: Iterable[Sequence[str]], count: int) -> UInt8[np.ndarray, "n 128"]:
    """The MinHash signature of each of `count` texts, in order; all zeros where it has no shingle."""
    signed = np.zeros((count, BINS), np.uint8)
    start = 0
    for chunk in (chunk for batch in batches for chunk in _chunks(batch)):
        signed[start : start + len(chunk)] = _signed(chunk)
        start += len(chunk)
    assert start == count, f"{start} texts, not {count}"
    return signed


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = held = 0
    for number, text in enumerate(texts):
        held += len(text)
        if held >= CHUNK:
            yield texts[start : number + 1]
            start, held = number + 1, 0
    if start < len(texts):
        yield texts[start:]


def _signed(texts: Sequence[str]) -> UInt8[np.ndarray, "n 128"]:
    hashes, owner = shingles(texts)
    flat = np.full(len(texts) * BINS, EMPTY)
    bins = (hashes >> np.uint64(57)).astype(np.int64)
    np.minimum.at(flat, owner * BINS + bins, hashes.astype(np.uint32))
    least = flat.reshape(len(texts), BINS)
    signed, empty = least.astype(np.uint8), least == EMPTY  # the lowest byte
    given, whole = signed.copy(), empty.copy()
    signed[empty.all(axis=1)], empty[empty.all(axis=1)] = 0, False
    for distance in np.random.default_rng(0).permutation(np.arange(1, BINS)).tolist():
        if not empty.any():
            break
        there = empty & ~np.roll(whole, distance, axis=1)
        np.copyto(signed, np.roll(given, distance, axis=1), where=there)
        empty ^= there
    return signed


def near_pairs(
    signed: UInt8[np.ndarray, "n 128"], read: Read, references: int | None = None
) -> tuple[Int64[np.ndarray, "p 2"], Float[np.ndarray, " p"], bool]:
    """Pairs of near duplicates (a < b), most alike first; their Jaccard similarity; and whether there may be more.

    Not every pair of a group is among them, but every text that has a near duplicate is in a pair (see above for the
    probability), unless there are more than `PAIRS` likely ones: then the likeliest are counted out. With `references`,
    one of the pair is among that many first texts and the other is not.
    """
    pairs = _candidates(signed, len(signed) if references is None else references, references is not None)
    similar = _jaccard(pairs, read)
    order = np.argsort(-similar, kind="stable")
    order = order[similar[order] >= NEAR]
    return pairs[order], similar[order], len(pairs) == PAIRS


def groups(pairs: Int64[np.ndarray, "p 2"], count: int) -> list[Int64[np.ndarray, " _"]]:
    """The texts that pairs connect, of `count` in all: largest group first, its texts in order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    label = connected_components(graph, directed=False)[1]
    members = np.unique(pairs)
    members = members[np.argsort(label[members], kind="stable")]
    cuts = np.flatnonzero(np.diff(label[members])) + 1
    return sorted(np.split(members, cuts), key=lambda group: -len(group)) if len(members) else []


def _candidates(signed: UInt8[np.ndarray, "n 128"], references: int, across: bool) -> Int64[np.ndarray, "p 2"]:
    """Pairs that agree in a band and may be near duplicates: with the first of those that agree, and the one before.

    So their number grows with that of the texts and not with its square, however much the texts are alike. Of more than
    `PAIRS` those whose signatures agree most.
    """
    filled = np.flatnonzero(signed.any(axis=1))
    found, agreement = np.empty(0, np.int64), np.empty(0, np.float32)
    for columns in _bands():
        a, b = _agreeing(
            np.ascontiguousarray(signed[np.ix_(filled, columns)]).view(np.uint64)[:, 0], filled, references
        )
        wanted = (a < references) & ~(across & (b < references))
        a, b = a[wanted], b[wanted]
        estimate = _estimate(signed, a, b)
        likely = estimate >= NEAR - DOUBT
        found = np.concatenate([found, a[likely] * len(signed) + b[likely]])
        agreement = np.concatenate([agreement, estimate[likely]])
        if len(found) > 4 * PAIRS:
            found, agreement = _best(found, agreement)
    return np.stack(np.divmod(_best(found, agreement)[0], max(1, len(signed))), axis=1)


def _agreeing(
    band: UInt64[np.ndarray, " f"], texts: Int64[np.ndarray, " f"], references: int
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Pairs of texts of the same band: each with the first of them, and with the reference before it."""
    order = np.argsort(band, kind="stable")
    texts, place = texts[order], np.arange(len(order))
    fresh = np.diff(band[order], prepend=~band[order[:1]]) != 0
    first = np.maximum.accumulate(np.where(fresh, place, 0))
    latest = np.maximum.accumulate(np.where(texts < references, place, -1))
    before = np.concatenate([place[:1] - 1, latest[:-1]])
    again, other = np.flatnonzero(~fresh), np.flatnonzero(~fresh & (before > first))
    return texts[np.concatenate([first[again], before[other]])], texts[np.concatenate([again, other])]


def _best(
    pairs: Int64[np.ndarray, " p"], agreement: Float32[np.ndarray, " p"]
) -> tuple[Int64[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
    """Each pair once, in order; of more than `PAIRS` those that agree most."""
    order = np.argsort(pairs, kind="stable")
    order = order[np.diff(pairs[order], prepend=-1) != 0]
    best = np.sort(order[np.argsort(-agreement[order], kind="stable")[:PAIRS]])
    best = best[np.argsort(pairs[best])]
    return pairs[best], agreement[best]


def _bands() -> Iterator[Int64[np.ndarray, " 8"]]:
    """32 choices of eight bytes: neighbours, and those sixteen apart."""
    grid = np.arange(BINS)
    yield from grid.reshape(-1, BAND)
    yield from grid.reshape(BAND, -1).T


def _estimate(
    signed: UInt8[np.ndarray, "n 128"], a: Int64[np.ndarray, " p"], b: Int64[np.ndarray, " p"]
) -> Float32[np.ndarray, " p"]:
    """The similarity that signatures tell: the share of equal bytes, less those that are equal by chance."""
    equal = np.empty(len(a), np.float32)
    for start in range(0, len(a), CHUNK):
        here = slice(start, start + CHUNK)
        equal[here] = np.count_nonzero(signed[a[here]] == signed[b[here]], axis=1)
    return (equal / BINS - 1 / 256) / (1 - 1 / 256)


def _jaccard(pairs: Int64[np.ndarray, "p 2"], read: Read) -> Float[np.ndarray, " p"]:
    """|A ∩ B| / |A ∪ B| of the shingles of each pair, counted out."""
    similar = np.zeros(len(pairs))
    for start in range(0, len(pairs), 1024):
        block = pairs[start : start + 1024]
        texts, places = np.unique(block, return_inverse=True)
        sets = [np.unique(shingles([text])[0]) for text in read(texts)]
        for number, (a, b) in enumerate(places.reshape(-1, 2)):
            shared = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
            similar[start + number] = shared / (len(sets[a]) + len(sets[b]) - shared)
    return similar
