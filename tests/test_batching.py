"""Packs: every text once and whole, within the budget, whatever the lengths; prompts counted as tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tokenizer_of

from kinvec.batching import cut, lay, packs, prompt_length, tokenize

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_packs_hold_every_text_once_and_whole_within_the_budget(lengths: list[int], budget: int) -> None:
    tokens = lay([[1000 * row + place for place in range(n)] for row, n in enumerate(lengths)])
    seen: list[int] = []
    for texts in packs(tokens, budget):
        assert sum(texts.lengths) <= budget or len(texts) == 1
        assert list(texts.lengths) == sorted(texts.lengths)
        assert [length for _, count, length in texts.runs for _ in range(count)] == list(texts.lengths)
        assert len({length for _, _, length in texts.runs}) == len(texts.runs)
        begins = dict(zip(texts.starts.tolist(), texts.lengths, strict=True))
        assert all(begins[first] == length for first, _, length in texts.runs)
        parts = zip(texts.input_ids.split(list(texts.lengths)), texts.positions.split(list(texts.lengths)), strict=True)
        for row, start, (ids, positions) in zip(texts.rows, texts.starts.tolist(), parts, strict=True):
            assert ids.tolist() == tokens.rows[row] and texts.input_ids[start] == tokens.rows[row][0]
            assert positions.tolist() == list(range(len(ids)))
        ids, mask = texts.padded(-1)
        assert torch.equal(ids[mask.bool()], texts.input_ids) and (ids[~mask.bool()] == -1).all()
        seen += texts.rows
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_no_two_neighbouring_packs_could_have_been_one_more_text_fuller(lengths: list[int], budget: int) -> None:
    groups = cut(np.array(lengths), budget)
    for group, following in zip(groups, groups[1:], strict=False):
        assert sum(lengths[row] for row in group) + lengths[following[0]] > budget
    assert groups == cut(np.array(lengths), budget)


@pytest.mark.parametrize(("style", "specials"), [("bert", 2), ("roberta", 2), ("decoder", 0)])
def test_prompts_come_before_the_text_and_are_counted(style: str, specials: int) -> None:
    tokenizer = tokenizer_of(style)
    plain = tokenize(tokenizer, ["gene", ""], 64)
    prompted = tokenize(tokenizer, ["gene", ""], 64, "cell blood:", skip_prompt=True)
    length = prompt_length(tokenizer, "cell blood:", 64)
    assert prompted.skip.tolist() == [length, length] and plain.skip.tolist() == [0, 0]
    assert prompted.rows[0][:length] == tokenizer(["cell blood:"])["input_ids"][0][:length]
    assert prompted.lengths[1] >= length and plain.lengths[1] == max(specials, 1)
    assert (tokenize(tokenizer, ["a long text of many words"] * 3, 5, "cell ").lengths <= 5).all()
    assert len(tokenize(tokenizer, [], 64)) == 0
