"""Predicting tokens: the head gives what the whole model gives, for every architecture; it survives saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_decoders import PACKED, PADDED, decoder
from tiny_models import build, config_of, save_plain, tokenizer_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from kinvec.backbone import LanguageHead
from kinvec.contracts import KinvecError
from kinvec.embedder import add_language_head, open_folder

pytestmark = pytest.mark.usefixtures("one_thread")
MASKED = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert", "mpnet", "deberta-v2"]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def same(whole: Any) -> None:
    whole.eval()
    with torch.no_grad():
        expected = whole(input_ids=IDS, use_cache=False).logits
        hidden = whole.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        found = LanguageHead(whole)(hidden.flatten(0, 1)).view(expected.shape)
        assert torch.equal(found, expected)
        assert torch.equal(whole(input_ids=IDS, use_cache=False).logits, expected)  # and the model is left as it was


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_a_decoders_head_is_the_models_own(kind: str) -> None:
    same(AutoModelForCausalLM.from_config(decoder(kind, (PACKED | PADDED)[kind]).config))


@pytest.mark.parametrize("name", MASKED)
def test_an_encoders_head_is_the_models_own(name: str) -> None:
    same(AutoModelForMaskedLM.from_config(config_of(name)))


@pytest.mark.parametrize(("name", "style", "kind"), [
    ("bert", "bert", "BertForMaskedLM"), ("llama", "decoder", "LlamaForCausalLM"),
    ("gemma2", "decoder", "Gemma2ForCausalLM"),
])  # fmt: skip
def test_a_head_is_opened_shares_its_embeddings_and_is_saved(
    tmp_path: Path, name: str, style: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    getattr(transformers, kind)(config_of(name)).save_pretrained(tmp_path / "plain")
    tokenizer_of(style).save_pretrained(tmp_path / "plain")
    model = open_folder(tmp_path / "plain")
    add_language_head(model)
    assert model.language is not None and "begin anew" not in capsys.readouterr().err
    whole: Any = model.language.whole
    assert whole.base_model is model.backbone.model
    if whole.config.get_text_config().tie_word_embeddings:
        assert whole.get_output_embeddings().weight is model.backbone.model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.01)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = model.eval().language(hidden)
    model.save(tmp_path / "model")
    again = open_folder(tmp_path / "model")
    add_language_head(again)
    assert again.language is not None and "begin anew" not in capsys.readouterr().err
    torch.testing.assert_close(again.eval().language(hidden), expected, atol=0, rtol=0)
    assert np.array_equal(again.encode(["a gene"]), model.encode(["a gene"]))


def test_a_model_without_a_trained_head_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = open_folder(save_plain("bert", tmp_path / "bert", "bert"))
    add_language_head(model)
    assert "there is no trained prediction head here" in capsys.readouterr().err


def test_a_model_that_predicts_no_tokens_is_refused(tmp_path: Path) -> None:
    build("t5").save_pretrained(tmp_path / "t5")
    tokenizer_of("decoder").save_pretrained(tmp_path / "t5")
    with pytest.raises(KinvecError, match="t5 has no language model to train"):
        add_language_head(open_folder(tmp_path / "t5"))
