"""Hard negatives: exact, never a known positive or its duplicate, within the limits, the same after any kill."""

from __future__ import annotations

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinvec.auditing import audit
from kinvec.contracts import Corpus, KinvecError, RecipeError, RetrievalData
from kinvec.files import normalise, open_data
from kinvec.mining import Mined, MiningSettings, ceiling, known, mine, take
from kinvec.verbs.embed import embed
from kinvec.verbs.mine import mine as mine_verb

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("red", "blue", "green", "grey")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    """Few texts, so that documents repeat each other and the queries; few directions, so that scores tie."""
    texts = draw(
        st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map(" ".join), min_size=3, max_size=14)
    )
    spaced = [draw(st.sampled_from([text, text.upper(), f"  {text.replace(' ', '   ')}"])) for text in texts]
    ids = [f"d{number}" for number in range(len(texts))]
    asked = draw(st.lists(st.sampled_from(["red", "what is red", "What  is RED", "who"]), min_size=1, max_size=4))
    queries = {f"q{number}": text for number, text in enumerate(asked)}
    qrels = {
        query: {doc: draw(st.integers(0, 2)) for doc in draw(st.sets(st.sampled_from(ids), min_size=1, max_size=3))}
        for query in queries
    }
    for judged in qrels.values():
        judged[draw(st.sampled_from(sorted(judged)))] = 1
    vectors = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    return ids, spaced, queries, qrels, [draw(vectors) for _ in queries], [draw(vectors) for _ in ids]


@given(
    problems(), st.integers(1, 4), st.integers(0, 2), st.integers(1, 6), st.sampled_from([None, 0.5, 0.95]), st.data()
)
def test_negatives_equal_a_reference_that_looks_at_every_pair(
    problem: tuple[Any, ...], negatives: int, skip: int, depth: int, relative: float | None, data: st.DataObject
) -> None:
    """By id and by text, over all queries of the same text; in the order of score, then id; within rank and limit."""
    ids, spaced, asked, qrels, *both = problem
    judged = RetrievalData(Corpus(ids, spaced), asked, qrels, "f")
    queries, documents = (np.array(side, dtype=np.float32) for side in both)
    cut = data.draw(st.integers(0, len(documents)))
    settings = MiningSettings(negatives=negatives, skip=skip, depth=depth, relative=relative)
    found = list(mine(judged, known(judged), queries, [documents[:cut], documents[cut:]], settings))
    assert [mined.query for mined in found] == list(range(len(judged.qrels)))
    exact = queries.astype(np.float64) @ documents.astype(np.float64).T
    texts = [normalise(text) for text in spaced]
    of_text: dict[str, set[str]] = {}
    for query, grades in judged.qrels.items():
        of_text.setdefault(normalise(judged.queries[query]), set()).update(
            d for d, grade in grades.items() if grade > 0
        )
    for row, (query, mined) in enumerate(zip(judged.qrels, found, strict=True)):
        own = normalise(judged.queries[query])
        barred = {texts[ids.index(doc)] for doc in of_text[own]} | {own}
        lowest = min(exact[row, ids.index(doc)] for doc, grade in judged.qrels[query].items() if grade > 0)
        free = [d for d in range(len(ids)) if texts[d] not in barred]
        free.sort(key=lambda d: ids[d], reverse=True)
        free.sort(key=lambda d: -exact[row, d])
        window = free[skip : skip + depth]
        limit = ceiling(float(lowest), settings)
        allowed = [d for d in free if exact[row, d] <= limit]
        within = [d for d in window if d in allowed][:negatives]
        deeper = [d for d in allowed if d not in within] if len(within) < len(window) else []
        assert mined.negatives == (within + deeper)[:negatives]
        assert mined.scores == [exact[row, d] for d in mined.negatives]
        above = [d for d in window if exact[row, d] > limit]
        assert (mined.suspected, mined.suspect) == (len(above), (above[0], exact[row, above[0]]) if above else None)
        assert mined.positive_scores == [exact[row, d] for d in mined.positives]


def test_the_ceiling_is_the_strictest_limit_and_below_the_positive() -> None:
    def of(positive: float, **given: Any) -> float:
        return ceiling(positive, MiningSettings(**{"relative": None, **given}))

    assert of(0.8) == np.inf
    assert of(0.8, relative=0.95) == pytest.approx(0.76) and of(-0.8, relative=0.95) == pytest.approx(-0.84)
    assert of(0.8, relative=0.95, margin=0.1) == pytest.approx(0.7) and of(0.8, margin=0.1, highest=0.5) == 0.5


def numbered(count: int) -> RetrievalData:
    corpus = Corpus([f"d{i:03d}" for i in range(count)], [f"document {i} of word{i % 7}" for i in range(count)])
    queries = {f"q{i}": f"query {i} of word{i}" for i in range(7)}
    return RetrievalData(corpus, queries, {f"q{i}": {f"d{i:03d}": 1} for i in range(7)}, "f")


def searched(**given: Any) -> list[Mined]:
    data, draw = numbered(200), np.random.default_rng(0)
    queries, documents = (draw.normal(size=(n, 16)).astype(np.float32) for n in (7, 200))
    return list(mine(data, known(data), queries, [documents], MiningSettings(**{"relative": None, **given})))


def test_a_random_draw_is_of_the_window_and_the_same_for_a_seed() -> None:
    window = [mined.negatives for mined in searched(negatives=50, depth=50)]
    drawn = [mined.negatives for mined in searched(draw="random", depth=50)]
    assert all(len(own) == 4 and set(own) < set(all_) for own, all_ in zip(drawn, window, strict=True))
    assert all(
        [all_.index(row) for row in own] == sorted(all_.index(row) for row in own)
        for own, all_ in zip(drawn, window, strict=True)
    )
    assert drawn == [mined.negatives for mined in searched(draw="random", depth=50)]
    assert drawn != [mined.negatives for mined in searched(draw="random", depth=50, seed=1)]
    assert [mined.negatives for mined in searched(skip=10, negatives=5)] == [own[10:15] for own in window]


def test_bm25_brings_candidates_that_the_model_does_not() -> None:
    """Query i shares its rarest word with every seventh document; the model's vectors know nothing of words."""
    alone, both = searched(negatives=8, depth=10), searched(negatives=8, depth=10, lexical=True)
    for query, (dense, mixed) in enumerate(zip(alone, both, strict=True)):
        assert {row % 7 for row in mixed.negatives if mixed.sources[mixed.negatives.index(row)] == "BM25"} == {query}
        assert mixed.sources[0] in ("model", "both") and mixed.negatives[0] == dense.negatives[0]
        assert 3 <= mixed.sources.count("BM25") <= 4 and len(set(mixed.negatives)) == 8
        assert mixed.sources.count("BM25") + len(set(mixed.negatives) & set(dense.negatives)) >= 8


def test_rows_are_taken_across_shards() -> None:
    matrix = np.arange(30, dtype=np.float32).reshape(10, 3)
    rows = np.array([9, 0, 4, 3, 4])
    assert (take([matrix[:4], matrix[4:4], matrix[4:]], rows) == matrix[rows]).all()


def test_a_positive_that_is_no_document_is_an_error() -> None:
    data = RetrievalData(Corpus(["a"], ["x"]), {"q": "y"}, {"q": {"b": 1}}, "f")
    with pytest.raises(KinvecError, match="document 'b' is judged relevant but is not in the corpus"):
        known(data)


def test_the_audit_counts_lists_and_names(tmp_path: Path) -> None:
    data = numbered(20)
    mined = [
        Mined(0, [0], [0.9], [8, 9], [0.5, 0.4], ["model", "BM25"], 2, (6, 0.99)),
        Mined(1, [1], [0.7], [8], [0.6], ["model"], 1, (5, 0.68)),
        Mined(2, [2], [0.8], [], [], [], 0, None),
    ]
    told = audit(data, mined, MiningSettings(negatives=2))
    assert (told["queries"], told["negatives"], told["too_few"], told["suspected"]) == (3, 3, 2, 3)
    assert told["mean_scores"] == {"positives": 0.8, "negatives": 0.5}
    assert [suspect["doc_id"] for suspect in told["suspects"]] == ["d006", "d005"]  # farthest above its positive first
    assert [(hub["doc_id"], hub["queries"]) for hub in told["hubs"]] == [("d008", 2)]
    assert sum(told["histogram"]["positives"]) == sum(told["histogram"]["negatives"]) == 3
    assert told["sources"] == {"model": pytest.approx(2 / 3), "BM25": pytest.approx(1 / 3)}


# ---- the verb ----


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """60 documents of words; the text of some is there twice, and one positive only under other spaces."""
    folder, draw = tmp_path / "beir", random.Random(1)
    (folder / "qrels").mkdir(parents=True)
    from tiny_models import WORDS as VOCABULARY

    texts = [" ".join(draw.sample(VOCABULARY, 6)) for _ in range(50)]
    texts += [f"  {text.upper()} " for text in texts[:10]]
    queries = [" ".join(text.split()[:4]) for text in texts[:20]]
    for name, rows in (("corpus", texts), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"_id": f"{name[0]}{i}", "text": text}) + "\n" for i, text in enumerate(rows))
        )
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\tc{i}\t1" for i in range(20))]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_what_is_mined_is_training_data(tmp_path: Path, tiny_folder: Path, beir: Path) -> None:
    told = mine_verb(
        tiny_folder, beir, tmp_path / "mined", MiningSettings(negatives=3, relative=None), precision="fp32"
    )
    rows = rows_of(tmp_path / "mined")
    assert len(rows) == told["queries"] == 20 and told["negatives"] == 60 and told["too_few"] == 0
    for number, row in enumerate(rows):
        assert row["query_id"] == f"q{number}" and row["pos_id"] == [f"c{number}"]
        assert len(set(row["neg_id"])) == 3 and row["neg_score"] == sorted(row["neg_score"], reverse=True)
        assert normalise(row["pos_doc"][0]) not in map(normalise, row["neg_doc"])
    assert json.loads((tmp_path / "mined" / "audit.json").read_text()) == json.loads(json.dumps(told))
    for place in (tmp_path / "mined", tmp_path / "mined" / "train.jsonl"):
        table = open_data(place)
        assert (
            table.kind == "retrieval" and len(table) == 20 and table.example(4).negatives == tuple(rows[4]["neg_doc"])
        )


def test_vectors_that_are_there_and_little_memory_give_the_same_negatives(
    tmp_path: Path, tiny_folder: Path, beir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the order of the vectors; judged by their own ids, refused where they are of other data."""
    settings = MiningSettings(negatives=3)
    mine_verb(tiny_folder, beir, tmp_path / "whole", settings, precision="fp32", memory="64GiB")
    mine_verb(tiny_folder, beir, tmp_path / "small", settings, precision="fp32", memory="100MiB")
    assert re.search(r"--memory is 0\.1 GiB, and this search takes \d\.\d GiB", capsys.readouterr().err)
    assert rows_of(tmp_path / "small") == rows_of(tmp_path / "whole")
    embed(
        tiny_folder, tmp_path / "vectors", queries=beir / "queries.jsonl", docs=beir / "corpus.jsonl", precision="fp32"
    )
    lines = (beir / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "corpus.jsonl").write_text("".join(reversed(lines)))
    docs = tmp_path / "other" / "corpus.jsonl"
    embed(tiny_folder, tmp_path / "reversed", queries=beir / "queries.jsonl", docs=docs, precision="fp32")
    for name in ("vectors", "reversed"):
        mine_verb(None, beir, tmp_path / f"of-{name}", settings, embeddings=tmp_path / name)
        for mined, expected in zip(rows_of(tmp_path / f"of-{name}"), rows_of(tmp_path / "whole"), strict=True):
            assert mined == expected
    (tmp_path / "other" / "corpus.jsonl").write_text("".join(lines[:-1]))
    embed(tiny_folder, tmp_path / "fewer", queries=beir / "queries.jsonl", docs=docs, precision="fp32")
    with pytest.raises(KinvecError, match="vectors of 59 documents, and the data have 60"):
        mine_verb(None, beir, tmp_path / "of-fewer", settings, embeddings=tmp_path / "fewer")
    with pytest.raises(RecipeError, match="either --model NAME or --embeddings FOLDER"):
        mine_verb(None, beir, tmp_path / "of-none", settings)


def test_few_queries_at_a_time_find_what_many_do() -> None:
    rng = np.random.default_rng(0)
    data = RetrievalData(
        Corpus([f"d{i}" for i in range(200)], [f"text {i}" for i in range(200)]),
        {f"q{i}": f"asked {i}" for i in range(30)}, {f"q{i}": {f"d{i}": 1} for i in range(30)}, "f",
    )  # fmt: skip
    queries, documents = (rng.normal(size=(n, 8)).astype(np.float32) for n in (30, 200))
    found = [list(mine(data, known(data), queries, [documents], MiningSettings(), at_once=n)) for n in (1, 7, 30)]
    assert found[0] == found[1] == found[2]


def test_a_finished_folder_is_left_and_one_of_other_settings_refused(
    tmp_path: Path, tiny_folder: Path, beir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mined"
    first = mine_verb(tiny_folder, beir, out, precision="fp32")
    written = (out / "train.jsonl").stat().st_mtime_ns
    assert mine_verb(tiny_folder, beir, out, precision="fp32") == first
    assert "is finished" in capsys.readouterr().err and (out / "train.jsonl").stat().st_mtime_ns == written
    with pytest.raises(KinvecError, match=r"other settings \(settings\.negatives: 4 → 2\).*--force"):
        mine_verb(tiny_folder, beir, out, MiningSettings(negatives=2), precision="fp32")
    vectors = (out / "vectors" / "doc.npy").stat().st_mtime_ns
    assert (
        mine_verb(tiny_folder, beir, out, MiningSettings(negatives=2), precision="fp32", force=True)["negatives"] <= 40
    )
    assert (out / "vectors" / "doc.npy").stat().st_mtime_ns == vectors  # the model and the data are the same
    (beir / "corpus.jsonl").write_text((beir / "corpus.jsonl").read_text().replace("c59", "c58x"))
    with pytest.raises(KinvecError, match="data: "):
        mine_verb(tiny_folder, beir, out, MiningSettings(negatives=2), precision="fp32")
    mine_verb(tiny_folder, beir, out, MiningSettings(negatives=2), precision="fp32", force=True)
    assert "vectors there are of another model or other texts" in capsys.readouterr().err
    assert (out / "vectors" / "doc.npy").stat().st_mtime_ns != vectors
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(KinvecError, match="holds other things than mined data"):
        mine_verb(tiny_folder, beir, tmp_path / "mine", precision="fp32")


def test_killed_again_and_again_it_ends_with_the_same_file(tmp_path: Path, tiny_folder: Path, beir: Path) -> None:
    argv = ["mine", "--model", str(tiny_folder), "--data", str(beir), "--threads", "1", "--bm25", "--draw", "random"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command_line.start([*argv, "--out", str(whole)], tmp_path / "said").wait() == 0
    draw, ends = random.Random(0), []
    for file in ("mine.json", "vectors/progress.json", "vectors/doc.npy", "train.jsonl", "audit.json"):
        command = command_line.start([*argv, "--out", str(killed)], tmp_path / "said")
        command.wait_for(killed / file, 0)
        command.process.join(draw.uniform(0, 0.02))
        ends.append(command.kill())
    assert -signal.SIGKILL in ends
    last = command_line.start([*argv, "--out", str(killed)], tmp_path / "said")
    assert last.wait() == 0, last.said
    for file in ("train.jsonl", "audit.json", "manifest.json", "vectors/doc.npy"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    left = [path for path in killed.rglob("*") if path.name.startswith(".")]
    assert not left


@pytest.mark.parametrize(("given", "said"), [(["--draw", "best"], "draw"), (["--relative", "2"], "relative")])
def test_wrong_settings_are_said(given: list[str], said: str, tmp_path: Path) -> None:
    import typer

    from kinvec.verbs.mine import command

    app = typer.Typer()
    app.command()(command)
    with pytest.raises(RecipeError, match=said):
        typer.main.get_command(app).main(
            ["--model", "m", "--data", "d", "--out", str(tmp_path), *given], standalone_mode=False
        )
