"""`make kills`: `train`, `mine`, `embed` and `convert` killed at random moments; nothing may be lost or half-valid.

A case begins in an empty folder. The command is killed with SIGKILL, started again, sometimes killed again, and at
last left to finish. Half of the kills come at a moment of the clock, drawn evenly from the time an undisturbed run
takes; the others a few milliseconds after a drawn change of what lies in the folder, which is where files are written
and renamed. After every kill all that claims to be finished is opened and compared with the undisturbed run; at the end
every file is, and nothing else may be left. Each case is a line of `cases.jsonl` in the work folder: the same command
goes on where it was stopped, and case i is the same whatever came before. It waits while there is a file of the name in
KINVEC_QUIET.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import command_line  # noqa: E402
from tiny_models import WORDS, save_plain  # noqa: E402

from kinvec import checkpoint  # noqa: E402
from kinvec.embedder import open_folder  # noqa: E402
from kinvec.files import content_fingerprint, vectors  # noqa: E402
from kinvec.files.reading import read_log  # noqa: E402

command_line.WAIT = 1800.0  # seconds for a run to the end: others may be at work here
AGAIN = 0.3  # chance that the command that goes on is killed, too
LATE = 0.004  # seconds after a change within which a kill comes


# ---- the work ----


@dataclass(frozen=True)
class Work:
    """A command without its output, what its output is called, and which files are never the same twice.

    `finished` maps what such a file claims to be to what of it has to be the same. `unsteady` are the files of which
    bytes differ: they hold times.
    """

    argv: tuple[str, ...]
    output: str
    option: str = "--out={}"
    unsteady: dict[str, Callable[[Path], Any]] = field(default_factory=dict)


def prepare(folder: Path, rows: int = 400, steps: int = 40) -> dict[str, Work]:
    """The inputs, tiny but real: a BERT, judged queries over a corpus, and pairs; the four verbs, convert both ways."""
    import kinvec

    draw = random.Random(0)
    if not (folder / "model" / "kinvec.json").is_file():
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        plain = save_plain("bert", folder / "plain", "bert", max_length=32, spread=0.1, **dropout)
        kinvec.Embedder.load(plain, precision="fp32").save(folder / "model")
    texts = [" ".join(draw.choices(WORDS, k=12)) for _ in range(rows)]
    (folder / "beir" / "qrels").mkdir(parents=True, exist_ok=True)
    _lines(folder / "beir" / "corpus.jsonl", ({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    asked = [text.split()[:5] for text in texts[: rows // 4]]
    _lines(folder / "beir" / "queries.jsonl", ({"_id": f"q{i}", "text": " ".join(q)} for i, q in enumerate(asked)))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(asked)))
    (folder / "beir" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    pairs = ({"query_id": f"q{i}", "query": " ".join(q), "pos_doc": texts[i]} for i, q in enumerate(asked))
    _lines(folder / "pairs.jsonl", pairs)
    if not (folder / "model.nemo").is_file():
        kinvec.convert(folder / "model", folder / "model.nemo")
    model, beir = f"--model={folder / 'model'}", folder / "beir"
    settings = (f"max_steps={steps}", "batch_size=8", "save_every=3", "eval_every=7", "keep=1", "lr=1e-3")
    return {
        "train": Work(
            ("train", f"model={folder / 'model'}", "threads=1", "precision=fp32",
             *(f"data.{part}={folder / 'pairs.jsonl'}" for part in ("train", "dev", "test")),
             *(f"trainer.{setting}" for setting in settings)),
            "run", "out={}", TRAINED,
        ),
        "mine": Work(("mine", model, f"--data={beir}", "--threads=1", "--precision=fp32", "--bm25"), "mined"),
        "embed": Work(("embed", model, f"--queries={beir}", f"--docs={beir}", "--threads=1", "--precision=fp32"), "v"),
        "convert": Work(("convert", str(folder / "model")), "out.nemo", "{}"),
        "convert back": Work(("convert", str(folder / "model.nemo")), "out", "{}"),
    }  # fmt: skip


def _lines(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _steps(path: Path) -> Any:
    """Of the log what does not depend on time; a last line that is cut off is no line yet."""
    told = ("step", "loss", "grad_norm", "lr", "tokens", "dev")
    return [{key: row.get(key) for key in told} for row in read_log(path)]


def _but(*names: str) -> Callable[[Path], Any]:
    """A JSON file's value without the keys of these names, at any depth."""

    def told(path: Path) -> Any:
        def kept(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: kept(inner) for key, inner in value.items() if key not in names}
            return [kept(inner) for inner in value] if isinstance(value, list) else value

        return kept(json.loads(path.read_text("utf-8")))

    return told


def _page(path: Path) -> Any:
    return path.read_text("utf-8").rstrip().endswith("</html>")


def _recipe(path: Path) -> Any:
    return [line for line in path.read_text("utf-8").splitlines() if not line.startswith("out:")]


def _checked(path: Path) -> None:
    """Nothing: a checkpoint's own files are tested against its manifest, and tell through the model made of them."""


def _checkpoint(path: Path) -> Any:
    """What a checkpoint says besides its checksums, which are tested."""
    values = checkpoint.read_values(path.parent)
    return {key: value for key, value in values.items() if key != "seconds"}


MEASURED = ("seconds", "bytes_per_token")  # the latter counts memory by its address, which may serve twice
TRAINED: dict[str, Callable[[Path], Any]] = {
    "log.jsonl": _steps,
    "summary.json": _but(*MEASURED, "out", "model", "report"),
    "training.json": _but(*MEASURED),
    "run.json": _but(),
    "report.html": _page,
    "results.json": _but("timing", "model"),
    "recipe.yaml": _recipe,
    "manifest.json": _checkpoint,
    ".metadata": _checked,
    "__0_0.distcp": _checked,
}  # by the file's own name


# ---- what must hold ----


def files_of(folder: Path) -> dict[str, Path]:
    """Everything in the folder, by its place in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def told(work: Work, path: Path) -> Any:
    """What has to be the same of a file: its content, or what of it does not depend on time."""
    read = work.unsteady.get(path.name)
    return read(path) if read else content_fingerprint(path)


def problems_of(work: Work, here: Path, whole: Path, finished: bool) -> list[str]:
    """What is wrong in the folder `here` of a killed, or at last finished, command; `whole` was not disturbed.

    After a kill, files under names of their own must be what they are in the end; what is being written has a name that
    begins with a dot. Checkpoints and parts of vectors come and go, and are opened instead.
    """
    made, expected = files_of(here), files_of(whole)
    found = [f"left over: {place}" for place in made if finished and place not in expected]
    found += [f"missing: {place}" for place in expected if finished and place not in made]
    for place, path in made.items():
        if any(part.startswith(".") and part != ".metadata" for part in Path(place).parts):
            continue
        try:
            wrong = _wrong(work, path, expected.get(place), finished)
        except Exception as error:  # whatever a reader raises is a finding
            wrong = f"does not open ({error})"
        found += [f"{place}: {wrong}"] if wrong else []
    return found + _openable(here / work.output)


def _wrong(work: Work, path: Path, expected: Path | None, finished: bool) -> str | None:
    """What is wrong with a file, if anything; opens it."""
    if not finished and path.parent.name.startswith("step-"):
        if path.name == "manifest.json":
            checkpoint.read_values(path.parent)
        return None if (path.parent / "manifest.json").is_file() else "half a checkpoint under its own name"
    if path.suffix == ".part":
        np.load(path, allow_pickle=False)
        return None
    if expected is None:
        json.loads(path.read_text("utf-8")) if path.name == "progress.json" else None
        return None if finished or path.name == "progress.json" else "not of an undisturbed run"
    said, meant = told(work, path), told(work, expected)
    if path.name == "log.jsonl" and not finished:
        return None if said == meant[: len(said)] else "tells of other steps"
    return None if said == meant else "differs"


def _openable(output: Path) -> list[str]:
    """What claims to be finished is opened as its user would."""
    try:
        for folder in (output, output / "model"):
            if (folder / "kinvec.json").is_file():
                open_folder(folder)
        for folder in (output, output / "vectors"):
            if (vectors.read_state(folder) or {}).get("finished"):
                for side in ("query", "doc"):
                    vectors.open_vectors(folder, side)
    except Exception as error:  # as above
        return [f"does not open: {output.name}: {error}"]
    return []


# ---- a case ----


def changes(folder: Path) -> frozenset[str]:
    """The names of all that lies in the folder."""
    return frozenset(place for place, _ in _names(str(folder), ""))


def _names(folder: str, under: str) -> Iterator[tuple[str, str]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # gone meanwhile
        return
    for entry in entries:
        yield under + entry.name, entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from _names(entry.path, f"{under}{entry.name}/")


def begin(work: Work, folder: Path) -> command_line.Command:
    """The command, its output in the folder; its own words beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    output = work.option.format(folder / work.output)
    return command_line.start([*work.argv, output], folder.with_name(f"{folder.name}.said"))


def undisturbed(work: Work, folder: Path) -> tuple[float, int]:
    """Seconds, and how often what lies in the folder changes, in a run to the end."""
    begun, command, seen, count = time.monotonic(), begin(work, folder), frozenset[str](), 0
    while command.process.is_alive():
        now = changes(folder)
        count, seen = count + (now != seen), now
        time.sleep(0.0005)
    if command.wait():
        raise SystemExit(f"the undisturbed run failed: {command.said}")
    return time.monotonic() - begun, count


def kill(command: command_line.Command, folder: Path, seconds: float | None, change: int, late: float) -> int:
    """Kill the command after so many seconds, or so late after that change; its exit code."""
    if seconds is not None:
        command.process.join(seconds)
        return command.kill()
    seen, count = changes(folder), 0
    while command.process.is_alive() and count < change:
        now = changes(folder)
        count, seen = count + (now != seen), now
        time.sleep(0.0005)
    time.sleep(late)
    return command.kill()


def run_case(work: Work, name: str, number: int, seed: int, whole: Path, usual: tuple[float, int]) -> dict[str, Any]:
    """Kill, look, start again; the moments and what was wrong."""
    draw, folder = random.Random(f"{seed} {name} {number}"), whole.with_name(f"case-{number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.said").unlink(missing_ok=True)
    begun, kills, lost = time.monotonic(), list[dict[str, Any]](), list[str]()
    while not kills or draw.random() < AGAIN:
        seconds = draw.uniform(0, usual[0]) if draw.random() < 0.5 else None
        change, late = draw.randint(1, max(usual[1], 1)), draw.uniform(0, LATE)
        code = kill(begin(work, folder), folder, seconds, change, late)
        kills.append({"seconds": seconds} if seconds is not None else {"change": change, "late": late})
        kills[-1] |= {"killed": code == -signal.SIGKILL}
        lost += problems_of(work, folder, whole, finished=code == 0)
        if code not in (0, -signal.SIGKILL):
            lost.append(f"exit code {code}")
    last = begin(work, folder)
    if code := last.wait():
        lost.append(f"the same command ended with {code}: {last.said[-500:]}")
    lost += problems_of(work, folder, whole, finished=True)
    if not lost:
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.said").unlink()
    told = {"verb": name, "case": number, "seed": seed, "kills": kills, "lost": lost}
    return told | {"seconds": round(time.monotonic() - begun, 2)}


def run(place: Path, kills: int, seed: int, verbs: list[str]) -> list[dict[str, Any]]:
    """All cases, but those that are done: of every verb until so many kills have struck."""
    os.environ["KINVEC_CACHE"] = str(place / "cache")
    file, works = place / "cases.jsonl", prepare(place)
    done = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    for name in verbs:
        folder = place / name.replace(" ", "-")
        whole = folder / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        usual = undisturbed(works[name], whole)
        again = undisturbed(works[name], folder / "again")  # the bytes are promised: see that they are kept at all
        if wrong := problems_of(works[name], folder / "again", whole, finished=True):
            raise SystemExit(f"{name}: two undisturbed runs differ: {wrong}")
        usual = min(usual[0], again[0]), min(usual[1], again[1])
        own = [case for case in done if case["verb"] == name and case["seed"] == seed]
        while count(own) < kills:
            wait_for_quiet()
            own.append(run_case(works[name], name, len(own), seed, whole, usual))
            with open(file, "a", encoding="utf-8") as log:
                log.write(json.dumps(own[-1]) + "\n")
            lost = sum(bool(case["lost"]) for case in own)
            print(f"{name}: {count(own)} of {kills} kills, {len(own)} cases, {lost} lost", file=sys.stderr, flush=True)
            for problem in own[-1]["lost"]:
                print(f"  {problem}", file=sys.stderr, flush=True)
        done = [case for case in done if case not in own] + own
    return [case for case in done if case["seed"] == seed]


def count(cases: list[dict[str, Any]]) -> int:
    """How many kills struck a command that was still running."""
    return sum(one["killed"] for case in cases for one in case["kills"])


def wait_for_quiet() -> None:
    """Wait while others measure here."""
    while (file := os.environ.get("KINVEC_QUIET")) and Path(file).exists():
        time.sleep(5)


def main() -> None:
    """Run the cases, and write what came of them to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills that strike, of every verb")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "kills", help="inputs, runs and cases.jsonl")
    parser.add_argument("--verbs", nargs="*", default=["train", "mine", "embed", "convert", "convert back"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"kills-{date.today()}.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    cases = run(given.work.resolve(), given.kills, given.seed, given.verbs)
    verbs: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(case["verb"] for case in cases):
        own = [case for case in cases if case["verb"] == name]
        verbs[name] = {"cases": len(own), "kills": count(own), "lost": sum(bool(case["lost"]) for case in own)}
    told = {
        "what": __doc__.splitlines()[0], "date": str(date.today()), "seed": given.seed, "verbs": verbs,
        "versions": {name: version(name) for name in ("kinvec", "torch", "transformers")},
        "machine": {"system": platform.platform(), "processors": os.cpu_count()},
        "cases": cases,
    }  # fmt: skip
    given.out.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    for name, row in verbs.items():
        print(f"{name:<14}{row['cases']:>6} cases{row['kills']:>6} kills{row['lost']:>6} lost")
    print(f"written to {given.out}")
    if any(row["lost"] for row in verbs.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
