"""What dev says beside the ranking: against references written out pair by pair, and in a run's log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinvec import Embedder, pipeline, tasks
from kinvec.contracts import Corpus, RetrievalData
from kinvec.files import open_retrieval
from kinvec.objectives import ObjectiveSettings, make_objective
from kinvec.validation import Listener, validation

pytestmark = pytest.mark.usefixtures("one_thread")


class Table:
    """An encoder of fixed vectors, of any length, that counts the texts it is given."""

    name, similarity = "table", "cosine"

    def __init__(self) -> None:
        self.vectors: dict[str, np.ndarray] = {}
        self.given: list[str] = []
        self.draw = np.random.default_rng(0)

    def of(self, text: str) -> np.ndarray:
        return self.vectors.setdefault(text, self.draw.normal(size=5).astype(np.float32))

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.given += texts
        return np.stack([self.of(text) for text in texts])

    encode_documents = encode_queries


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def problem(negatives: bool) -> RetrievalData:
    """Seven queries; the first has two positives, the last none; q1's positive is q2's as well."""
    corpus = Corpus([f"d{i}" for i in range(12)], [f"document {i}" for i in range(12)])
    qrels: dict[str, dict[str, int]] = {f"q{i}": {f"d{i}": 1} for i in range(6)}
    qrels["q0"]["d7"] = 2
    qrels["q2"]["d1"] = 1
    qrels["q6"] = {"d3": 0}
    if negatives:
        qrels["q1"] |= {"d8": 0, "d9": 0}
        qrels["q4"] |= {"d10": 0, "gone": 0}
    else:
        del qrels["q6"]
    return RetrievalData(corpus, {f"q{i}": f"query {i}" for i in range(7)}, qrels, "f", "made", "dev")


@pytest.mark.parametrize("negatives", [True, False])
def test_cosines_and_loss_are_those_of_a_plain_loop(negatives: bool) -> None:
    data, encoder = problem(negatives), Table()
    heard = Listener(encoder, data)
    ranked = tasks.retrieval(data, heard, baseline=False)
    found = validation(data, heard, make_objective(ObjectiveSettings(temperature=0.1)), 4, 1)
    assert len(encoder.given) == len(data.qrels) + 12  # every text once
    assert ranked.metrics == tasks.retrieval(data, encoder, baseline=False).metrics

    def near(query: str, document: str) -> float:
        return cosine(encoder.of(data.queries[query]), encoder.of(f"document {document[1:]}"))

    there = {q: {d: g for d, g in grades.items() if d != "gone"} for q, grades in data.qrels.items()}
    positive = [
        np.mean([near(q, d) for d, g in judged.items() if g]) for q, judged in there.items() if any(judged.values())
    ]
    if negatives:
        chosen = [[d for d, g in judged.items() if not g] for judged in there.values()]
    else:
        chosen = [[d for d in data.corpus.ids if not judged.get(d)] for judged in there.values()]
    negative = [np.mean([near(q, d) for d in names]) for q, names in zip(there, chosen, strict=True) if names]
    assert found["cosine_positive"] == pytest.approx(np.mean(positive), abs=1e-6)
    assert found["cosine_negative"] == pytest.approx(np.mean(negative), abs=1e-6)
    assert found["cosine_difference"] == pytest.approx(np.mean(positive) - np.mean(negative), abs=1e-6)

    losses = []
    for batch in (["q0", "q1", "q2"], ["q3", "q4", "q5"]):  # six with a positive, at most four at a time
        documents = [f"d{q[1:]}" for q in batch]
        hard = {"q1": ["d8"], "q4": ["d10"]} if negatives else {}
        documents += [d for q in batch for d in hard.get(q, [])]
        for row, query in enumerate(batch):
            kept = [d for place, d in enumerate(documents) if place == row or not there[query].get(d)]
            scores = torch.tensor([near(query, d) / 0.1 for d in kept])
            losses.append(float(torch.logsumexp(scores, 0) - scores[kept.index(documents[row])]))
    assert found["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_no_loss_where_the_objective_has_none_for_dev() -> None:
    data, encoder = problem(negatives=False), Table()
    heard = Listener(encoder, data)
    tasks.retrieval(data, heard, baseline=False)
    for settings in (ObjectiveSettings(name="simcse"), ObjectiveSettings(in_batch=False)):
        found = validation(data, heard, make_objective(settings), 4, 1)
        assert list(found) == ["cosine_positive", "cosine_negative", "cosine_difference"]
    unjudged = RetrievalData(data.corpus, data.queries, {"q0": {"gone": 1}}, "f")
    heard = Listener(encoder, unjudged)
    tasks.retrieval(unjudged, heard, baseline=False)
    assert validation(unjudged, heard, make_objective(ObjectiveSettings()), 4, 1) == {}


def test_a_run_logs_them_beside_the_measure_that_chooses(
    tmp_path: Path, tiny_folder: Path, tiny_pairs: Path, main: Callable[..., tuple[int, str]], monkeypatch: Any
) -> None:
    asked: list[int] = []
    real, develop = Embedder.encode, pipeline._develop

    def counted(self: Embedder, texts: Sequence[str], **more: Any) -> Any:
        asked.append(len(texts))
        return real(self, texts, **more)

    def developed(one: Any, encoder: Any, batch_size: int) -> dict[str, float]:
        asked.clear()  # of the last evaluation: the plan's was one, too
        return develop(one, encoder, batch_size)

    monkeypatch.setattr(Embedder, "encode", counted)
    monkeypatch.setattr(pipeline, "_develop", developed)
    settings = ["trainer.batch_size=16", "trainer.max_steps=2", "trainer.eval_every=2", "evaluate=false", "threads=1"]
    code, said = main(
        "train", f"model={tiny_folder}", f"data.train={tiny_pairs}", f"data.dev={tiny_pairs}", *settings,
        "precision=fp32", f"out={tmp_path / 'run'}",
    )  # fmt: skip
    assert code == 0, said
    dev = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["dev"]
    assert next(iter(dev)) == "nDCG@10" and len(asked) == 2
    assert f"step 2: dev nDCG@10 {dev['nDCG@10']:.4f}, val_loss {dev['val_loss']:.4f}" in said
    data = open_retrieval(str(tiny_pairs), split="dev")
    heard = Listener(Embedder.load(tmp_path / "run" / "model", precision="fp32"), data)
    tasks.retrieval(data, heard, baseline=False)
    again = validation(data, heard, make_objective(ObjectiveSettings()), 16, 4)
    assert {key: dev[key] for key in again} == pytest.approx(again, abs=1e-5) and len(again) == 4
    assert dev["cosine_positive"] - dev["cosine_negative"] == pytest.approx(dev["cosine_difference"])
