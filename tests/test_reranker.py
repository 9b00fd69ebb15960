"""Cross-encoders: scores as sentence-transformers has them, limits on their scores, nothing asked twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mining import beir, rows_of  # noqa: F401 - a fixture
from tiny_models import WORDS, config_of, save_plain, tokenizer_of
from transformers import AutoModelForSequenceClassification

from kinvec.contracts import KinvecError
from kinvec.mining import MiningSettings
from kinvec.reranker import open_reranker, remembering
from kinvec.verbs.mine import mine

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [(" ".join(WORDS[i : i + 1 + i % 5]), " ".join(WORDS[i + 3 : i + 4 + 2 * (i % 30)])) for i in range(40)]


@pytest.fixture(params=[1, 2])
def cross_encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny BERT with random weights that reads pairs, with one output or two."""
    torch.manual_seed(0)
    config = config_of("bert")
    config.num_labels, config.initializer_range = request.param, 0.5
    folder = tmp_path / "cross"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def test_scores_are_those_of_sentence_transformers(cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    judge, _ = open_reranker(str(cross_encoder), "fp32")
    ours = np.array([judge(query, [document])[0] for query, document in PAIRS])
    theirs = CrossEncoder(str(cross_encoder)).predict(PAIRS)
    theirs = theirs if theirs.ndim == 1 else np.exp(theirs)[:, 1] / np.exp(theirs).sum(1)
    assert np.abs(ours - theirs).max() < 1e-5 and ours.std() > 0.01
    together = judge(PAIRS[7][0], [document for _, document in PAIRS])
    alone = [judge(PAIRS[7][0], [document])[0] for _, document in PAIRS]
    assert np.abs(together - alone).max() < 1e-5  # padding changes nothing


def test_what_is_no_reranker_is_refused(tmp_path: Path) -> None:
    save_plain("bert", tmp_path / "plain", "bert")
    with pytest.raises(KinvecError, match="no trained head for relevance; a reranker is a sequence classifier"):
        open_reranker(str(tmp_path / "plain"))
    with pytest.raises(KinvecError, match="neither a model folder here nor reachable"):
        open_reranker("nobody/nothing")


def test_nothing_is_asked_twice_after_a_kill(tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(query: str, documents: list[str]) -> np.ndarray:
        asked.append(query)
        return np.array([len(query) / 7, *map(len, documents)], dtype=np.float32)

    path = tmp_path / "said.jsonl"
    with remembering(judge, path) as first:
        before = [first(query, ["x", "yy"]) for query in ("a", "bb")]
    with open(path, "a") as file:
        file.write("[0.25, 1")  # killed here
    with remembering(judge, path) as again:
        after = [again(query, ["x", "yy"]) for query in ("a", "bb", "ccc")]
    assert asked == ["a", "bb", "ccc"] and all((x == y).all() for x, y in zip(before, after, strict=False))
    assert len(path.read_text().splitlines()) == 3
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n[\xff", 1))  # damaged
    with remembering(judge, path) as mended:
        assert [list(mended(query, ["x", "yy"])) for query in ("a", "bb", "ccc")] == [list(row) for row in after]
    assert asked == ["a", "bb", "ccc", "bb", "ccc"] and len(path.read_text().splitlines()) == 3


def test_the_limits_are_on_its_scores(tmp_path: Path, tiny_folder: Path, beir: Path, cross_encoder: Path) -> None:  # noqa: F811
    """What it holds as relevant as the positive is a suspect; the order is still the model's."""
    settings = MiningSettings(negatives=5, depth=30, relative=0.9)
    told = mine(tiny_folder, beir, tmp_path / "out", settings, reranker=str(cross_encoder), precision="fp32")
    plain = MiningSettings(negatives=30, depth=30, relative=None)
    mine(tiny_folder, beir, tmp_path / "plain", plain, precision="fp32")
    judge, _ = open_reranker(str(cross_encoder), "fp32")
    by_model = {row["query"]: row["neg_id"] for row in rows_of(tmp_path / "plain")}
    few = 0
    for row in rows_of(tmp_path / "out"):
        positive = judge(row["query"], row["pos_doc"])
        assert row["pos_score"] == pytest.approx(positive, abs=1e-5)
        assert row["neg_score"] == pytest.approx(judge(row["query"], row["neg_doc"]), abs=1e-5) or not row["neg_doc"]
        assert all(score <= 0.9 * min(row["pos_score"]) + 1e-5 for score in row["neg_score"])
        ranks = [by_model[row["query"]].index(name) for name in row["neg_id"]]
        assert ranks == sorted(ranks)
        few += len(ranks) < 5
    assert told["too_few"] == few and told["suspected"] > 0
    said = (tmp_path / "out" / "reranker.jsonl").read_text().splitlines()
    assert len(said) == 40 and all(0 <= score <= 1 for line in said for score in json.loads(line))
    with pytest.raises(KinvecError, match="reranker: "):
        mine(tiny_folder, beir, tmp_path / "out", settings, precision="fp32")
