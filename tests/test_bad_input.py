"""What is wrong is one sentence with file, line and remedy, under the designed exit code, and nothing is left over."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SmallDisk

pytestmark = pytest.mark.usefixtures("one_thread")

Main = Callable[..., tuple[int, str]]
GOOD = [
    json.dumps({"query": f"question number {i}", "pos_doc": f"answer {i}", "neg_doc": [f"another text {i}"]})
    for i in range(40)
]


def with_line(number: int, text: str) -> bytes:
    """Forty good lines, of which one is replaced."""
    return "".join(f"{text if place == number else good}\n" for place, good in enumerate(GOOD, 1)).encode()


BAD: dict[str, tuple[bytes | None, int | None, str]] = {  # file → its bytes, the line to be named, what is said
    "broken.jsonl": (with_line(7, '{"query": "x", "pos_doc": '), 7, "JSON"),
    "cut.jsonl": (with_line(0, "") + b'{"query": "x", "pos', 41, "JSON"),
    "missing.jsonl": (with_line(12, '{"query": "x"}'), 12, "pos_doc"),
    "number.jsonl": (with_line(13, '{"query": 5, "pos_doc": "d"}'), 13, "'query' is a number"),
    "null.jsonl": (with_line(32, '{"query": null, "pos_doc": "d"}'), 32, "query"),
    "empty.jsonl": (with_line(29, '{"query": "x", "pos_doc": "  "}'), 29, "'pos_doc' is empty"),
    "none.jsonl": (with_line(30, '{"query": "x", "pos_doc": []}'), 30, "pos_doc"),
    "nested.jsonl": (with_line(24, '{"query": "x", "pos_doc": [["a"]]}'), 24, "pos_doc"),
    "list.jsonl": (with_line(8, '["query", "pos_doc"]'), 8, ""),
    "latin1.jsonl": (with_line(0, "") + '{"query": "café", "pos_doc": "d"}\n'.encode("latin-1"), 41, "UTF-8"),
    "surrogate.jsonl": (with_line(9, '{"query": "\\ud83d", "pos_doc": "d"}'), 9, "surrogate"),
    "id.jsonl": (with_line(5, '{"query": "x", "query_id": 5, "pos_doc": "d"}'), 5, "ids are texts"),
    "scores.jsonl": (with_line(6, '{"query": "x", "pos_doc": ["a", "b"], "pos_score": [1]}'), 6, "pos_score"),
    "nothing.jsonl": (b"", None, ""),
    "array.json": (("[" + ",".join(GOOD[:5]) + ",").encode(), None, "JSON"),
    "table.csv": (b"query,pos_doc\nwhat,this\nonly one\n", 3, ""),
    "absent.jsonl": (None, None, ""),
    "texts.txt": (b"one text\nanother text\n", None, "texts"),
}


@pytest.fixture
def arguments(tiny_folder: Path, tiny_pairs: Path, tmp_path: Path) -> list[str]:
    return ["train", f"model={tiny_folder}", f"data.train={tiny_pairs}", f"out={tmp_path / 'run'}", "threads=1"]


def one_sentence(said: str) -> str:
    """The only thing printed: one line, an error, no traceback."""
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in said, said
    assert len(lines[0]) < 500
    return lines[0].removeprefix("error: ")


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named_before_a_model_is_opened(
    name: str, arguments: list[str], tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, line, word = BAD[name]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("KINVEC_CACHE", str(tmp_path / "cache"))
    code, said = main(*arguments, f"data.train={file}", f"model={tmp_path / 'no-such-model'}")
    sentence = one_sentence(said)
    assert code == 1 and name in sentence and word in sentence
    assert re.search(r"no-such-model", sentence) is None
    if line is not None:
        assert f"{name}:{line}" in sentence
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    copies = {path for path in left if path.endswith((".arrow", ".json"))} if name == "texts.txt" else set()
    assert left - copies == ({name} if content is not None else set())  # no run folder, no half-written copy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", [name for name, (content, line, _) in BAD.items() if line is not None and name != "cut.jsonl"]
)
def test_skip_bad_drops_and_counts_them_instead(name: str, arguments: list[str], tmp_path: Path, main: Main) -> None:
    content = BAD[name][0]
    assert content is not None
    rows = b"".join(b"q%d,answer %d\n" % (i, i) for i in range(20)) if name.endswith(".csv") else b""
    (tmp_path / name).write_bytes(content + rows)
    options = ["data.skip_bad=true", "trainer.max_steps=1", "evaluate=false"]
    code, said = main(*arguments, f"data.train={tmp_path / name}", *options)
    assert code == 0, said
    assert json.loads((tmp_path / "run" / "data.json").read_text())["counts"]["dropped"] == 1
    assert "1 bad rows were dropped" in said


RECIPES: dict[str, tuple[list[str], str]] = {
    "a mistyped key": (
        ["trainer.batchsize=8"],
        r"unknown recipe key 'trainer\.batchsize'; did you mean 'trainer\.batch_size'\?",
    ),
    "a key of nothing": (["wibble=1"], r"unknown recipe key 'wibble'"),
    "a word for a number": (["trainer.lr=fast"], r"recipe key 'trainer\.lr': .*number"),
    "a rate below zero": (["trainer.lr=-1"], r"recipe key 'trainer\.lr': .*greater than 0"),
    "no steps": (["trainer.max_steps=0"], r"recipe key 'trainer\.max_steps': .*greater than or equal to 1"),
    "an unknown choice": (["trainer.schedule=steep"], r"recipe key 'trainer\.schedule': .*linear"),
    "no setting": (["faster"], r"'faster' is no setting; write key=value"),
    "an unknown objective": (["objective.name=hope"], r"objective\.name: 'hope' is unknown"),
    "no amount of memory": (["trainer.memory_budget=much"], r"'much' is no amount of memory"),
}


@pytest.mark.parametrize("key", ["model", "data.train", "out"])
def test_a_recipe_without_what_it_needs(key: str, arguments: list[str], tmp_path: Path, main: Main) -> None:
    code, said = main(*[argument for argument in arguments if not argument.startswith(f"{key}=")])
    assert code == 2 and f"'{key}' is not set; add for example {key}=" in one_sentence(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", RECIPES)
def test_a_wrong_recipe_is_exit_code_2(what: str, arguments: list[str], tmp_path: Path, main: Main) -> None:
    settings, pattern = RECIPES[what]
    code, said = main(*arguments, *settings)
    assert code == 2 and re.search(pattern, one_sentence(said)), said
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_names_its_line_and_an_unknown_name_what_there_is(
    arguments: list[str], tmp_path: Path, main: Main
) -> None:
    (tmp_path / "mine.yaml").write_text("trainer:\n  lr: 1e-5\n bad: indent\n")
    code, said = main("train", str(tmp_path / "mine.yaml"), *arguments[1:])
    assert code == 2 and re.search(r"mine\.yaml:\d: not valid YAML", one_sentence(said))
    code, said = main("train", str(tmp_path / "other.yaml"), *arguments[1:])
    assert code == 2 and "there is no such recipe file" in one_sentence(said)
    code, said = main("train", "scifat", *arguments[1:])
    assert code == 2 and "'scifat' is neither a shipped recipe (" in one_sentence(said) and "scifact" in said


def broken_model(folder: Path, source: Path, what: str) -> Path:
    """A copy of the model folder without its weights, with half of them, or with a pickle in their place."""
    for path in source.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    if what == "half":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "none":
        weights.unlink()
    elif what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "empty":
        weights.write_bytes(b"")
    return folder


@pytest.mark.parametrize("what", ["none", "half", "pickle", "empty"])
def test_a_model_folder_without_its_weights(
    what: str, arguments: list[str], tiny_folder: Path, tmp_path: Path, main: Main
) -> None:
    model = broken_model(tmp_path / "broken", tiny_folder, what)
    code, said = main(*arguments, f"model={model}")
    sentence = one_sentence(said)
    assert code == 1 and str(model) in sentence and ("safetensors" in sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("{tmp}/nowhere", "there is no such model folder"),
        ("pkg:nothing_at_all", "pip install"),
        ("{tmp}", "not a model folder"),
    ],
)
def test_a_model_that_is_not_there(model: str, word: str, arguments: list[str], tmp_path: Path, main: Main) -> None:
    code, said = main(*arguments, f"model={model.format(tmp=tmp_path)}")
    assert code == 1 and word in one_sentence(said)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made(arguments: list[str], tmp_path: Path, main: Main) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, said = main(*arguments, f"out={out}")
        assert code == 1 and "file" in one_sentence(said)
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_shows_the_traceback(arguments: list[str], tmp_path: Path, main: Main) -> None:
    from kinvec.contracts import KinvecError

    with pytest.raises(KinvecError, match="absent"):
        main(*arguments, f"data.train={tmp_path / 'absent.jsonl'}", "--debug")


# ---- a full disk ----


def sha(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_disk_that_is_full_at_any_moment_loses_nothing(
    disk: SmallDisk, arguments: list[str], tmp_path: Path, main: Main
) -> None:
    """The disk grows until the run fits. Before, one sentence at each size; at last the weights of a run with room."""
    argv = [*arguments, "trainer.max_steps=6", "trainer.save_every=2", "trainer.batch_size=8"]
    assert main(*argv)[0] == 0
    needed = sum(len(data or b"") for data in everything(tmp_path / "run").values()) // 1024
    run, stages = disk.folder / "run", set()
    for size in range(8, 3 * needed, max(needed // 16, 1)):
        disk.resize(size)
        code, said = main(*argv, f"out={run}")
        if code == 0:
            break
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(errors) == 1 and "Traceback" not in said, said
        assert "the disk is full" in errors[0] and "run the same command again" in errors[0]
        stages.add("no run" if not run.exists() else "results" if not (run / "checkpoints").exists() else "training")
        if run.exists():
            assert {"run.json", "recipe.yaml", "environment.json", "data.json", "doctor.json"} <= {
                p.name for p in run.iterdir()
            }
        assert not (run / "model" / "kinvec.json").exists() or sha(run) == sha(tmp_path / "run")
    assert code == 0 and sha(run) == sha(tmp_path / "run")
    assert {"no run", "training"} <= stages, "the sizes passed over a stage"
    kinds = [sorted(everything(place)) for place in (run, tmp_path / "run")]
    assert kinds[0] == kinds[1]


def test_a_full_disk_under_the_copies_of_data_leaves_none(
    disk: SmallDisk, arguments: list[str], main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINVEC_CACHE", str(disk.folder))
    code, said = main(*arguments, "trainer.max_steps=1", "evaluate=false")
    assert code == 1 and "the disk is full" in one_sentence(said)
    assert [path for path in disk.folder.rglob("*") if path.is_file()] == []
