"""The embeddings folder: what is in it, never half-written, and the same bytes however often its making was killed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MINILM

from kinvec import Embedder
from kinvec.contracts import KinvecError, RecipeError
from kinvec.files import vectors
from kinvec.machine import ahead
from kinvec.verbs.embed import embed
from kinvec.verbs.evaluate import evaluate

ROOT = Path(__file__).parents[1]
WORDS = "cat dog bird fish tree stone river cloud fire snow".split()


def count(texts: Sequence[str]) -> np.ndarray:
    """An encoder without a model: how often each word occurs, and the length."""
    return np.array([[t.split().count(w) for w in WORDS] + [len(t)] for t in texts], dtype=np.float32)


def rows(n: int) -> Iterator[tuple[str, str]]:
    return ((f"d{i}", " ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 7))) for i in range(n))


def lines_of(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def begun(folder: Path, n: int) -> dict[str, Any]:
    with vectors.listed(folder, {"doc": rows(n)}, [("q1", "d2", 1)]) as (beside, counts):
        return vectors.begin(folder, beside, counts, {"model": "count"})


def write(folder: Path, n: int, encode: Callable[[Sequence[str]], np.ndarray] = count) -> dict[str, Any]:
    state = begun(folder, n)
    vectors.write_side(folder, "doc", n, rows(n), partial(map, encode))
    return vectors.finish(folder, state, {"dimension": 11})


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "WINDOW", 4)
    monkeypatch.setattr(vectors, "SHARD_WINDOWS", 3)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("n", [1, 4, 11, 12, 13, 29])
def test_one_file_or_shards_hold_every_row_in_order(tmp_path: Path, n: int) -> None:
    manifest = write(tmp_path / "v", n)
    expected = count([text for _, text in rows(n)])
    names = ["doc.npy"] if n <= 12 else [f"doc-{i:05d}.npy" for i in range(-(-n // 12))]
    assert manifest["doc"] == {"rows": n, "files": names, "ids": "doc.ids"}
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == sorted(
        [*names, "doc.ids", "manifest.json", "qrels.tsv"]
    )
    side = vectors.open_vectors(tmp_path / "v", "doc")
    assert side.ids == [f"d{i}" for i in range(n)] and (np.concatenate(side.shards) == expected).all()
    assert all(shard.dtype == np.float32 for shard in side.shards)
    assert {len(shard) for shard in side.shards[:-1]} <= {12}, "shards are of equal length"
    assert vectors.open_judgements(tmp_path / "v") == {"q1": {"d2": 1}}


def test_a_file_is_what_numpy_itself_writes(tmp_path: Path) -> None:
    write(tmp_path / "v", 9)
    np.save(tmp_path / "own.npy", count([text for _, text in rows(9)]))
    assert (tmp_path / "own.npy").read_bytes() == (tmp_path / "v" / "doc.npy").read_bytes()


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("calls", range(8))
def test_stopped_after_any_window_it_continues_to_the_same_bytes(tmp_path: Path, calls: int) -> None:
    """Every window already written is kept: the second run encodes only the rest."""
    write(tmp_path / "whole", 29)
    left = calls

    def stops(texts: Sequence[str]) -> np.ndarray:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return count(texts)

    folder = tmp_path / "v"
    with pytest.raises(KeyboardInterrupt):
        write(folder, 29, stops)
    with pytest.raises(KinvecError, match="is not finished"):
        vectors.open_vectors(folder, "doc")
    state, seen = vectors.read_state(folder), list[int]()
    assert state is not None and not state["finished"]

    def counts_calls(texts: Sequence[str]) -> np.ndarray:
        seen.append(len(texts))
        return count(texts)

    vectors.write_side(folder, "doc", 29, rows(29), partial(map, counts_calls))
    vectors.finish(folder, state, {"dimension": 11})
    assert len(seen) == 8 - calls
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.usefixtures("small_windows")
def test_an_encoder_may_read_a_window_ahead_also_of_a_folder_begun(tmp_path: Path) -> None:
    write(tmp_path / "whole", 29)
    folder = tmp_path / "v"
    state = begun(folder, 29)
    vectors._write_part(folder, "doc.0000001", count([text for _, text in rows(29)][4:8]))
    told: list[tuple[int, bool]] = []
    read_ahead = partial(ahead, count, device=torch.device("cuda"))
    vectors.write_side(folder, "doc", 29, rows(29), read_ahead, lambda n, new: told.append((n, new)))
    vectors.finish(folder, state, {"dimension": 11})
    assert content(folder) == content(tmp_path / "whole")
    assert sorted(told) == [(1, True), (4, False), *[(4, True)] * 6]


@pytest.mark.usefixtures("small_windows")
def test_killed_while_a_shards_parts_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "whole", 29)
    folder = tmp_path / "v"
    state = begun(folder, 29)
    vectors.write_side(folder, "doc", 29, rows(29), partial(map, count))
    (folder / "doc.0000001.part").write_bytes(b"left behind")
    vectors.write_side(folder, "doc", 29, rows(29), partial(map, pytest.fail))
    vectors.finish(folder, state, {"dimension": 11})
    assert content(folder) == content(tmp_path / "whole")


def test_memory_does_not_grow_with_the_number_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "WINDOW", 100)
    monkeypatch.setattr(vectors, "SHARD_WINDOWS", 6)

    def peak(n: int) -> int:
        tracemalloc.start()
        write(tmp_path / str(n), n, lambda texts: np.ones((len(texts), 1024), np.float32))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(100)  # what is imported and cached at the first use
    assert peak(6000) < 1.3 * peak(600)


def test_wrong_sources_leave_nothing_behind(tmp_path: Path) -> None:
    for texts, message in (
        ([], "no doc to embed"),
        ([("a\nb", "x")], "does not fit on a line"),
        ([("", "x")], "on a line"),
    ):
        with pytest.raises(KinvecError, match=message), vectors.listed(tmp_path / "v", {"doc": texts}, ()):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    with vectors.listed(tmp_path / "v", {"doc": rows(9)}, ()) as (beside, counts):
        state = vectors.begin(tmp_path / "v", beside, counts, {})
    vectors.write_side(tmp_path / "v", "doc", 9, rows(7), partial(map, count))
    with pytest.raises(KinvecError, match="had 9 rows and then 7"):
        vectors.finish(tmp_path / "v", state, {})


def test_folders_that_are_not_ours_or_were_begun_otherwise(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(KinvecError, match="holds other things"):
        vectors.refuse_foreign(tmp_path / "photos")
    write(tmp_path / "v", 5)
    vectors.refuse_foreign(tmp_path / "v")
    state = vectors.read_state(tmp_path / "v")
    assert state is not None
    with pytest.raises(KinvecError, match="model: count → other"):
        vectors.refuse_changed(tmp_path / "v", state, {"model": "other"})


@pytest.mark.parametrize("damage", ["ids", "duplicate", "pickle", "missing"])
def test_damaged_folders_are_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "v"
    write(folder, 5)
    (folder / "manifest.json").unlink()  # as one that was made by other means, without checksums
    if damage == "ids":
        (folder / "doc.ids").write_text("d0\nd1\n")
    elif damage == "duplicate":
        (folder / "doc.ids").write_text("d0\n" * 5)
    elif damage == "pickle":
        np.save(folder / "doc.npy", np.array([{}]), allow_pickle=True)
    else:
        (folder / "doc.npy").unlink()
    with pytest.raises(
        KinvecError, match={"ids": "has 2", "duplicate": "1 different", "pickle": "plain"}.get(damage, "no vec")
    ):
        vectors.open_vectors(folder, "doc")


CHILD = f"""
import sys, time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
import numpy as np
from kinvec.files import vectors

WORDS = {WORDS}
{"".join(inspect.getsource(function) for function in (count, rows, begun, write))}
vectors.WINDOW, vectors.SHARD_WINDOWS, write_array = 4, 3, vectors.write_array

def slowly(path, array):
    write_array(path, array)
    time.sleep(0.03)

vectors.write_array = slowly
folder = Path(sys.argv[1])
state = vectors.read_state(folder)
if state is None:
    write(folder, 60)
else:
    vectors.write_side(folder, "doc", 60, rows(60), partial(map, count))
    vectors.finish(folder, state, {{"dimension": 11}})
"""


@pytest.mark.usefixtures("small_windows")
def test_killed_with_signal_9_and_run_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole", 60)
    folder, kills = tmp_path / "v", 0
    while vectors.read_state(folder) is None or not (folder / "manifest.json").exists():
        before = len(list(folder.glob("doc*"))) if folder.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, start_new_session=True)
        while process.poll() is None and kills < 2 and len(list(folder.glob("doc*"))) < before + 2:
            time.sleep(0.005)
        if kills < 2:
            os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            assert not (folder / "manifest.json").exists()
        else:
            assert process.wait() == 0
    assert kills == 2 and content(folder) == content(tmp_path / "whole")


# --- The verb, with a real model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    from kinvec import Embedder

    return Embedder.load(MINILM, precision="fp32", device="cpu")


@pytest.fixture
def loaded_once(minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinvec.embedder.Embedder.load", lambda *_, **__: minilm)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents, and 6 queries whose rows name their document."""
    folder = tmp_path_factory.mktemp("texts")
    found = [f"{WORDS[i % 10]} and {WORDS[i // 10 + 3]} in the {WORDS[(i * 7) % 10]}" for i in range(40)]
    (folder / "docs.jsonl").write_text(lines_of({"doc_id": f"d{i}", "text": text} for i, text in enumerate(found)))
    asked = [{"query_id": f"q{i}", "query": found[i * 5], "doc_id": f"d{i * 5}"} for i in range(6)]
    (folder / "queries.jsonl").write_text(lines_of(asked))
    return folder


@pytest.mark.usefixtures("loaded_once")
def test_the_verb_end_to_end(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, docs, folder = texts / "queries.jsonl", texts / "docs.jsonl", tmp_path / "v"
    encode_each, sides = Embedder.encode_each, iter(("query", "doc"))

    def stopped(self: Embedder, windows: Iterator[list[str]], prompt: str = "") -> Iterator[np.ndarray]:
        if next(sides) == "doc":
            raise KeyboardInterrupt
        return encode_each(self, windows, prompt)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Embedder, "encode_each", stopped)
        embed(MINILM, folder, queries=queries, docs=docs, precision="fp32")
    assert (folder / "query.npy").exists() and not (folder / "manifest.json").exists()
    manifest = embed(MINILM, folder, queries=queries, docs=docs, precision="fp32")
    assert (manifest["dimension"], manifest["rows"], manifest["qrels"]) == (384, {"query": 6, "doc": 40}, "qrels.tsv")
    assert "continuing" in capsys.readouterr().err
    before = content(folder)
    assert embed(MINILM, folder, queries=queries, docs=docs, precision="fp32") == manifest
    assert "is finished" in capsys.readouterr().err and content(folder) == before
    with pytest.raises(KinvecError, match="made with other settings .*doc: "):
        embed(MINILM, folder, queries=queries, docs=queries, precision="fp32")
    result = evaluate(embeddings=folder, measures=["RR@10", "R@1"])
    assert result.metrics["RR@10"] > 0.8 and result.per_query["id"] == [f"q{i}" for i in range(6)]
    embed(MINILM, folder, docs=docs, precision="fp32", force=True)
    assert sorted(p.name for p in folder.iterdir()) == ["doc.ids", "doc.npy", "manifest.json"]
    with pytest.raises(KinvecError, match="no vectors of the query side"):
        evaluate(embeddings=folder)
    with pytest.raises(RecipeError, match="nothing to embed"):
        embed(MINILM, folder)


@pytest.mark.usefixtures("loaded_once")
def test_columns_by_other_names_are_embedded_mined_and_scored(
    tmp_path: Path, main: Callable[..., tuple[int, str]], one_thread: None
) -> None:
    topics = "tides volcanoes bread violins glaciers bees trains coffee rainbows chess".split()
    rows = [{"Frage": f"what are {topic}?", "Titel": topic, "Antwort": f"all about {topic}"} for topic in topics]
    source, plain = tmp_path / "faq.jsonl", tmp_path / "plain.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text(
        "".join(json.dumps({"query": r["Frage"], "pos_doc": f"{r['Titel']} {r['Antwort']}"}) + "\n" for r in rows)
    )
    named = ["--column", "query=Frage", "--column", "pos_doc=Titel+Antwort"]
    for name, file, columns in (("named", source, named), ("plain", plain, [])):
        out = str(tmp_path / name)
        both, model = ["--queries", str(file), "--docs", str(file)], ["--model", MINILM, "--precision", "fp32"]
        assert main("embed", *model, *both, "--out", out, *columns)[0] == 0
        told = main("evaluate", "--embeddings", out, "--data", str(file), *columns, "--json")
        mined = main("mine", *model, "--data", str(file), "--out", f"{out}-mined", "--json", *columns)
        assert told[0] == mined[0] == 0
    for file in ("query.npy", "query.ids", "doc.npy", "doc.ids"):
        assert (tmp_path / "named" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    mined_rows = [(tmp_path / f"{name}-mined" / "train.jsonl").read_text() for name in ("named", "plain")]
    assert mined_rows[0] == mined_rows[1] and len(mined_rows[0].splitlines()) == len(topics)
    code, said = main("embed", *model, *both, "--out", str(tmp_path / "named"), *columns)
    assert code != 0 and "columns" in said, "other columns are other texts"


@pytest.mark.usefixtures("loaded_once")
def test_vectors_score_as_the_model_does(shared_data: Path, tmp_path: Path) -> None:
    """`evaluate --embeddings` with the data beside it equals `evaluate --model`, query by query."""
    from kinvec import tasks

    beir = tmp_path / "slice"
    (beir / "qrels").mkdir(parents=True)
    lines = (shared_data / "scifact" / "corpus.jsonl").read_text().splitlines()
    kept = sorted(lines, key=len)[:30]
    ids = [json.loads(line)["_id"] for line in kept]
    (beir / "corpus.jsonl").write_text("\n".join(kept) + "\n")
    titles = [json.loads(line)["title"] for line in kept[:5]]
    (beir / "queries.jsonl").write_text(lines_of({"_id": f"q{i}", "text": title} for i, title in enumerate(titles)))
    (beir / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{ids[i]}\t1\n" for i in range(5))
    )
    embed(MINILM, tmp_path / "v", queries=beir, docs=beir, precision="fp32")
    stored = evaluate(embeddings=tmp_path / "v", data=beir)
    direct = evaluate(MINILM, beir, out=tmp_path / "out", precision="fp32")
    assert stored.metrics == direct.metrics and stored.baselines == direct.baselines
    assert stored.per_query["top_ids"] == direct.per_query["top_ids"]
    assert tasks.load_result(tmp_path / "out") == direct


@pytest.mark.usefixtures("loaded_once")
def test_nemos_files_in_and_nemos_layout_out(texts: Path, tmp_path: Path) -> None:
    """Query rows and document rows as NeMo documents them; its folder is scored by the query rows' doc_id."""
    docs = tmp_path / "test_docs.jsonl"
    rows = map(json.loads, (texts / "docs.jsonl").read_text().splitlines())
    docs.write_text(lines_of({"pos_doc": row["text"], "doc_id": row["doc_id"]} for row in rows))
    queries, folder = texts / "queries.jsonl", tmp_path / "v"
    embed(MINILM, folder, queries=queries, docs=docs, precision="fp32")
    embed(MINILM, folder, queries=queries, docs=docs, precision="fp32", layout="nemo")  # a finished folder gets it too
    theirs = folder / "consumed_samples0"
    assert sorted(str(p.relative_to(theirs)) for p in theirs.rglob("*.*")) == [
        "test_docs/doc.ids", "test_docs/doc.npy", "test_queries/query.ids", "test_queries/query.npy",
    ]  # fmt: skip
    for name in ("test_docs/doc", "test_queries/query"):
        for suffix in (".npy", ".ids"):
            ours = folder / (name.split("/")[1] + suffix)
            assert (theirs / (name + suffix)).read_bytes() == ours.read_bytes()
    alone = tmp_path / "elsewhere"
    theirs.rename(alone)
    (alone / "test_docs").rename(alone / "test_doc")  # as its code names it
    ours = evaluate(embeddings=folder, measures=["RR@10", "nDCG@10"])
    assert evaluate(embeddings=alone, data=queries, measures=["RR@10", "nDCG@10"]).metrics == ours.metrics
    with pytest.raises(KinvecError, match="has no judgements"):
        evaluate(embeddings=alone)
    with pytest.raises(RecipeError, match="layout 'nim' is unknown; known are kinvec and nemo"):
        embed(MINILM, folder, queries=queries, layout="nim")
