"""Raw text cut into training texts: units, repeats, scraps, the held-out share; nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MINILM

from kinvec.contracts import KinvecError, RecipeError
from kinvec.files import read_documents
from kinvec.verbs.prepare import prepare

ARTICLES = {
    "one.txt": "Първо изречение на статията. Второ? Да, второ!\n\nA new paragraph goes on here, e.g. like this.\n",
    "two.txt": "A second article has one paragraph.\nIt runs over two lines.\n\n  \n\n"
    "a new PARAGRAPH goes on here, e.g. like this.\n\nshort\n",
}


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    folder = tmp_path / "raw" / "inner"
    folder.mkdir(parents=True)
    for name, text in ARTICLES.items():
        (folder / name).write_text(text, "utf-8")
    return tmp_path / "raw"


def texts_of(folder: Path, name: str = "train") -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_paragraphs_of_a_folder_of_text_files(articles: Path, tmp_path: Path) -> None:
    found = prepare(articles, out=tmp_path / "out", holdout=0.0)
    assert texts_of(tmp_path / "out") == [
        "Първо изречение на статията. Второ? Да, второ!",
        "A new paragraph goes on here, e.g. like this.",
        "A second article has one paragraph. It runs over two lines.",
    ]
    assert (found["articles"], found["train"], found["dev"], found["too_short"], found["repeated"]) == (2, 3, 0, 1, 1)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == found
    assert not (tmp_path / "out" / "dev.jsonl").exists()


def test_sentences_and_short_ones(articles: Path, tmp_path: Path) -> None:
    prepare(articles, out=tmp_path / "out", unit="sentence", holdout=0.0, shortest=6)
    assert texts_of(tmp_path / "out") == [
        "Първо изречение на статията.", "Второ?", "Да, второ!", "A new paragraph goes on here, e.g. like this.",
        "A second article has one paragraph.", "It runs over two lines.",
    ]  # fmt: skip


@pytest.mark.parametrize("across", [False, True])
def test_blocks_have_so_many_tokens_and_lose_nothing(tmp_path: Path, across: bool) -> None:
    from transformers import AutoTokenizer

    from kinvec.backbone import find_model

    tokenizer = AutoTokenizer.from_pretrained(find_model(MINILM))
    source = tmp_path / "docs.jsonl"
    given = [" ".join(str(1000 + 40 * number + i) for i in range(5 + 2 * number)) for number in range(9)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
    prepare(source, out=tmp_path / "out", unit="block", model=MINILM, tokens=8, across=across, shortest=1, holdout=0.0)
    found = texts_of(tmp_path / "out")
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found]
    assert max(sizes) == 8 and (across == (min(sizes[:-1]) > 3))  # an article's end is a short block, unless crossed
    every = tokenizer(" ".join(given), add_special_tokens=False)["input_ids"]
    kept = [number for text in found for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert kept == every


def test_what_is_held_out_depends_on_the_text_alone(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "scifact" / "corpus.jsonl"
    found = prepare(source, out=tmp_path / "a", unit="sentence", holdout=0.1)
    share = found["dev"] / (found["dev"] + found["train"])
    assert found["train"] > 40_000 and 0.09 < share < 0.11
    lines = source.read_text("utf-8").splitlines()
    (tmp_path / "half.jsonl").write_text("\n".join(lines[::-2]), "utf-8")
    prepare(tmp_path / "half.jsonl", out=tmp_path / "b", unit="sentence", holdout=0.1)
    held = set(texts_of(tmp_path / "a", "dev"))
    assert set(texts_of(tmp_path / "b", "dev")) <= held and not set(texts_of(tmp_path / "b")) & held


def test_prepared_texts_are_read_as_texts_and_made_again(articles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the folder is ours, so it is replaced
        prepare(articles, out=out, holdout=0.0)
    assert len(list(read_documents(out / "train.jsonl"))) == 3
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_column_by_another_name(tmp_path: Path, main: Callable[..., tuple]) -> None:
    source, out = tmp_path / "pages.csv", tmp_path / "out"
    source.write_text("Seite,Inhalt\n1,a first paragraph of words\n2,another one with other words\n")
    assert main("prepare", str(source), "--out", str(out), "--holdout", "0", "--column", "text=Inhalt")[0] == 0
    assert [text for _, text in read_documents(out / "train.jsonl")] == [
        "a first paragraph of words", "another one with other words",
    ]  # fmt: skip


def test_what_is_wrong_is_said_and_leaves_nothing(articles: Path, tmp_path: Path, main: Callable[..., tuple]) -> None:
    out = tmp_path / "out"
    with pytest.raises(KinvecError, match="no text of at least 2000 characters is left"):
        prepare(articles, out=out, shortest=2000)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(KinvecError, match="holds other things than prepared texts"):
        prepare(articles, out=tmp_path / "thesis")
    for settings, said in (
        ({"unit": "word"}, "unit 'word' is unknown"), ({"unit": "block"}, "add --model"),
        ({"holdout": 1.0}, "--holdout is a share"), ({"tokens": 0}, "--tokens is at least 1"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            prepare(articles, out=out, **settings)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="nothing to prepare"):
        prepare(out=out)
    code, told = main("prepare", str(articles), "--out", str(out))
    assert code == 0 and "2 articles → 3 training and 0 dev texts" in told
