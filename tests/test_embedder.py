"""The model folder: equal to sentence-transformers both ways, reloaded to the bit, clear about what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MINILM
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny_models import VOCABULARY, save_plain, tokenizer_of
from torch import nn

import kinvec.folder
from kinvec import Embedder
from kinvec.backbone import find_model
from kinvec.contracts import Encoder, KinvecError

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "cell",
    "the blood of a mouse",
    "",
    "Insulin REDUCES glucose  in human trial patients",
    " high risk of heart infection \n",
    "naïve café Ωμέγα 你好 🙂",
    "the virus causes inflammation of the lung, " * 12,  # beyond every maximum
    "a",
    "gene expression level",
    "gene expression level",
]


def load(folder: str | Path, **settings: Any) -> Embedder:
    """In float32 wherever the tests run: what is compared here is exact."""
    return Embedder.load(folder, precision="fp32", **settings)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())


def same_as_peer(folder: Path, texts: Sequence[str] = TEXTS, exact_norms: bool = True) -> None:
    """Every text, plain and with the folder's prompts, agrees with sentence-transformers on the same folder."""
    peer, ours = SentenceTransformer(str(folder), device="cpu"), Embedder.load(folder, precision="fp32")
    pairs = [
        (ours.encode_queries(texts), peer.encode_query(list(texts))),
        (ours.encode_documents(texts), peer.encode_document(list(texts))),
    ]
    if not peer.default_prompt_name:
        pairs.append((ours.encode(texts), peer.encode(list(texts))))
    for mine, other in pairs:
        assert mine.dtype == np.float32 and mine.shape == other.shape == (len(texts), ours.dimension)
        assert least_cosine(mine, other) >= 0.99999
        if exact_norms:
            np.testing.assert_allclose(np.linalg.norm(mine, axis=1), np.linalg.norm(other, axis=1), rtol=1e-4)


@pytest.fixture
def st_folder(plain_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves a sentence-transformers model on the tiny BERT, by that library, with the given modules after it."""

    def save(*after: nn.Module, max_length: int | None = 32, lower: bool = False, **settings: Any) -> Path:
        first = Transformer(str(plain_bert), max_seq_length=max_length, do_lower_case=lower)
        model = SentenceTransformer(modules=[first, *(after or (Pooling(32, "mean"),))], device="cpu", **settings)
        model.save(str(tmp_path / "st"), create_model_card=False)
        return tmp_path / "st"

    return save


MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.mark.parametrize("mode", [*MODES, ("mean", "cls"), tuple(MODES)], ids=str)
def test_every_pooling_agrees_with_sentence_transformers(st_folder: Callable[..., Path], mode: Any) -> None:
    same_as_peer(st_folder(Pooling(32, mode)))


@pytest.mark.parametrize("mode", [*MODES, tuple(MODES)], ids=str)
def test_prompts_left_out_of_pooling_agree(st_folder: Callable[..., Path], mode: Any) -> None:
    prompts = {"query": "search of the ", "document": "passage: "}
    same_as_peer(st_folder(Pooling(32, mode, include_prompt=False), prompts=prompts))


def test_prompts_counted_in_pooling_agree(st_folder: Callable[..., Path]) -> None:
    folder = st_folder(prompts={"query": "search: ", "document": "of the passage: ", "other": "gene: "})
    same_as_peer(folder)
    ours = load(folder)
    assert least_cosine(ours.encode_queries(TEXTS), ours.encode(TEXTS)) < 0.999
    peer = SentenceTransformer(str(folder), device="cpu")
    assert (
        least_cosine(ours.encode(TEXTS, prompt=ours.prompts["other"]), peer.encode(TEXTS, prompt_name="other"))
        >= 0.99999
    )


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_a_passage_prompt_is_that_of_documents(st_folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """As E5 names it. The peer's encode_document forgets it; the folder that we save says it so that it does not."""
    folder = st_folder(prompts={"query": "search: ", name: "of the passage: "})
    ours, peer = load(folder), SentenceTransformer(str(folder), device="cpu")
    assert ours.prompts == {"query": "search: ", "document": "of the passage: "}
    assert least_cosine(ours.encode_documents(TEXTS), peer.encode(TEXTS, prompt_name=name)) >= 0.99999
    ours.save(tmp_path / "saved")
    same_as_peer(tmp_path / "saved")
    edit(folder / "config_sentence_transformers.json", prompts={"document": "gene: ", name: "of the passage: "})
    assert load(folder).prompts == {"document": "gene: "}


def test_a_default_prompt_counts_for_both_sides(st_folder: Callable[..., Path]) -> None:
    folder = st_folder(prompts={"instruction": "find the gene: "}, default_prompt_name="instruction")
    ours, peer = load(folder), SentenceTransformer(str(folder), device="cpu")
    other = peer.encode(TEXTS)
    assert least_cosine(ours.encode_queries(TEXTS), other) >= 0.99999
    assert least_cosine(ours.encode_documents(TEXTS), other) >= 0.99999


@pytest.mark.parametrize("lower", [False, True])
def test_lower_casing_agrees(st_folder: Callable[..., Path], lower: bool) -> None:
    """Said by the folder of an old sentence-transformers; newer ones write it into the tokenizer."""
    folder = st_folder()
    edit(folder / "tokenizer_config.json", model_max_length=512)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": lower}))
    same_as_peer(folder)
    assert load(folder).lower_case == lower
    high, low = load(folder).encode(["INSULIN AND Glucose", "insulin and glucose"])
    assert np.array_equal(high, low) == lower


def test_dense_and_normalize_agree_and_the_dimension_is_that_of_the_last(st_folder: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    dense = Dense(64, 24, activation_function=nn.GELU()), Dense(24, 12, bias=False, activation_function=nn.Tanh())
    folder = st_folder(Pooling(32, ("mean", "max")), *dense, Normalize())
    same_as_peer(folder)
    assert load(folder).dimension == 12


@pytest.mark.parametrize("limit", [8, 20, None])
def test_texts_are_cut_where_the_folder_says(st_folder: Callable[..., Path], limit: int | None) -> None:
    folder = st_folder(max_length=limit)
    same_as_peer(folder)
    assert load(folder).max_length == (limit or 48)
    assert load(folder, max_length=5).max_length == 5
    assert load(folder, max_length=1000).max_length == (limit or 48)


PLAIN = {
    "bert": "bert",
    "roberta": "roberta",
    "modernbert": "roberta",
    "distilbert": "bert",
    "mpnet": "roberta",
    "llama": "decoder",
    "gemma3": "decoder",
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_folders_agree(tmp_path: Path, name: str) -> None:
    """A folder without modules.json: mean pooling, or the last token of a causal decoder."""
    folder = save_plain(name, tmp_path / name, PLAIN[name])
    texts = [text for text in TEXTS if text] if PLAIN[name] == "decoder" else TEXTS  # the peer cannot embed no token
    same_as_peer(folder, texts)


def test_a_causal_language_model_pools_its_last_token(tmp_path: Path) -> None:
    folder = save_plain("llama", tmp_path / "llama", "decoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    ours = load(folder)
    assert ours.pooling == ("lasttoken",) and ours.attention == "causal"
    same_as_peer(folder, [text for text in TEXTS if text])
    assert np.isfinite(ours.encode([""])).all()


@pytest.mark.filterwarnings("ignore:.*architectures.*")
@pytest.mark.parametrize("causal", [True, False])
def test_the_folder_says_how_a_decoder_attends(tmp_path: Path, causal: bool) -> None:
    """Saving turns LlamaForCausalLM into LlamaModel: what the folder says must survive that."""
    folder = save_plain("llama" if causal else "llama-bidirectional", tmp_path / "plain", "decoder")
    first = load(folder)
    first.save(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "kinvec.json").read_text())["attention"]
    assert said == first.attention == load(tmp_path / "saved").attention == ("causal" if causal else "bidirectional")
    texts = [text for text in TEXTS if text]
    assert np.array_equal(load(tmp_path / "saved").encode(texts), first.encode(texts))
    same_as_peer(tmp_path / "saved", texts)


def test_minilm_agrees_from_one_token_to_beyond_its_maximum() -> None:
    texts = ["", "a", "What is a gene?", "ΣΊΣΥΦΟΣ naïve 你好", "word " * 40, "a longer text of many words " * 60]
    peer = SentenceTransformer(find_model(MINILM), device="cpu")
    ours = Embedder.load(MINILM, precision="fp32")
    assert ours.name == MINILM and ours.max_length == 256 and ours.dimension == 384
    vectors = ours.encode(texts)
    assert isinstance(ours, Encoder)
    assert least_cosine(vectors, peer.encode(texts)) >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


def test_the_real_bert_tokenizer_agrees(shared_data: Path, plain_bert: Path, tmp_path: Path) -> None:
    """Its word pieces, on a model large enough for its vocabulary."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizers" / "bert_uncased_tokenizer.json"), model_max_length=40,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(plain_bert)
    config.vocab_size = len(tokenizer)
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    same_as_peer(tmp_path)


# ---- order, packs, precision ----


def test_vectors_come_in_order_whatever_the_windows_and_packs(
    plain_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load(plain_bert)
    texts = [" ".join(TEXTS[i % len(TEXTS)].split()[: i % 9 + 1]) for i in range(300)]
    whole = ours.encode(texts)
    monkeypatch.setattr(kinvec.embedder, "WINDOW", 64)
    monkeypatch.setattr(kinvec.embedder, "ENCODE_TOKENS", 37)
    np.testing.assert_allclose(ours.encode(texts), whole, atol=1e-5)
    alone = np.concatenate([ours.encode([text]) for text in texts[:20]])
    np.testing.assert_allclose(alone, whole[:20], atol=1e-5)
    assert ours.encode([]).shape == (0, 32)


def test_encoding_leaves_training_as_it_was(plain_bert: Path) -> None:
    ours = load(plain_bert)
    ours.train()
    first = ours.encode(TEXTS)
    assert ours.training and np.array_equal(first, ours.eval().encode(TEXTS))


def test_bf16_is_close_and_says_so(plain_bert: Path) -> None:
    exact, rough = Embedder.load(plain_bert, precision="fp32"), Embedder.load(plain_bert, precision="bf16")
    assert rough.precision == "bf16" and next(rough.backbone.parameters()).dtype == torch.bfloat16
    short = [text[:40] for text in TEXTS]
    assert least_cosine(exact.encode(short), rough.encode(short)) > 0.99
    assert exact.fingerprint != rough.fingerprint


def test_saving_what_was_opened_in_bf16_loses_nothing(plain_bert: Path, tmp_path: Path) -> None:
    Embedder.load(plain_bert, precision="bf16").save(tmp_path / "copy")
    assert np.array_equal(load(tmp_path / "copy").encode(TEXTS), load(plain_bert).encode(TEXTS))


def test_one_text_is_no_list_of_texts(plain_bert: Path) -> None:
    with pytest.raises(KinvecError, match=r"write encode\(\[text\]\)"):
        load(plain_bert).encode("a text")


def test_the_fingerprint_knows_weights_prompts_and_length(plain_bert: Path, tmp_path: Path) -> None:
    first, again = load(plain_bert), load(shutil.copytree(plain_bert, tmp_path / "copy"))
    prints = {first.fingerprint, load(plain_bert, max_length=9).fingerprint}
    assert again.fingerprint == first.fingerprint
    again.prompts = {"query": "q: "}
    prints.add(again.fingerprint)
    again.prompts = {}
    with torch.no_grad():
        next(again.backbone.parameters())[7, 3] += 1e-6
    prints.add(again.fingerprint)
    assert len(prints) == 4


# ---- saving ----


def test_saved_loads_in_sentence_transformers_and_here_to_the_bit(
    st_folder: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = st_folder(
        Pooling(32, ("mean", "lasttoken"), include_prompt=False),
        Dense(64, 20, activation_function=nn.ReLU()), Normalize(),
        prompts={"query": "search of the ", "document": "passage: "}, max_length=24, lower=True,
    )  # fmt: skip
    first = Embedder.load(folder, precision="fp32")
    first.lineage.append({"stage": 1, "objective": "contrastive"})
    first.save(tmp_path / "saved")
    same_as_peer(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved", precision="fp32")
    assert np.array_equal(*again.encode(["INSULIN AND Glucose", "insulin and glucose"]))
    for encode in ("encode", "encode_queries", "encode_documents"):
        assert np.array_equal(getattr(again, encode)(TEXTS), getattr(first, encode)(TEXTS))
    assert again.fingerprint == first.fingerprint
    assert (again.prompts, again.max_length, again.pooling) == (first.prompts, 24, ("mean", "lasttoken"))
    assert again.lineage == first.lineage
    said = json.loads((tmp_path / "saved" / "kinvec.json").read_text())
    assert said["attention"] == "bidirectional" and said["format"] == 1 and said["max_length"] == 24
    again.save(tmp_path / "twice")
    assert read_all(tmp_path / "twice") == read_all(tmp_path / "saved")


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "bert"])
def test_every_family_is_saved_and_reloaded_to_the_bit(tmp_path: Path, name: str) -> None:
    first = Embedder.load(save_plain(name, tmp_path / "plain", PLAIN[name]), precision="fp32")
    first.save(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved", precision="fp32")
    assert np.array_equal(again.encode(TEXTS), first.encode(TEXTS))
    assert again.fingerprint == first.fingerprint
    same_as_peer(tmp_path / "saved", [text for text in TEXTS if text])


def read_all(folder: Path) -> dict[str, Any]:
    """Every file's bytes, or value where it is JSON, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(p.relative_to(folder)): json.loads(p.read_text()) if p.suffix == ".json" else p.read_bytes() for p in files
    }


@pytest.mark.parametrize("failing", ["tokenizer", "last file", "interrupt"])
def test_a_save_that_fails_leaves_the_old_folder(
    plain_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    ours = load(plain_bert)
    ours.save(tmp_path / "model")
    before = read_all(tmp_path)
    with torch.no_grad():
        next(ours.backbone.parameters()).zero_()

    def full(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if failing == "interrupt" else OSError(28, "No space left on device")

    if failing == "tokenizer":
        monkeypatch.setattr(ours.tokenizer, "save_pretrained", full)
    else:
        write = kinvec.folder.write_json
        monkeypatch.setattr(
            kinvec.folder,
            "write_json",
            lambda path, value: full() if path.name == "kinvec.json" else write(path, value),
        )
    with pytest.raises((OSError, KeyboardInterrupt)):
        ours.save(tmp_path / "model")
    assert read_all(tmp_path) == before
    assert np.array_equal(load(tmp_path / "model").encode(TEXTS), load(plain_bert).encode(TEXTS))


def test_a_folder_that_is_not_ours_is_not_replaced(plain_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(KinvecError, match=r"thesis.*not"):
        load(plain_bert).save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    load(plain_bert).save(tmp_path / "empty")
    assert (tmp_path / "empty" / "kinvec.json").is_file()


def test_tiny_tokenizers_hold_what_the_tests_count_on() -> None:
    """The texts above reach unknown words, every special token and more than the longest model takes."""
    for style in ("bert", "roberta", "decoder"):
        tokenizer = tokenizer_of(style)
        ids = tokenizer(TEXTS)["input_ids"]
        assert max(map(max, filter(None, ids))) < VOCABULARY and max(map(len, ids)) > 72
