"""Predicting tokens: the head gives what the whole model gives, for every architecture; it survives saving."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_decoders import PACKED, PADDED, decoder
from tiny_models import build, config_of, save_plain, tokenizer_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import kinvec.trainer
from kinvec import masking
from kinvec.backbone import LanguageHead
from kinvec.batching import cut, pack
from kinvec.contracts import KinvecError
from kinvec.embedder import add_language_head, open_folder
from kinvec.objectives import ObjectiveSettings, make_objective

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
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


def test_a_head_goes_where_the_model_is(tmp_path: Path) -> None:
    save_plain("bert", tmp_path, "bert")
    model = open_folder(tmp_path).to("meta")  # a device that every machine has
    add_language_head(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_model_without_a_trained_head_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = open_folder(save_plain("bert", tmp_path / "bert", "bert"))
    add_language_head(model)
    assert "there is no trained prediction head here" in capsys.readouterr().err


def test_a_model_that_predicts_no_tokens_is_refused(tmp_path: Path) -> None:
    build("t5").save_pretrained(tmp_path / "t5")
    tokenizer_of("decoder").save_pretrained(tmp_path / "t5")
    with pytest.raises(KinvecError, match="t5 has no language model to train"):
        add_language_head(open_folder(tmp_path / "t5"))


# ---- training ----


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts in which every word tells the next: what a language model can learn in a few steps."""
    words = "cell blood gene protein mouse human trial drug risk heart lung brain".split()
    rows = [" ".join(words[(start + place) % 12] for place in range(7 + start % 5)) for start in range(48)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def plain(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A language model's plain folder, head and all."""
    config = config_of(name)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    kind = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer_of("bert" if name == "bert" else "decoder").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def train(
    main: Callable[..., tuple[int, str]], model: Path, texts: Path, out: Path, *more: str
) -> list[dict[str, Any]]:
    common = ["trainer.batch_size=8", "trainer.warmup=0", "trainer.schedule=constant", "threads=1", "precision=fp32"]
    code, said = main("train", f"model={model}", f"data.train={texts}", f"out={out}", *common, *more)
    assert code == 0, said
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "objective", "more"), [
    ("llama", "clm", ()),
    ("bert", "mlm", ("trainer.lr=0.003",)),
    ("llama", "mntp", ("attention=bidirectional", "pooling=mean")),
    ("llama", "mntp", ("attention=bidirectional", "pooling=mean", "lora.rank=8", "objective.masking.token=blank")),
])  # fmt: skip
def test_a_model_learns_to_predict(
    tmp_path: Path, texts: Path, main: Callable[..., tuple[int, str]], name: str, objective: str, more: tuple[str, ...]
) -> None:
    steps = (
        "trainer.max_steps=80",
        "trainer.lr=0.01",
        "trainer.chunk_tokens=128",
        "trainer.batch_size=16",
        f"objective.name={objective}",
    )
    rows = train(main, plain(tmp_path, name), texts, tmp_path / "run", *steps, *more)
    signs = (("loss", -1), ("accuracy", 1)) if objective != "mlm" else (("loss", -1),)  # more than 80 steps to be right
    for key, direction in signs:
        first, last = (np.mean([row[key] for row in part]) for part in (rows[:3], rows[-10:]))
        assert direction * (last - first) > 0.2
    model = open_folder(tmp_path / "run" / "model")
    before = open_folder(tmp_path / "plain")
    assert np.abs(model.encode(["cell blood"]) - before.encode(["cell blood"])).max() > 1e-3
    assert model.attention == ("causal" if objective == "clm" else "bidirectional")
    head = add_language_head(model).whole.get_output_embeddings().weight  # type: ignore[operator]
    old = add_language_head(before).whole.get_output_embeddings().weight  # type: ignore[operator]
    assert torch.equal(head, old) == ("lora.rank=8" in more)  # beside adapters the head stays as it was


def test_gradients_are_those_of_transformers_own_loss(tmp_path: Path) -> None:
    """Over packed chunks: the mean over all tokens of the batch, whatever the chunks."""
    model = open_folder(plain(tmp_path, "llama")).eval()
    head = add_language_head(model)
    texts = ["cell blood gene", "protein mouse human trial drug", "risk heart lung brain cell blood gene protein"]
    tokens = model.tokenize(texts)
    ask_of = make_objective(ObjectiveSettings(name="clm")).ask
    assert ask_of is not None
    found = {}
    for budget in (16, 1000):
        model.zero_grad()
        chunks = [ask_of(model.tokenizer, pack(tokens, rows)) for rows in cut(tokens.lengths, budget)]
        loss, _ = masking.backward(model.backbone, head, chunks)
        found[budget] = loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.backbone.model.set_attn_implementation("eager")  # type: ignore[operator]
    count = sum(len(row) - 1 for row in tokens.rows)
    total = 0.0
    for row in tokens.rows:
        ids = torch.tensor([row])
        part = head.whole(input_ids=ids, labels=ids).loss * (len(row) - 1) / count
        part.backward()
        total += part.item()
    for loss, gradients in found.values():
        assert loss == pytest.approx(total, rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_killed_language_run_ends_with_the_same_weights(
    tmp_path: Path, texts: Path, main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain(tmp_path, "llama", attention_dropout=0.1)
    steps = ("trainer.max_steps=9", "trainer.save_every=2", "objective.name=mntp", "attention=bidirectional")
    whole = train(main, model, texts, tmp_path / "whole", *steps)
    step, calls = kinvec.trainer._step, itertools.count()

    def killed(*given: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(kinvec.trainer, "_step", killed)
        main("train", f"model={model}", f"data.train={texts}", f"out={tmp_path / 'cut'}", "trainer.batch_size=8",
             "trainer.warmup=0", "trainer.schedule=constant", "threads=1", "precision=fp32", *steps)  # fmt: skip
    again = train(main, model, texts, tmp_path / "cut", *steps)
    assert [row["loss"] for row in again] == [row["loss"] for row in whole] and len(again) == 9
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("on", ["all", "attention", "hidden"])
def test_simcse_pulls_two_embeddings_of_a_text_together(
    tmp_path: Path, texts: Path, main: Callable[..., tuple[int, str]], on: str
) -> None:
    model = plain(tmp_path, "bert")
    more = ("trainer.max_steps=30", "trainer.lr=0.003", "trainer.dropout=0.2", f"trainer.dropout_on={on}")
    rows = train(main, model, texts, tmp_path / "run", "objective.name=simcse", "pooling=mean", *more)
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last < first and rows[0]["loss"] > 1e-4


def test_what_plain_texts_cannot_do_is_said(tmp_path: Path, texts: Path, main: Callable[..., tuple[int, str]]) -> None:
    def said(*more: str) -> str:
        code, told = main(
            "train", f"model={plain(tmp_path, 'bert')}", f"data.train={texts}", f"out={tmp_path / 'r'}", *more
        )
        assert code in (1, 2) and "Traceback" not in told
        return told

    assert "holds texts; contrastive training needs queries" in said() and "objective.name=simcse" in said()
    assert "simcse needs dropout" in said("objective.name=simcse", "trainer.dropout=0", "evaluate=false")
    shutil.rmtree(tmp_path / "r", ignore_errors=True)
    told = said("objective.name=mntp", "objective.masking.token=blank")
    assert "the tokenizer has no token for 'blank'; set it to mask" in told
