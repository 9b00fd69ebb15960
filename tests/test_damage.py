"""Disks and files that fail: full, read-only, flipped bits, cut short, gone meanwhile; clocks that jump; SIGTERM.

Each time one clear sentence, and the same command afterwards ends as if nothing had happened.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest
from conftest import SmallDisk, flip
from tiny_models import WORDS

from kinvec.files import content_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")

Main = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 documents of random words, and 20 queries, each the beginning of a document."""
    folder, draw = tmp_path_factory.mktemp("damage") / "beir", random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=9)) for _ in range(80)]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", texts), ("queries", [text[:30] for text in texts[:20]])):
        lines = (json.dumps({"_id": f"{name[0]}{i}", "text": text}) + "\n" for i, text in enumerate(rows))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    asked = ({"query_id": f"q{i}", "query": text[:30], "doc_id": f"c{i}"} for i, text in enumerate(texts[:20]))
    (folder.parent / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    judged = "".join(f"q{i}\tc{i}\t1\n" for i in range(20))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


@pytest.fixture
def commands(tiny_folder: Path, beir: Path, tiny_pairs: Path) -> dict[str, list[str]]:
    """The four verbs, without their output: it is the last argument."""
    common = ["--threads", "1", "--precision", "fp32"]
    short = ["batch_size=8", "max_steps=4", "save_every=2", "warmup=0"]
    queries = str(beir.parent / "asked.jsonl")
    return {
        "train": ["train", f"model={tiny_folder}", f"data.train={tiny_pairs}", "threads=1", "evaluate=false",
                  *(f"trainer.{setting}" for setting in short)],
        "mine": ["mine", "--model", str(tiny_folder), "--data", str(beir), *common, "--out"],
        "embed": ["embed", "--model", str(tiny_folder), "--queries", queries, "--docs", str(beir), *common, "--out"],
        "convert": ["convert", str(tiny_folder)],
    }  # fmt: skip


VERBS = ("train", "mine", "embed", "convert")
OUTPUT = {"train": "run", "mine": "mined", "embed": "vectors", "convert": "model.nemo"}


def into(verb: str, commands: dict[str, list[str]], folder: Path) -> tuple[list[str], Path]:
    """The command with its output in the folder, and the output."""
    output = folder / OUTPUT[verb]
    return [*commands[verb], f"out={output}" if verb == "train" else str(output)], output


def content(output: Path) -> dict[str, str]:
    """The files whose bytes are promised, by place."""
    varying = ("training.json", "summary.json", "log.jsonl", "report.html", "recipe.yaml", "checkpoints")
    if output.is_file():
        return {output.name: content_fingerprint(output)}
    return {
        path.relative_to(output).as_posix(): content_fingerprint(path)
        for path in sorted(output.rglob("*"))
        if path.is_file() and not set(varying) & {path.name, path.parent.parent.name}
    }


def error_of(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


# ---- disks ----


@pytest.mark.parametrize("verb", VERBS[1:])  # train: test_bad_input.py
def test_a_disk_that_is_full_at_any_moment_loses_nothing(
    verb: str, disk: SmallDisk, commands: dict[str, list[str]], tmp_path: Path, main: Main
) -> None:
    argv, whole = into(verb, commands, tmp_path)
    assert main(*argv)[0] == 0
    argv, output = into(verb, commands, disk.folder)
    needed = (sum(p.stat().st_size for p in whole.rglob("*")) if whole.is_dir() else whole.stat().st_size) // 1024
    refused = 0
    for size in range(8, 6 * needed, max(needed // 3, 8)):
        disk.resize(size)
        code, said = main(*argv)
        if code == 0:
            break
        assert code == 1 and "the disk is full" in error_of(said) and "run the same command again" in said
        refused += 1
    assert code == 0 and refused > 1
    assert content(output) == content(whole)
    assert [path.name for path in disk.folder.iterdir()] == [output.name]


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_read_only_is_said(
    verb: str, disk: SmallDisk, commands: dict[str, list[str]], main: Main
) -> None:
    disk.resize(20_000)
    argv, output = into(verb, commands, disk.folder)
    assert disk.mount("remount,ro")
    code, said = main(*argv)
    assert code == 1 and "the disk is read-only" in error_of(said) and str(disk.folder) in said
    assert disk.mount("remount,rw") and main(*argv)[0] == 0
    before = content(output)
    assert disk.mount("remount,ro")
    code, said = main(*argv)  # finished: nothing has to be written, but by convert, which makes it again
    assert code == (1 if verb == "convert" else 0), said
    assert content(output) == before


# ---- files ----


@pytest.mark.parametrize(
    ("file", "change"),
    [("doc.npy", flip), ("query.npy", lambda path: path.write_bytes(path.read_bytes()[:-5])), ("doc.ids", flip),
     ("qrels.tsv", flip), ("doc.npy", Path.unlink)],
    ids=["flipped", "cut short", "ids", "judgements", "gone"],
)  # fmt: skip
def test_damaged_vectors_are_refused_and_made_again(
    file: str, change: Callable[[Path], object], commands: dict[str, list[str]], tmp_path: Path, main: Main
) -> None:
    argv, folder = into("embed", commands, tmp_path)
    assert main(*argv)[0] == 0
    before = content(folder)
    other = "query.npy" if file.startswith("doc") else "doc.npy"
    untouched = (folder / other).stat().st_mtime_ns
    change(folder / file)
    code, said = main("evaluate", "--embeddings", str(folder))
    assert code == 1 and f"{folder / file}: damaged or gone; the same kinvec embed" in error_of(said)
    code, said = main(*argv)
    assert code == 0 and f"{file}: damaged or gone; made again" in said
    assert content(folder) == before
    assert ((folder / other).stat().st_mtime_ns == untouched) == file.endswith(".npy"), "only what was damaged"
    code, said = main(*argv)
    assert code == 0 and "is finished" in said


def test_vectors_stored_in_fewer_bytes_are_made_again_as_a_whole(
    commands: dict[str, list[str]], tmp_path: Path, main: Main
) -> None:
    argv, folder = into("embed", commands, tmp_path)
    argv = [*argv[:-2], "--stored", "int8", "--dimensions", "16", *argv[-2:]]
    assert main(*argv)[0] == 0
    before = content(folder)
    for file in ("doc.npy", "query.npy", "ranges.npy"):
        flip(folder / file, 0.9)
        code, said = main(*argv)
        assert code == 0 and f"{file}: damaged or gone; made again" in said and content(folder) == before


def test_a_damaged_part_of_unfinished_vectors_is_encoded_again(tmp_path: Path) -> None:
    from test_embed import count, rows

    from kinvec.files import vectors

    def make(folder: Path, stop: bool = False) -> None:
        state = vectors.read_state(folder)
        if state is None:
            with vectors.listed(folder, {"doc": rows(40)}, ()) as (beside, n):
                state = vectors.begin(folder, beside, n, {})
        calls = iter(range(100))

        def encode(texts: list[str]) -> np.ndarray:
            if stop and next(calls) == 3:
                raise KeyboardInterrupt
            return count(texts)

        vectors.write_side(folder, "doc", 40, rows(40), partial(map, encode))
        vectors.finish(folder, state, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "WINDOW", 8)
        make(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "v", stop=True)
        parts = sorted((tmp_path / "v").glob("*.part"))
        assert len(parts) == 3
        flip(parts[0], 0.8)
        parts[1].write_bytes(parts[1].read_bytes()[:-9])
        make(tmp_path / "v")
    assert content(tmp_path / "v") == content(tmp_path / "whole")


def test_damaged_mined_data_are_refused_and_mined_again(
    commands: dict[str, list[str]], tmp_path: Path, main: Main
) -> None:
    argv, folder = into("mine", commands, tmp_path)
    assert main(*argv)[0] == 0
    before = content(folder)
    for file in ("train.jsonl", "audit.json", "vectors/doc.npy"):
        flip(folder / file, 0.3)
        if file == "train.jsonl":
            train = [*commands["train"][:2], f"data.train={folder}", f"out={tmp_path / 'run'}", "--dry-run"]
            code, said = main(*train)
            assert code == 1 and f"{folder / file}: not as kinvec mine wrote it" in error_of(said)
        code, said = main(*argv)
        assert code == 0, said
        if file.startswith("vectors"):  # of no use any more, and therefore not looked at until it is
            assert "is finished" in said
            (folder / "train.jsonl").unlink()
            code, said = main(*argv)
            assert code == 0 and "doc.npy: damaged or gone; made again" in said
        else:
            assert f"{file}: damaged or gone; mined again" in said
        assert content(folder) == before
    (folder / "mine.json").write_text("{")
    code, said = main(*argv)
    assert code == 1 and "mine.json: damaged" in error_of(said) and "--force" in said
    assert main(*argv, "--force")[0] == 0 and content(folder) == before


def test_a_damaged_copy_of_the_data_is_made_again(
    commands: dict[str, list[str]], tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINVEC_CACHE", str(tmp_path / "cache"))
    argv, run = into("train", commands, tmp_path)
    assert main(*argv)[0] == 0
    whole = content(run)
    for file in (tmp_path / "cache").rglob("*.arrow"):
        flip(file)
    stale = tmp_path / "cache" / "data" / ".x.arrow.1234.tmp"  # of a process that was killed long ago
    stale.write_bytes(b"half a table")
    import os

    os.utime(stale, (0, 0))
    code, said = main(*argv, "--force")
    assert code == 0 and "the copy of the data is damaged; made again" in said and content(run) == whole
    assert not stale.exists()


def test_a_damaged_model_is_refused_and_that_of_a_run_is_made_again(
    commands: dict[str, list[str]], tmp_path: Path, main: Main
) -> None:
    argv, run = into("train", commands, tmp_path)
    assert main(*argv)[0] == 0
    before, embed = content(run), into("embed", commands, tmp_path)[0]
    embed[2] = str(run / "model")
    for file in ("model.safetensors", "tokenizer.json"):
        flip(run / "model" / file, 0.7)
        code, said = main(*embed)
        assert code == 1 and f"{run / 'model' / file}: damaged (its checksum is not the one in kinv" in error_of(said)
        code, said = main(*argv)
        assert code == 0 and "made again from the last checkpoint" in said and content(run) == before
    shutil.rmtree(run / "checkpoints")
    flip(run / "model" / "model.safetensors", 0.7)
    code, said = main(*argv)
    assert code == 1 and "damaged" in error_of(said) and "make the model again" in said


@pytest.mark.parametrize("file", ["summary.json", "training.json", "run.json", "environment.json"])
def test_a_damaged_note_of_a_run_is_made_again_or_named(
    file: str, commands: dict[str, list[str]], tmp_path: Path, main: Main
) -> None:
    argv, run = into("train", commands, tmp_path)
    assert main(*argv)[0] == 0
    before = content(run)
    (run / file).write_bytes(b"\xff{" + (run / file).read_bytes()[2:])
    if file == "training.json":
        (run / "summary.json").unlink()
    code, said = main(*argv)
    if file in ("summary.json", "training.json"):
        assert code == 0 and content(run) == before and json.loads((run / file).read_text())
    else:
        assert code == 1 and f"{run / file}: damaged or gone" in error_of(said) and "--force" in said


def test_a_source_that_vanishes_is_named_and_once_back_it_goes_on(
    commands: dict[str, list[str]], tmp_path: Path, main: Main, beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing of the texts and their encoding."""
    from kinvec.files import vectors

    source, begin = tmp_path / "beir", vectors.begin
    shutil.copytree(beir, source)
    argv, folder = into(
        "embed", {"embed": [part.replace(str(beir), str(source)) for part in commands["embed"]]}, tmp_path
    )

    def begin_and_lose(*given: object) -> object:
        made = begin(*given)
        shutil.move(source, tmp_path / "elsewhere")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(vectors, "begin", begin_and_lose)
        code, said = main(*argv)
    assert code == 1 and str(source) in error_of(said) and ("is gone" in said or "no such file" in said)
    shutil.move(tmp_path / "elsewhere", source)
    code, said = main(*argv)
    assert code == 0 and f"continuing {folder}" in said
    argv, whole = into("embed", commands, tmp_path / "whole")
    assert main(*argv)[0] == 0 and content(folder) == content(whole)


def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path: Path) -> None:
    """Between the two renames: the old one goes back."""
    from kinvec.files import sweep, sweep_beside

    for old in (tmp_path / ".run.old.77.tmp", tmp_path / "in" / ".model.old.77.tmp"):
        old.mkdir(parents=True)
        (old / "weights").write_text("precious")
    (tmp_path / ".run.new.77.tmp").mkdir()
    (tmp_path / ".runner.old.77.tmp").mkdir()  # another's
    sweep_beside(tmp_path / "run")
    sweep(tmp_path / "in")
    assert (
        (tmp_path / "run" / "weights").read_text() == (tmp_path / "in" / "model" / "weights").read_text() == "precious"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".runner.old.77.tmp", "in", "run"]


# ---- clocks and signals ----


def test_a_clock_that_jumps_changes_nothing(
    commands: dict[str, list[str]], tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of day goes back by a day at every look; what is measured comes from clocks that cannot be set."""
    outputs = []
    for folder in ("calm", "jumping"):
        outputs.append({})
        for verb in VERBS[:3]:
            argv, output = into(verb, commands, tmp_path / folder)
            code, said = main(*argv)
            assert code == 0, said
            outputs[-1][verb] = content(output)
        now = iter(range(2_000_000_000, 0, -86_400))
        monkeypatch.setattr(time, "time", lambda now=now: float(next(now)))
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in (tmp_path / "jumping" / "run" / "log.jsonl").read_text().splitlines()]
    assert all(row["tokens_per_s"] > 0 and row["eta_s"] >= 0 for row in rows)
    assert json.loads((tmp_path / "jumping" / "run" / "training.json").read_text())["seconds"] >= 0


@pytest.mark.parametrize("verb", VERBS[1:])  # train: test_train_command.py
def test_sigterm_ends_every_verb_with_one_sentence_and_the_same_command_goes_on(
    verb: str, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    argv, output = into(verb, commands, tmp_path)
    begun = {"mine": output / "mine.json", "embed": output / "progress.json"}
    command = command_line.start(argv, tmp_path / "said")
    while command.process.is_alive() and not (
        begun[verb].exists() if verb in begun else list(tmp_path.glob(f".{OUTPUT[verb]}.*.work"))
    ):
        time.sleep(0.001)
    code = command.kill(signal.SIGTERM)
    left = [path.name for path in tmp_path.rglob(".*")]
    if code != 0:  # a fast machine may have finished
        kept = "begins again; nothing half-made is left" if verb == "convert" else "continues where it was"
        assert code == 130 and command.said.count(f"stopped; the same command {kept}.") == 1, command.said
        assert "Traceback" not in command.said and not left
    assert command_line.start(argv, tmp_path / "said").wait() == 0, command.said
    whole, expected = into(verb, commands, tmp_path / "whole")
    assert command_line.start(whole, tmp_path / "said").wait() == 0
    assert content(output) == content(expected)
