"""`kinvec search`: both models' answers are theirs, vectors are kept, and what cannot be searched is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import WORDS, save_plain

from kinvec.contracts import KinvecError
from kinvec.docstrings import Pair, write_beir
from kinvec.embedder import Embedder
from kinvec.verbs import search as verb
from kinvec.verbs.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after three steps on sixty pairs of made-up texts."""
    folder = tmp_path_factory.mktemp("search")
    draws = np.random.default_rng(0)
    texts = [" ".join(draws.choice(WORDS, 9)) for _ in range(120)]
    pairs = [Pair(f"d{i}", f"g{i}", texts[i], texts[60 + i]) for i in range(60)]
    write_beir(folder / "data", pairs[:40], pairs[40:], words=9)
    save_plain("bert", folder / "model", "bert", spread=0.1)
    settings = [
        f"model={folder / 'model'}", f"data.train={folder / 'data'}", f"out={folder / 'run'}", "trainer.max_steps=3",
        "trainer.lr=0.01", "trainer.batch_size=8", "trainer.eval_every=0", "data.holdout=0", "precision=fp32",
    ]  # fmt: skip
    train(None, settings)
    return folder / "run"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_answers_are_each_models_own(run: Path, precision: str) -> None:
    found = verb.search(run, "blood cell protein", k=4, precision=precision)
    assert found["question"] == "blood cell protein"
    data = [json.loads(line) for line in (run.parent / "data" / "corpus.jsonl").read_text().splitlines()]
    for side, folder in (("base", run.parent / "model"), ("tuned", run / "model")):
        embedder = Embedder.load(folder, precision=precision)
        question = embedder.encode_queries(["blood cell protein"])
        documents = embedder.encode_documents([d["text"] for d in data])
        lengths = np.linalg.norm(question, axis=1)[:, None] * np.linalg.norm(documents, axis=1)[None]
        scores = question @ documents.T / lengths
        best = np.argsort(-scores[0])[:4]
        assert [answer["id"] for answer in found[side]] == [data[row]["_id"] for row in best]
        assert [answer["text"] for answer in found[side]] == [data[row]["text"] for row in best]
        assert [answer["score"] for answer in found[side]] == pytest.approx(scores[0][best].tolist(), abs=1e-5)
    assert found["base"] != found["tuned"]


def test_a_run_that_held_its_base_in_bf16_is_searched_in_any_precision(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(run / "model")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    text = yaml.safe_dump(recipe | {"lora": {"rank": 4, "base": "bf16"}})
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    for precision in ("fp32", "int8"):
        found = verb.search(tmp_path / "run", "blood cell protein", precision=precision)
        assert found == verb.search(run, "blood cell protein", precision=precision)


def test_vectors_are_made_once_and_again_when_they_are_not_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run / "search", ignore_errors=True)  # other tests keep vectors of other precisions there
    first = verb.search(run, "insulin and glucose", k=3)
    encoded: list[int] = []
    encode = Embedder.encode_each

    def counted(self: Embedder, windows: Iterator[list[str]], prompt: str) -> Iterator[np.ndarray]:
        for vectors in encode(self, windows, prompt):
            encoded.append(len(vectors))
            yield vectors

    monkeypatch.setattr(Embedder, "encode_each", counted)
    assert verb.search(run, "insulin and glucose", k=3) == first
    assert encoded == []
    kept = next((run / "search").iterdir())
    (kept / "manifest.json").unlink()
    (kept / "doc.npy").unlink()
    shutil.rmtree(kept)
    assert verb.search(run, "insulin and glucose", k=3) == first
    assert encoded == [60]


def test_int8_answers_from_vectors_of_its_own(run: Path) -> None:
    """Those kept in another precision are not taken for them, nor they for those."""
    exact = verb.search(run, "blood cell protein", k=60)
    rounded = verb.search(run, "blood cell protein", k=60, precision="int8")
    for side in ("base", "tuned"):
        scores = [{answer["id"]: answer["score"] for answer in found[side]} for found in (exact, rounded)]
        assert scores[0].keys() == scores[1].keys() and scores[0] != scores[1]
        assert all(abs(scores[0][one] - scores[1][one]) < 0.01 for one in scores[0])
    assert verb.search(run, "blood cell protein", k=60) == exact


def test_the_command_answers_a_pipe_line_by_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("blood cell\n\nheart risk\n"))
    verb.command(run, k=2, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in lines] == ["blood cell", "heart risk"]
    assert all(len(line[side]) == 2 for line in lines for side in ("base", "tuned"))


def test_the_table_shows_both_sides(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    verb.command(run, "mouse [bold]gene[/bold]", k=2)
    shown = capsys.readouterr().out
    assert "mouse [bold]gene[/bold]" in shown
    assert "base" in shown and "tuned" in shown
    answers = verb.search(run, "mouse [bold]gene[/bold]", k=2)
    assert all(answer["id"] in shown for side in ("base", "tuned") for answer in answers[side])


def test_more_answers_than_documents_are_all_documents(run: Path) -> None:
    assert len(verb.search(run, "cell", k=500)["tuned"]) == 60


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(KinvecError, match="no run folder"):
        verb.search(tmp_path, "anything")
    shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("model", "search"))
    with pytest.raises(KinvecError, match="no tuned model yet"):
        verb.search(tmp_path / "begun", "anything")
    assert not (tmp_path / "begun" / "search").exists()
