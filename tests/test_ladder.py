"""The ladder benchmark, with a tiny decoder and a few steps: every rung is there, is what it says, and is made once."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kinvec import Embedder, files
from kinvec.contracts import KinvecError

pytestmark = pytest.mark.slow

SENTENCES = (
    "A man is playing a large flute on the old stage .",
    "The river rose above the bridge in the night , and the village was cut off .",
    "Two women are dancing in the rain outside the station .",
    "The painter moved to the coast in 1911 , where he taught at a small school .",
)
PASSAGES = (
    "The bridge was opened in 1932 and carries both trains and cars over the harbour.",
    "Copper melts at 1085 degrees and has been worked by people for ten thousand years.",
    "The heron stands still in shallow water and strikes when a fish comes near.",
)
PAIRS = [
    (5.0, SENTENCES[0], "A man plays a flute ."),
    (2.0, "A cat sits on a wall .", "A dog sits on a wall ."),
    (0.0, "A boat is at sea .", "The price of oil fell ."),
]


def squad(passages: tuple[str, ...]) -> str:
    rows = [
        {
            "context": text,
            "qas": [{"id": text[:9], "question": f"What of {text[4:15]}?", "answers": [{"text": text[:5]}]}],
        }
        for text in passages
    ]
    return json.dumps({"data": [{"title": "t", "paragraphs": rows}]})


def write_shared(folder: Path) -> Path:
    """As ../shared/data has them; a sentence and a passage are judged and stand among the training texts as well."""
    for name in ("wikisplit", "tydiqa_en", "stsb"):
        (folder / name).mkdir(parents=True)
    (folder / "wikisplit" / "tune.tsv").write_text("".join(f"{text}\tsplit\n" for text in SENTENCES))
    (folder / "tydiqa_en" / "tydiqa.goldp.en.train.json").write_text(squad(PASSAGES))
    (folder / "tydiqa_en" / "tydiqa.goldp.en.dev.json").write_text(squad(PASSAGES[:1]))
    lines = [f"main\tMSRvid\t2012\t{i}\t{score}\t{a}\t{b}\n" for i, (score, a, b) in enumerate(PAIRS)]
    (folder / "stsb" / "sts-test.csv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def ladder() -> Iterator[ModuleType]:
    """The benchmark as a module, without the published model, which would take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        module = importlib.import_module("ladder")
        patch.setattr(module, "MINILM", "no_such_package")
        yield module


@pytest.fixture(scope="module")
def climbed(ladder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole ladder, climbed once."""
    folder = tmp_path_factory.mktemp("ladder")
    shared = write_shared(folder / "shared")
    result = ladder.climb(folder / "work", ladder.SMALL, shared, folder / "results")
    return SimpleNamespace(work=folder / "work", shared=shared, results=folder / "results", result=result)


def test_every_rung_is_measured_and_compared(climbed: Any) -> None:
    (path,) = climbed.results.glob("ladder-*.json")
    written = json.loads(path.read_text())
    assert written == json.loads(json.dumps(climbed.result))
    rows = written["rungs"]
    assert [*rows] == ["bm25", "random", "clm", "switched", "mntp", "simcse", "supervised", "direct", "causal"]
    assert [*rows.pop("bm25")["scores"]] == ["docstrings", "tydi"]
    for row in rows.values():
        assert [*row["scores"]] == ["docstrings", "tydi", "stsb"]
        assert all(score["low"] <= score["value"] <= score["high"] for score in row["scores"].values())
        if row["against"]:
            before = rows[row["against"]]["scores"]
            for column, found in row["differences"].items():
                assert found["difference"] == row["scores"][column]["value"] - before[column]["value"]
    assert {name: stage["steps"] for name, stage in written["stages"].items()} == {
        "clm": 4, "ladder/mntp": 3, "ladder/simcse": 2, "ladder/supervised": 2, "direct/supervised": 2,
        "causal/supervised": 2,
    }  # fmt: skip


def test_the_rungs_have_the_attention_that_they_claim(ladder: ModuleType, climbed: Any) -> None:
    causal = {"random", "clm", "causal"}
    for name, rung in ladder.rungs_of(climbed.work).items():
        if name != "bm25":
            model = Embedder.load(rung.model)
            assert (model.attention == "causal") == (name in causal), name
            assert model.pooling == ("mean",) and model.max_length == ladder.TOKENS
    chain = Embedder.load(climbed.work / "ladder" / "supervised" / "model").lineage
    assert [stage["objective"] for stage in chain] == ["clm", "mntp", "simcse", "contrastive"]


def test_nothing_that_judges_is_trained_on(ladder: ModuleType, climbed: Any) -> None:
    judged = {
        *SENTENCES[:1],
        *PASSAGES[:1],
        f"What of {PASSAGES[0][4:15]}?",
        *(text for _, *two in PAIRS for text in two),
    }
    for name in ("corpus", "queries"):
        lines = (climbed.work / "data" / "docstrings" / f"{name}.jsonl").read_text().splitlines()
        judged |= {json.loads(line)["text"] for line in lines}
    keys = set(files.text_keys(judged).tolist())
    seen = set()
    for name in ("texts.jsonl", "pairs.jsonl", "sentences/train.jsonl"):
        for line in (climbed.work / "data" / name).read_text().splitlines():
            seen |= set(json.loads(line).values())
    assert SENTENCES[1] in seen and PASSAGES[1] in seen
    assert keys.isdisjoint(files.text_keys(seen).tolist())
    assert climbed.result["data"]["judged_and_dropped"] == 2


def test_a_second_call_trains_nothing_and_measures_nothing(
    ladder: ModuleType, climbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def made() -> dict[Path, int]:
        recipes = climbed.work / "recipes"  # written at every call
        return {p: p.stat().st_mtime_ns for p in climbed.work.rglob("*") if p.is_file() and recipes not in p.parents}

    before = made()
    again = ladder.climb(climbed.work, ladder.SMALL, climbed.shared, climbed.results)
    assert made() == before
    assert again["rungs"] == climbed.result["rungs"] and again["stages"] == climbed.result["stages"]
    printed = capsys.readouterr().out
    assert all(f"\n| {row['title']} | " in printed for row in again["rungs"].values())


def test_data_of_another_size_are_refused(ladder: ModuleType, climbed: Any) -> None:
    with pytest.raises(KinvecError, match="holds data of another size"):
        ladder.climb(climbed.work, ladder.Size(), climbed.shared, climbed.results)


def test_without_the_shared_data_docstrings_alone_are_used_and_it_says_so(
    ladder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ladder.prepare(tmp_path / "data", tmp_path / "nowhere", ladder.SMALL)
    said = capsys.readouterr().err
    assert "no TyDi questions" in said and "no WikiSplit sentences" in said
    assert counts["texts"] == counts["pairs"] > 100
    assert [*ladder.tasks_of(tmp_path / "data", tmp_path / "nowhere")] == ["docstrings"]
