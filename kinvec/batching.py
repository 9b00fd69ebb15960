"""Texts → tokens → packs: prompts, truncation, and many texts laid end to end without padding.

Shapes: n = texts, T = tokens of all texts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, pairwise
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from kinvec.contracts import KinvecError


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts, end to end: 4 bytes a token, where lists of Python's numbers would take 36.

    `skip[i]` leading tokens of text i belong to a prompt that pooling leaves out.
    """

    ids: Int32[np.ndarray, " T"]
    lengths: Int64[np.ndarray, " n"]
    skip: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Int64[np.ndarray, " n"]:
        """Where each text begins."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def last(self) -> Int32[np.ndarray, " n"]:
        """The last token of each text."""
        return self.ids[self.starts + self.lengths - 1]

    @property
    def rows(self) -> list[list[int]]:
        """Text by text, as numbers of Python."""
        return [row.tolist() for row in np.split(self.ids, self.starts[1:])]


def lay(rows: Sequence[Sequence[int]], skip: Sequence[int] | None = None) -> Tokens:
    """Token ids given text by text, laid end to end."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    ids = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum()))
    return Tokens(ids, lengths, np.zeros_like(lengths) if skip is None else np.array(skip, dtype=np.int64))


def join(parts: Sequence[Tokens]) -> Tokens:
    """The texts of all parts, in their order."""
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.skip for part in parts]),
    )


def shares(texts: Sequence[str], parts: int) -> list[slice]:
    """Where to cut the texts, in their order, into so many parts of about as many characters each."""
    before = np.cumsum([0, *map(len, texts)])
    inner = np.searchsorted(before, before[-1] * np.arange(1, parts) / parts).tolist()
    return [slice(first, last) for first, last in pairwise([0, *inner, len(texts)])]


_ONE_AT_A_TIME = Lock()  # a tokenizer keeps the length that it cuts at, which no other thread may change meanwhile


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int, prompt: str | Sequence[str] = "", skip_prompt: bool = False
) -> Tokens:
    """Put `prompt` (or each text its own) before every text and tokenize, cut at `max_length` tokens, special ones too.

    With `skip_prompt` the prompt's tokens are marked to be left out of pooling, as sentence-transformers does it for
    models whose pooling has `include_prompt: false`. Raises `KinvecError` for what is no string.
    """
    if not texts:
        return lay([])
    prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
    try:
        given = [before + text for before, text in zip(prompts, texts, strict=True)]
    except TypeError:
        kinds = {type(text).__name__ for text in texts} - {"str"}
        raise KinvecError(f"texts must be strings, and here is one of type {min(kinds)}") from None
    with _ONE_AT_A_TIME, _no_panic():
        ids = tokenizer(given, truncation=True, max_length=max_length, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        left_out = {p: prompt_length(tokenizer, p, max_length) if p and skip_prompt else 0 for p in set(prompts)}
    if not all(ids):  # decoders add no special tokens: an empty text still needs a token to be a vector
        empty = [
            next(
                i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, 0) if i is not None
            )
        ]
        ids = [row or empty for row in ids]
    return lay(ids, [left_out[before] for before in prompts])


@contextmanager
def _no_panic() -> Iterator[None]:
    """What stops the tokenizers library, such as a pattern that tries too much, is no `Exception` of Python's."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error).split())[:200]
        raise KinvecError(f"the tokenizer cannot read one of the texts ({why}); is its pattern sound?") from None


def prompt_length(tokenizer: Any, prompt: str, max_length: int) -> int:
    """Tokens of the prompt alone: leading special tokens counted, a trailing one (end of sequence, separator) not."""
    ids = tokenizer([prompt], truncation=True, max_length=max_length, verbose=False)["input_ids"][0]
    return len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)


def append_end(tokenizer: Any) -> None:
    """Let the tokenizer end every text with its end-of-sequence token; cutting a text leaves room for it.

    The rule becomes part of the tokenizer, so whoever reads its files tokenizes alike. Raises `KinvecError` for a
    tokenizer without such a token, or not of the `tokenizers` library.
    """
    from tokenizers import processors

    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise KinvecError(
            f"append_eos: the tokenizer {type(tokenizer).__name__} has no end-of-sequence token to append"
        )
    if ends_texts(tokenizer):
        return
    end = processors.TemplateProcessing(
        single="$A [END]", pair="$A [END] $B:1 [END]:1",
        special_tokens=[{"id": "[END]", "ids": [tokenizer.eos_token_id], "tokens": [tokenizer.eos_token]}],
    )  # fmt: skip
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([before, end]) if before else end


def ends_texts(tokenizer: Any) -> bool:
    """Whether tokenized texts end with the end-of-sequence token."""
    return tokenizer.eos_token_id is not None and tokenizer(["a"])["input_ids"][0][-1:] == [tokenizer.eos_token_id]


@dataclass(frozen=True)
class Pack:
    """n texts laid end to end, texts of equal length beside each other; positions restart at every text.

    `rows[i]` is where text i stood before it was packed, so that results can be put back in order.
    """

    input_ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    lengths: tuple[int, ...]
    skip: tuple[int, ...]
    rows: tuple[int, ...]

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, texts, tokens each) of every stretch of texts of equal length, in order."""
        runs, first = [], 0
        for length, same in groupby(self.lengths):
            texts = len(list(same))
            runs.append((first, texts, length))
            first += texts * length
        return tuple(runs)

    @cached_property
    def starts(self) -> Int[Tensor, " n"]:
        """Where each text begins."""
        ends = torch.tensor(self.lengths, device=self.input_ids.device).cumsum(0)
        return ends - torch.tensor(self.lengths, device=self.input_ids.device)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Pack:
        if self.input_ids.device == device:
            return self
        return Pack(self.input_ids.to(device), self.positions.to(device), self.lengths, self.skip, self.rows)

    def with_fillers(self, count: int) -> Pack:
        """The same texts after so many others, of one token each."""
        if not count:
            return self
        none = (0,) * count
        ids, positions = (torch.nn.functional.pad(x, (count, 0)) for x in (self.input_ids, self.positions))
        return Pack(ids, positions, (1,) * count + self.lengths, none + self.skip, (-1,) * count + self.rows)

    def padded(self, pad_token: int) -> tuple[Int[Tensor, "n L"], Int[Tensor, "n L"]]:
        """The same texts padded on the right: token ids and attention mask, for models that cannot be packed."""
        rows = self.input_ids.split(list(self.lengths))
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_token)
        lengths = torch.tensor(self.lengths, device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).long()
        return ids, mask


def pack(tokens: Tokens, rows: Sequence[int]) -> Pack:
    """Lay the chosen rows end to end, shortest first."""
    chosen = np.array(rows)
    order = chosen[np.lexsort((chosen, tokens.lengths[chosen]))]
    lengths = tokens.lengths[order]
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    ids = tokens.ids[np.repeat(tokens.starts[order], lengths) + positions].astype(np.int64)
    said = (tuple(value.tolist()) for value in (lengths, tokens.skip[order], order))
    return Pack(torch.from_numpy(ids), torch.from_numpy(positions), *said)


def cut(lengths: Int[np.ndarray, " n"], budget: int) -> list[list[int]]:
    """Cut n texts, sorted by length, into groups of at most `budget` tokens (a longer text stands alone).

    A function of the lengths alone, so the same texts always share a pack and their vectors keep their bits.
    """
    groups: list[list[int]] = []
    room = 0
    for row in np.argsort(lengths, kind="stable").tolist():
        if not groups or lengths[row] > room:
            groups.append([])
            room = budget
        groups[-1].append(row)
        room -= int(lengths[row])
    return groups


def deal(lengths: Int[np.ndarray, " n"], budget: int, ranks: int) -> list[list[list[int]]]:
    """Cut n texts into groups for several processes: as many groups for each, and nearly as many tokens in each group.

    For one process that is `cut`. For more, a group may exceed the budget by a text. Raises `KinvecError` where there
    are too few texts.
    """
    if ranks == 1:
        return [cut(lengths, budget)]
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    rounds = -(-int(ends[-1]) // (budget * ranks))
    groups = rounds * ranks
    if groups > len(order):
        raise KinvecError(
            f"a step of {len(order)} texts cannot be cut into {groups} parts for {ranks} processes; raise "
            "trainer.batch_size or trainer.chunk_tokens, or start fewer processes"
        )
    number = np.arange(1, groups)
    bounds = np.maximum(np.searchsorted(ends, ends[-1] * number / groups), 1)
    bounds = np.maximum.accumulate(bounds - number) + number  # no group is empty
    bounds = np.minimum(bounds, len(order) - groups + number)
    parts = [part.tolist() for part in np.split(order, bounds)]
    # Long texts cost more than their tokens: forwards, then backwards, so that nobody gets the longer of every round.
    return [[parts[r * ranks + (rank if r % 2 else ranks - 1 - rank)] for r in range(rounds)] for rank in range(ranks)]


def packs(tokens: Tokens, budget: int) -> Iterator[Pack]:
    """All texts, as packs of at most `budget` tokens."""
    for rows in cut(tokens.lengths, budget):
        yield pack(tokens, rows)
