"""Packed tokens, some of them hidden, and what a language model is asked of them: MLM, MNTP, CLM.

Shapes: T = tokens of the pack, m = predictions asked for, V = size of the vocabulary, h = hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kinvec import distributed
from kinvec.batching import Pack
from kinvec.config import Settings
from kinvec.contracts import RecipeError

Task = Literal["mlm", "mntp", "clm"]
KEPT, SWAPPED = 0.1, 0.1  # of the chosen tokens, in BERT's way: left as they are; another token at random


class MaskingSettings(Settings):
    """Which tokens are hidden, and behind what."""

    probability: float = Field(0.2, gt=0, le=1)
    """Share of the tokens that are to be predicted."""
    token: Literal["mask", "blank", "eos"] = "mask"
    """What hides a token: the tokenizer's mask token, the token of `_` (LLM2Vec's blank), or the end of sequence."""
    replace: Literal["bert", "all"] = "bert"
    """Hide 80 % of the chosen tokens, swap 10 % for random ones and leave 10 %, as BERT does; or hide all of them."""


@dataclass(frozen=True)
class Cloze:
    """A pack with hidden tokens: the hidden state at `read[i]` is to predict the token `targets[i]`."""

    pack: Pack
    read: Int[Tensor, " m"]
    targets: Int[Tensor, " m"]


def ask(
    texts: Pack, task: Task, settings: MaskingSettings, hidden: int, special: Int[Tensor, " s"], vocabulary: int
) -> Cloze:
    """Hide tokens of the pack behind the token `hidden`, drawing from torch's generator, and say what is asked.

    `mlm` predicts a hidden token where it stands (Devlin et al. 2019), `mntp` at the position before it (BehnamGhader
    et al. 2024), `clm` every token at the position before it, hiding none. No prediction crosses a text's border, and
    no special token is asked for.
    """
    ids = texts.input_ids
    askable = ~torch.isin(ids, special.to(ids.device))
    if task != "mlm":
        askable[texts.starts] = False  # nothing of its text precedes the first token
    if task == "clm":
        places = askable.nonzero()[:, 0]
        return Cloze(texts, places - 1, ids[places])
    chosen = askable & (torch.rand(len(ids)).to(ids.device) < settings.probability)
    places = chosen.nonzero()[:, 0]
    covered = _cover(ids[places], settings, hidden, vocabulary)
    masked = replace(texts, input_ids=ids.index_copy(0, places, covered))
    return Cloze(masked, places - int(task == "mntp"), ids[places])


def _cover(ids: Int[Tensor, " m"], settings: MaskingSettings, hidden: int, vocabulary: int) -> Int[Tensor, " m"]:
    if settings.replace == "all":
        return torch.full_like(ids, hidden)
    draw = torch.rand(len(ids)).to(ids.device)
    swapped = torch.randint(vocabulary, (len(ids),)).to(ids.device)
    covered = torch.where(draw < KEPT + SWAPPED, swapped, hidden)
    return torch.where(draw < KEPT, ids, covered)


def hidden_token(tokenizer: Any, settings: MaskingSettings) -> int:
    """The id that hides a token. Raises `RecipeError` for a tokenizer that has none of the kind."""
    ids = {
        "mask": tokenizer.mask_token_id,
        "blank": tokenizer.convert_tokens_to_ids("_"),
        "eos": tokenizer.eos_token_id,
    }
    found = ids[settings.token]
    if found is None or (settings.token == "blank" and found == tokenizer.unk_token_id):
        others = " or ".join(token for token, number in ids.items() if number is not None and token != settings.token)
        raise RecipeError(
            f"objective.masking.token: the tokenizer has no token for '{settings.token}'; set it to {others}"
        )
    return int(found)


def backward(
    hidden: Callable[[Pack], Float[Tensor, "T h"]],
    logits: Callable[[Float[Tensor, "m h"]], Float[Tensor, "m V"]],
    asked: Sequence[Cloze],
) -> tuple[float, float]:
    """Accumulate the gradients of the mean cross-entropy of all predictions; returns it and the share that is right.

    Every chunk's graph is freed before the next is built: no prediction depends on another text.
    """
    count = max(int(distributed.total(sum(len(cloze.targets) for cloze in asked))), 1)
    total = right = 0.0
    with distributed.within_memory():
        for cloze in asked:
            if not len(cloze.targets) and distributed.world() == 1:
                continue
            answers = logits(hidden(cloze.pack)[cloze.read]).float()
            loss = torch.nn.functional.cross_entropy(answers, cloze.targets, reduction="sum") / count
            loss.backward()
            total += loss.item()
            right += float((answers.argmax(-1) == cloze.targets).sum())
    return distributed.total(total), distributed.total(right) / count
