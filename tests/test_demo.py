"""The demo: pairs from docstrings, a split that leaks nothing, a size that follows the machine, and the whole path."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kinvec import docstrings, files
from kinvec.contracts import KinvecError
from kinvec.docstrings import Pair, collect, distinct, pairs_in, split, split_docstring, write_beir
from kinvec.recipe import load_recipe
from kinvec.verbs import demo as verb

LENGTHS = {40: (14.0, 58.0), 60: (14.0, 85.0), 90: (14.0, 120.0), 140: (14.0, 170.0)}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return collect(["networkx", "joblib"])


def test_a_docstring_becomes_a_query_and_a_document_without_name_and_summary() -> None:
    text = """Return the shortest path between two nodes.

    Uses :func:`~graphs.dijkstra_path` where the edges of ``G`` have weights. nx.shortest_path(G) is the call.

    Parameters
    ----------
    G : graph, in which shortest_path is sought; Return the shortest path between two nodes. A graph may be directed.
    """
    found = split_docstring(text, "shortest_path")
    assert found is not None
    query, document = found
    assert query == "Return the shortest path between two nodes."
    assert "shortest_path" not in document
    assert query not in document
    assert document.startswith("Uses graphs.dijkstra_path where the edges of G have weights. (G) is the call.")
    assert "---" not in document


@pytest.mark.parametrize("text", ["", "One line only, without a body.", "Too short.\n\n" + "word " * 30, "a " * 60])
def test_a_docstring_that_says_too_little_is_left_out(text: str) -> None:
    assert split_docstring(text, "thing") is None


def test_files_are_parsed_and_never_run(tmp_path: Path) -> None:
    body = " ".join(f"word{i}" for i in range(30))
    file = tmp_path / "danger.py"
    method = '    def {}(self):\n        """Act upon the {} thing.\n\n        {}\n        """\n\n'
    methods = method.format("act", "given", body) + method.format("_hidden", "hidden", body)
    file.write_text(f'raise SystemExit("imported")\n\nclass Thing:\n{methods}')
    (found,) = pairs_in(file, "package.sub.danger")
    assert found == Pair("package.sub.danger.Thing.act", "package.sub", "Act upon the given thing.", body)
    file.write_text("def broken(:\n")
    assert pairs_in(file, "package.sub.danger") == []


def test_a_real_package_gives_hundreds_of_distinct_pairs(pairs: list[Pair]) -> None:
    assert len(pairs) > 500
    for part in ("name", "query", "document"):
        assert len({getattr(pair, part) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.query not in pair.document
        assert pair.name.rpartition(".")[2] not in pair.document.split()
    assert docstrings.counts(pairs).keys() == {"networkx", "stdlib"}  # joblib is none of the listed packages
    assert collect(["joblib", "networkx"]) == pairs


def test_what_repeats_is_dropped() -> None:
    same = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    first = Pair("a.b.c", "a.b", "What it does for you.", same + "and more")
    others = [
        Pair("a.b.d", "a.b", "what it does, for you", "quite another text"),
        Pair("a.b.e", "a.b", "Another query it is.", same + "and something else"),
        Pair("a.b.c", "a.b", "The name again, twice.", "a third text"),
    ]
    assert distinct([first, *others]) == [first]
    assert len(distinct([first, Pair("x.y.z", "x.y", "Nothing in common here.", "a text of its own")])) == 2


def test_the_split_leaks_nothing(pairs: list[Pair], tmp_path: Path) -> None:
    train, test = split(pairs, 0.3)
    assert sorted(train + test, key=lambda p: p.name) == sorted(pairs, key=lambda p: p.name)
    assert {p.group for p in train}.isdisjoint({p.group for p in test})
    assert 0.05 * len(pairs) < len(test) <= 0.3 * len(pairs)
    folder = write_beir(tmp_path / "data", train, test, words=40)
    table = files.open_data(folder)
    search = files.open_retrieval(folder, split="test")
    trained = [table.example(i) for i in range(len(table))]
    judged = {search.corpus.ids.index(d) for found in search.qrels.values() for d in found}
    assert {files.text_key(e.query) for e in trained}.isdisjoint({files.text_key(q) for q in search.queries.values()})
    assert {files.text_key(e.positives[0]) for e in trained}.isdisjoint(
        {files.text_key(search.corpus.texts[place]) for place in judged}
    )
    assert (len(trained), len(search.queries), len(search.corpus)) == (len(train), len(test), len(pairs))
    assert max(len(text.split()) for text in search.corpus.texts) == 40
    assert set(search.queries).isdisjoint(search.corpus.ids)


@given(
    seconds=st.floats(5, 2000), more=st.floats(1, 5), encode=st.floats(200, 2e6), train=st.floats(50, 5e5),
    available=st.tuples(st.integers(300, 9000), st.integers(50, 4000)),
)  # fmt: skip
@example(seconds=542.0, more=1.625, encode=454.0, train=324.0, available=(750, 50))  # 50 pairs fewer were enough
def test_the_size_grows_with_time_and_speed_and_fits(
    seconds: float, more: float, encode: float, train: float, available: tuple[int, int]
) -> None:
    speed = verb.Speed(encode, train)
    size = verb.size_problem(seconds, speed, LENGTHS, available)
    assert size.train <= available[0]
    assert size.test <= available[1]
    if size.train > verb.FEWEST_PAIRS:
        assert verb.run_seconds(size.train, size.test, LENGTHS[size.words], speed) <= seconds
    for larger in (
        verb.size_problem(seconds * more, speed, LENGTHS, available),
        verb.size_problem(seconds, verb.Speed(encode * more, train * more), LENGTHS, available),
    ):
        assert (larger.words, larger.train) >= (size.words, size.train)
        assert larger.train >= min(size.train, verb.ENOUGH_PAIRS)


def test_what_a_run_costs_is_reckoned_by_the_recipe_that_is_shipped() -> None:
    recipe = load_recipe("demo", ["out=o", "data.train=d"])
    assert (recipe.data.holdout, recipe.data.distractors) == (verb.HOLDOUT, verb.DISTRACTORS)
    assert (recipe.trainer.batch_size, recipe.trainer.epochs) == (verb.BATCH_SIZE, 1)
    assert recipe.model == f"pkg:{verb.MODEL_PACKAGE}"


def test_a_fast_machine_gets_long_documents_and_a_slow_one_many_pairs() -> None:
    slow = verb.size_problem(190.0, verb.Speed(4500.0, 1300.0), LENGTHS, (8400, 3600))
    fast = verb.size_problem(190.0, verb.Speed(400_000.0, 90_000.0), LENGTHS, (8400, 3600))
    assert slow.words == 40
    assert 1000 < slow.train < 4000
    assert (fast.words, fast.train) == (140, 8400)


@pytest.mark.usefixtures("one_thread")
def test_the_whole_path_on_a_small_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", ("networkx",))
    for name, value in (("FEWEST_PAIRS", 40), ("TEST_QUERIES", (16, 16)), ("DEV_EVALUATIONS", 1)):
        monkeypatch.setattr(verb, name, value)
    monkeypatch.setattr(verb, "measure", partial(verb.measure, seconds=0.2))
    told = verb.demo(tmp_path / "demo", minutes=0.01, threads=1)
    assert "for about 0.01 minutes: 40 training pairs, and 16 test queries over 56 documents" in capsys.readouterr().err
    (result,) = told["results"]
    assert result["task"] == "docstrings"
    assert result["queries"] == 16
    verb.show(told)
    shown = capsys.readouterr().out
    assert f"{result['metrics']['nDCG@10']['tuned']:.4f}" in shown
    assert "kinvec search" in shown
    written = json.loads((tmp_path / "demo" / "data" / "demo.json").read_text())
    assert written["size"] == told["problem"]["size"]
    again = verb.demo(tmp_path / "demo", minutes=3.0, threads=1)
    assert "finished" in capsys.readouterr().err
    assert again["results"] == told["results"]


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(KinvecError, match="is a file"):
        verb.demo(tmp_path / "thesis.txt")
    with pytest.raises(KinvecError, match="thesis.txt"):
        verb.demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
