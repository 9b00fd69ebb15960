"""Masked tokens: equal to a reference written token by token; shares, borders and special tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinvec.batching import Pack, lay, pack
from kinvec.masking import MaskingSettings, ask

HIDDEN, VOCABULARY, SPECIAL = 4, 50, torch.tensor([0, 2, 3])


def packed(lengths: list[int], seed: int) -> Pack:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return pack(lay(rows), range(len(rows)))


def token_by_token(
    texts: Pack, task: str, chosen: MaskingSettings, seed: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids after hiding and (position, target) pairs, in the words of the papers; draws as torch makes them."""
    torch.manual_seed(seed)
    ids = texts.input_ids.tolist()
    chance = torch.rand(len(ids)).tolist() if task != "clm" else [0.0] * len(ids)
    asked, at = [], 0
    for length in texts.lengths:
        for place in range(at, at + length):
            if ids[place] in SPECIAL.tolist() or (task != "mlm" and place == at):
                continue
            if task == "clm" or chance[place] < chosen.probability:
                asked.append(place)
        at += length
    pairs = [(place if task == "mlm" else place - 1, ids[place]) for place in asked]
    if task == "clm":
        return ids, pairs
    if chosen.replace == "bert":
        fate, other = torch.rand(len(asked)).tolist(), torch.randint(VOCABULARY, (len(asked),)).tolist()
    for number, place in enumerate(asked):
        if chosen.replace == "all" or fate[number] >= 0.2:
            ids[place] = HIDDEN
        elif fate[number] >= 0.1:
            ids[place] = other[number]
    return ids, pairs


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9), task=st.sampled_from(["mlm", "mntp", "clm"]),
    replace=st.sampled_from(["bert", "all"]), probability=st.floats(0.05, 1.0), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_equals_a_reference_written_token_by_token(
    lengths: list[int], task: str, replace: str, probability: float, seed: int
) -> None:
    texts, chosen = packed(lengths, seed), MaskingSettings(probability=probability, replace=replace)
    ids, pairs = token_by_token(texts, task, chosen, seed)
    torch.manual_seed(seed)
    found = ask(texts, task, chosen, HIDDEN, SPECIAL, VOCABULARY)
    assert found.pack.input_ids.tolist() == ids
    assert list(zip(found.read.tolist(), found.targets.tolist(), strict=True)) == pairs
    border = set(texts.starts.tolist())
    assert task == "mlm" or not {place + 1 for place in found.read.tolist()} & border


def test_the_shares_are_berts() -> None:
    texts = packed([400] * 100, 0)
    torch.manual_seed(1)
    found = ask(texts, "mlm", MaskingSettings(probability=0.3), HIDDEN, SPECIAL, 10**6)
    now = found.pack.input_ids[found.read]
    share = len(found.read) / (~torch.isin(texts.input_ids, SPECIAL)).sum().item()
    kept, hidden = (now == found.targets).double().mean().item(), (now == HIDDEN).double().mean().item()
    assert abs(share - 0.3) < 0.01 and abs(kept - 0.1) < 0.02
    assert abs(hidden - 0.8) < 0.04  # the hidden token is itself asked for now and then
    assert torch.equal(
        found.pack.input_ids == texts.input_ids, ~torch.isin(torch.arange(40_000), found.read[now != found.targets])
    )
