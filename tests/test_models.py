"""The page of models: its checks run here on a few of its rows, and it names every model of the list as it is."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from model_list import FIFTY, GTE_MULTILINGUAL, OTHERS, QWEN2, TINY, Model, replace
from models import CHECKS, PAGE, build, described, distance, measure, remark

from kinvec import Embedder
from kinvec.contracts import KinvecError
from kinvec.embedder import add_language_head, open_folder
from kinvec.published import open_config

pytestmark = pytest.mark.usefixtures("one_thread")

BY_NAME = {model.name: model for model in [*FIFTY, *OTHERS]}
QUICK = [
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
    "BAAI/bge-m3",
    "nomic-ai/nomic-embed-text-v1.5",
    "Alibaba-NLP/gte-multilingual-base",
    "google/embeddinggemma-300m",
    "hkunlp/instructor-large",
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct",
]
REFUSED = {
    "jinaai/jina-embeddings-v2-base-en": r"needs code of its authors \(jinaai/jina-bert-implementation--modeling_bert",
    "jinaai/jina-embeddings-v3": r"needs code of its authors \(jinaai/xlm-roberta-flash-implementation",
    "nomic-ai/nomic-embed-text-v2-moe": r"needs code of its authors \(nomic-ai/nomic-bert-2048--modeling",
    "nvidia/NV-Embed-v2": r"needs code of its authors \(modeling_nvembed\.NVEmbedModel\), which kinvec does not run",
    "minishlab/potion-base-8M": r"module 'StaticEmbedding' is not supported",
}


def load(folder: Path) -> Embedder:
    return Embedder.load(folder, precision="fp32", device="cpu")


@pytest.mark.parametrize("name", QUICK)
def test_a_row_of_the_page_passes_every_check(name: str, tmp_path: Path) -> None:
    work = measure(BY_NAME[name].form, tmp_path)
    assert work.good, work.outcomes
    vectors = work.ours.encode(models.TEXTS[:5])  # none of them cut
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (vectors @ vectors.T - 2 * np.eye(5)).max() < 0.999, "texts that look alike would agree with anything"


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_needs_its_code_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    folder = build(BY_NAME[name].form, tmp_path / "published")
    with pytest.raises(KinvecError, match=REFUSED[name]) as caught:
        load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.count(str(folder)) == 1


def test_a_check_that_fails_leaves_its_sentence_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: models.Work) -> models.Outcome:
        raise RuntimeError("it broke\nhere")

    monkeypatch.setitem(CHECKS, "agrees", broken)
    model = Model("someone/something", BY_NAME["BAAI/bge-m3"].form)
    work = measure(model.form, tmp_path)
    assert not work.good and work.outcomes["agrees"].text == "RuntimeError: it broke"
    assert [name for name, outcome in work.outcomes.items() if outcome.good] == [
        "loads",
        "trains",
        "reloads",
        "read back",
    ]
    works = {repr(model.form): work}
    assert "| packed | **no** | yes |" in models.table([model], works)
    assert models.failures([model], works) == "- `someone/something`\n  agrees: “RuntimeError: it broke”"


def test_the_page_has_every_model_of_the_list_as_it_is() -> None:
    """What is not measured: names, order, architecture, pooling, remarks. `make models` makes the page anew."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    shown = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert len(FIFTY) == 50 and len(BY_NAME) == len(FIFTY) + len(OTHERS)
    for model, cells in zip([*FIFTY, *OTHERS], shown, strict=True):
        assert (*cells[:4], cells[-1]) == (*described(model), remark(model.form))
        assert len(cells) == 4 + len(CHECKS) + 1


def test_the_page_counts_and_explains_what_it_shows() -> None:
    page = PAGE.read_text("utf-8")
    rows, reasons = page.split("## The fifty")[1].split("## What does not work")
    fifty = rows.split("## Others")[0]
    assert f"**{50 - fifty.count('**no**')} work here**" in page
    failed = {line.split("`")[1] for line in rows.splitlines() if "**no**" in line}
    assert failed == {part for line in reasons.splitlines() if line.startswith("- ") for part in line.split("`")[1::2]}


def test_ntk_positions_are_those_of_the_authors(tmp_path: Path) -> None:
    """1 / (θs)^(2i/d), divided by s^(2/d): https://kexue.fm/archives/9706, as vLLM and the authors' code have it."""
    model = load(build(GTE_MULTILINGUAL, tmp_path / "gte")).backbone.model
    theta, scale, width = 20000.0, 8.0, TINY["hidden_size"] // TINY["num_attention_heads"]
    steps = torch.arange(0, width, 2).float() / width
    expected = 1.0 / ((theta * scale) ** steps) / scale ** (2 / width)
    torch.testing.assert_close(model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.9}},
        {"position_embedding_type": "absolute"},
        {"logn_attention_scale": True},
        {"pack_qkv": False},
    ],
)
def test_settings_that_transformers_has_no_words_for_are_not_guessed(changes: dict, tmp_path: Path) -> None:
    folder = build(replace(GTE_MULTILINGUAL, published=GTE_MULTILINGUAL.published | changes), tmp_path / "gte")
    with pytest.raises(KinvecError, match="needs code of its authors"):
        load(folder)


def test_what_is_saved_is_transformers_own_and_names_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Alibaba-NLP/gte-large-en-v1.5", "Snowflake/snowflake-arctic-embed-m-v2.0"):
        place = tmp_path / name.rsplit("/", 1)[-1]
        model = load(build(BY_NAME[name].form, place / "published"))
        assert "is not run; it is opened as transformers' gte" in " ".join(capsys.readouterr().err.split())
        model.save(place / "saved")
        said = json.loads((place / "saved" / "config.json").read_text())
        assert said["model_type"] == "gte" and "auto_map" not in said
        assert type(open_config(place / "saved")).__name__ == "GteConfig"


@pytest.mark.parametrize("name", ["nomic-ai/nomic-embed-text-v1.5", "Alibaba-NLP/gte-multilingual-base"])
def test_the_language_model_of_a_translated_folder_opens_too(name: str, tmp_path: Path) -> None:
    model = open_folder(build(BY_NAME[name].form, tmp_path / "published"))
    head = add_language_head(model)
    hidden = torch.randn(3, model.backbone.width)
    assert head(hidden).shape == (3, TINY["vocab_size"])


def test_a_tokenizer_that_forgets_its_end_is_made_to_keep_it(tmp_path: Path) -> None:
    """`add_eos_token` in tokenizer_config.json, which transformers' Qwen2 tokenizer does not heed."""
    ours = load(build(QWEN2, tmp_path / "said"))
    assert ours.tokenize(["cell", "cell " * 200]).last[1] == ours.tokenizer.eos_token_id
    silent = load(build(replace(QWEN2, tokenizer_says={}), tmp_path / "silent"))
    assert silent.tokenize(["cell"]).last[0] != silent.tokenizer.eos_token_id
    assert distance(ours, tmp_path / "silent") > 0.01
