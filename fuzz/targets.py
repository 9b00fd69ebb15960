"""Any bytes at all, to every reader: data, or one clear sentence; and nothing run, nothing outside the folder touched.

A target is one file of a good folder, named by its place (`model/config.json`). `attempt` puts bytes in its place, lets
kinvec read the folder, and raises `Broken` where the promise of docs/reliability.md is not kept. The tests try a few
hundred damaged files (tests/test_fuzz.py); this program is guided by coverage, and goes on for as long as it is told:

    python fuzz/targets.py all 60       every reader, 60 s each
    python fuzz/targets.py model 600    the files of a model folder
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "fuzz")]

if __name__ == "__main__" and sys.argv[1] != "all":  # libFuzzer sees what is imported under atheris' eyes
    import atheris

    with atheris.instrument_imports(include=["kinvec"]):
        for module in pkgutil.walk_packages([str(ROOT / "kinvec")], "kinvec."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)

from good import BUILDERS  # noqa: E402

from kinvec.contracts import KinvecError, RecipeError  # noqa: E402

SECONDS, BYTES = 20, 3 << 30  # that one attempt may take: processor time, and memory beyond what is in use before it
LONGEST_SENTENCE = 1000


class Broken(AssertionError):
    """What a reader may not do."""


# --- What kinvec does with each folder --------------------------------------------------------------------------------


def _data(path: Path) -> Iterator[Callable[[], object]]:
    from kinvec import files

    file = path if path.is_file() else next(p for p in path.iterdir() if p.is_file())
    yield lambda: list(files.open_data(file).batches())
    yield lambda: list(files.open_data(file, skip_bad=True).batches())
    yield lambda: files.open_problem(file, split="train")
    yield lambda: list(files.read_queries(file))
    yield lambda: list(files.read_documents(file))
    yield lambda: list(files.read_judgements(file))


def _sets(path: Path) -> Iterator[Callable[[], object]]:
    from kinvec import files

    yield lambda: list(files.open_data(path, split="test", skip_bad=True).batches())
    yield lambda: files.open_problem(path, split="test")


def _vectors(path: Path) -> Iterator[Callable[[], object]]:
    import kinvec

    yield lambda: kinvec.evaluate(embeddings=path)


def _archive(path: Path) -> Iterator[Callable[[], object]]:
    import kinvec

    archive = next(path.glob("*.nemo"))
    yield lambda: kinvec.info(str(archive))
    yield lambda: kinvec.convert(archive, path / "back")


def _settings(path: Path) -> Iterator[Callable[[], object]]:
    from kinvec.formats.nemo_config import read_settings

    yield lambda: read_settings(path, path / "x.nemo")


def _recipe(path: Path) -> Iterator[Callable[[], object]]:
    from kinvec.config import dump
    from kinvec.recipe import load_seeds

    yield lambda: [dump(stage) for chain in load_seeds(path / "mine.yaml")[0] for stage in chain]


def _overrides(path: Path) -> Iterator[Callable[[], object]]:
    from kinvec.recipe import load_seeds

    words = (path / "words.txt").read_text("utf-8", "surrogateescape").split("\n")
    yield lambda: load_seeds(None, words)


def _nemo_command(path: Path) -> Iterator[Callable[[], object]]:
    import kinvec

    yield lambda: kinvec.init(path / "recipe.yaml", from_nemo=path / "command.txt", force=True)


def _model(path: Path) -> Iterator[Callable[[], object]]:
    import kinvec

    yield lambda: kinvec.Embedder.load(path, precision="fp32").encode(["a cell of the gene", ""])


def _checkpoint(path: Path) -> Iterator[Callable[[], object]]:
    import torch

    from kinvec import checkpoint

    step = path / "step-00000003"
    yield lambda: checkpoint.read_values(checkpoint.latest(path) or step)
    yield lambda: checkpoint.names(step)
    yield lambda: checkpoint.load_into(step, {"a.weight": torch.zeros(4, 3), "b": torch.zeros(2)})


def _result(path: Path) -> Iterator[Callable[[], object]]:
    import kinvec

    yield lambda: kinvec.compare(path, path)


def _run(path: Path) -> Iterator[Callable[[], object]]:
    import kinvec
    from kinvec.recipe import load_recipe

    yield lambda: kinvec.report(path, out=path / "page.html")
    yield lambda: kinvec.compare(path, path)
    yield lambda: load_recipe(path / "recipe.yaml")


READERS: dict[str, Callable[[Path], Iterator[Callable[[], object]]]] = {
    "jsonl": _data, "array": _data, "squad": _data, "csv": _data, "tsv": _data, "parquet": _data, "text": _data,
    "conllu": _data, "unnamed": _data, "scores": _data, "beir": _sets, "nli": _sets, "saved": _sets,
    "vectors": _vectors, "stored": _vectors, "archive": _archive, "settings": _settings, "recipe": _recipe,
    "overrides": _overrides, "nemo": _nemo_command, "model": _model, "decoder": _model, "adapter": _model,
    "checkpoint": _checkpoint, "result": _result, "run": _run, "seeds": _run,
}  # fmt: skip


def build(folder: Path, readers: Iterable[str] = READERS) -> Path:
    """A good folder for every reader, by the project's own writers."""
    for name in readers:
        (folder / name).mkdir(parents=True)
        BUILDERS[name](folder / name)
    return folder


def targets(good: Path) -> list[str]:
    """Every file of the good folders that a reader looks at, by its place."""
    return sorted(p.relative_to(good).as_posix() for name in READERS for p in (good / name).rglob("*") if p.is_file())


# --- One attempt ------------------------------------------------------------------------------------------------------


def attempt(good: Path, target: str, raw: bytes, work: Path) -> list[str]:
    """The sentences (empty: data) with which kinvec answers to these bytes in the target's place.

    Raises `Broken` for another kind of exception, a sentence that is none, an attempt to run or to reach something, a
    hang, or memory without bound.
    """
    top = target.split("/")[0]
    with _setting("KINVEC_CACHE", str(work / "cache")), contextlib.redirect_stderr(io.StringIO()):
        if top not in _warm:  # what is imported when it is first used is imported outside the guard
            _warm.add(top)
            for call in _calls(good, target, (good / target).read_bytes(), work):
                with contextlib.suppress(KinvecError):
                    call()
        return [_answer(target, call, work, good) for call in _calls(good, target, raw, work)]


def _calls(good: Path, target: str, raw: bytes, work: Path) -> Iterator[Callable[[], object]]:
    """What kinvec does with a copy of the good folder that has these bytes in the target's place."""
    top = target.split("/")[0]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good / top, work / top)
    (work / target).write_bytes(raw)
    return READERS[top](work / top)


def _answer(target: str, call: Callable[[], object], work: Path, good: Path) -> str:
    try:
        with guarded(work, good):
            call()
    except Broken:
        raise
    except KinvecError as error:
        return _checked(target, error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Broken(f"{target}: {type(error).__name__}: {str(error)[:300]}") from error
    return ""


def _checked(target: str, error: KinvecError) -> str:
    said = str(error)
    lines = said.split("\n") if isinstance(error, RecipeError) else [said]
    if not said or not all(line.isprintable() and len(line) <= LONGEST_SENTENCE for line in lines):
        raise Broken(f"{target}: no clear sentence: {said[:300]!r}") from error
    if "allocate memory" in said:
        raise Broken(f"{target}: memory without bound: {said[:300]!r}") from error
    return said


HUB = os.path.realpath(os.path.expanduser("~/.cache/huggingface"))  # where the hub's client looks when it is asked
RUNS = re.compile(r"os\.(system|exec|fork|forkpty|posix_spawn|startfile)|subprocess\.Popen|pty\.spawn|socket\.connect")
CHANGES = re.compile(r"os\.(remove|rename|rmdir|mkdir|link|symlink|chmod|chown|truncate|utime)|shutil\.\w+")
READABLE = (
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/urandom",
    "/usr",
    "/etc/localtime",
    sys.prefix,
    sys.base_prefix,
    str(ROOT),
    HUB,
)
_warm: set[str] = set()  # readers that have been used
_place: list[Path] = []  # the folder of the attempt under way, and the base of its adapter
_seen: list[str] = []  # what it was caught at


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Python tells it of every file opened, process started, address asked (PEP 578)."""
    if not _place:
        return
    if RUNS.fullmatch(event) or (event == "import" and str(arguments[0]).startswith("transformers_modules")):
        _caught(f"{event} {arguments[:2]}")
    elif event == "open" and isinstance(arguments[0], str | bytes):
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if mode is None else set("wax+") & set(mode)
        _inside(os.fsdecode(path), event, () if writes else (*READABLE, str(_place[1])))
    elif CHANGES.fullmatch(event):
        folder = f"/proc/self/fd/{arguments[-1]}" if arguments[-1] != -1 else ""  # a relative name's, where it has one
        _inside(os.path.join(folder, os.fsdecode(arguments[0])), event, ())


def _inside(name: str, event: str, more: tuple[str, ...]) -> None:
    path = os.path.realpath(name)
    allowed = (str(_place[0]), os.devnull, *more)
    if not any(path == place or path.startswith(place + os.sep) for place in allowed):
        _caught(f"{event} {name}")


def _caught(what: str) -> None:
    _seen.append(what)
    raise Broken(what)


@contextlib.contextmanager
def guarded(work: Path, good: Path) -> Iterator[None]:
    """Inside, nothing may run, nothing outside `work` be read or changed, and time and memory are bounded.

    What may be read besides is the base of an adapter, which lies among the good folders.
    """
    if "watching" not in globals():
        globals()["watching"] = True  # a hook cannot be taken off again
        sys.addaudithook(_watch)

    def late(*_: object) -> None:
        raise Broken(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGVTALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _seen.clear()
    _place[:] = [work.resolve(), (good / "base").resolve()]
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _place.clear()
        if _seen:  # and somebody caught it
            raise Broken(_seen[0])


@contextlib.contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)


# --- Damage -----------------------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, "", "x", "\ud800", "\x00", "\x1b[2J", "a\nb", "../../../etc/passwd", "/etc/passwd", "/dev/zero", 0, -1,
    1, 2**31, 2**63, 10**12, 10**30, 1.5, float("nan"), float("inf"), [], {}, [[]], [None], ["x", 1], {"": {}},
    {"x": "y"}, "os.system", "x.y.Z", "user/repo", "(a+)+$", "${oc.env:HOME}", "${x}", "1e400", "9" * 5000,
    int("9" * 4000),
]  # fmt: skip
PIECES = [
    b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"\x00" * 16, b"9" * 5000, b"NaN", b"\\ud83d", b"\xed\xa0\x80", b"../",
    b"\x1b[2J", b"\r", b'"', b"\t", b"!!python/object/apply:os.system [x]", b"&a [*a]", b"\xff" * 8, b"\x7f" * 4,
]  # fmt: skip


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """The bytes with a value changed where they are a tree of values, or with bytes changed, cut or put in."""
    tree = _tree(raw, draw)
    if tree is not None and draw.random() < 0.7:
        value, back = tree
        return back(_changed(value, draw))
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, way = draw.randrange(len(data) + 1), draw.randrange(6)
        if way == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif way == 1:
            data[at:at] = draw.choice(PIECES)
        elif way == 2:
            del data[at : at + draw.choice((1, 4, 64, 4096))]
        elif way == 3:
            data[at : at + 8] = draw.choice((b"\xff" * 8, b"\x00" * 8, b"\xff" * 3 + b"\x7f", b"\x00" * 7 + b"\x40"))
        elif way == 4:
            data[at:at] = data[draw.randrange(len(data) + 1) :][: draw.choice((8, 256, 2048))]
        else:
            del data[at:]
    return bytes(data)


def _tree(raw: bytes, draw: random.Random) -> tuple[Any, Callable[[Any], bytes]] | None:
    """The values that the bytes stand for (JSON, a line of JSON, the head of safetensors, YAML), and the way back."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(raw), lambda value: json.dumps(value).encode()
    with contextlib.suppress(ValueError, RecursionError):
        size = int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8 : 8 + size])

        def headed(value: Any) -> bytes:
            text = json.dumps(value).encode()
            return len(text).to_bytes(8, "little") + text + raw[8 + size :]

        return head, headed
    lines = raw.split(b"\n")
    at = draw.randrange(len(lines))
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(lines[at])
        return value, lambda new: b"\n".join([*lines[:at], json.dumps(new).encode(), *lines[at + 1 :]])
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        found = yaml.safe_load(raw)
        return (found, lambda value: yaml.dump(value).encode()) if isinstance(found, dict) else None
    return None


def _changed(value: Any, draw: random.Random) -> Any:
    """The tree with one of its values, or keys, another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, way = draw.choice(list(value)), draw.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            return {**value, str(draw.choice(NASTY)): draw.choice(NASTY)}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], *([_changed(value[at], draw)] * draw.choice((0, 1, 1, 1, 2))), *value[at + 1 :]]
    return draw.choice(NASTY)


# --- Guided by coverage -----------------------------------------------------------------------------------------------


def main(reader: str, seconds: int) -> None:
    """Fuzz one reader with atheris (libFuzzer). Bytes that break a promise are kept in `out/`, a file for each.

    The first byte of an input says which of the reader's files the others are put into.
    """
    work, seen = Path(tempfile.mkdtemp()), set[str]()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    good, seeds = build(work / "good", [reader]), work / "seeds"
    names = [name for name in targets(good) if name.startswith(f"{reader}/")]
    seeds.mkdir()
    for place, name in enumerate(names):
        (seeds / str(place)).write_bytes(bytes([place]) + (good / name).read_bytes())

    def one(raw: bytes) -> None:
        name = names[raw[0] % len(names)] if raw else names[0]
        try:
            attempt(good, name, raw[1:], work / "work")
        except Broken as error:
            place = _place_of(error)
            if place not in seen:
                seen.add(place)
                kept = OUT / f"{name.replace('/', '-')}-{len(seen)}"
                kept.write_bytes(raw[1:])
                print(f"BROKEN {error} ({place}); the bytes are in {kept}", flush=True)

    def mutate(raw: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        made = damaged(raw[1:], draw) if seed % 2 else atheris.Mutate(raw[1:], most - 1)
        return bytes([draw.randrange(len(names)) if not raw else raw[0]]) + made[: most - 1]

    OUT.mkdir(exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=1000000", "-timeout=120", "-rss_limit_mb=0"]
    options += ["-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(seeds), f"-artifact_prefix={OUT}/", *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _place_of(error: BaseException) -> str:
    """The innermost lines of kinvec on the way to the exception: what tells one break from another."""
    cause = error.__cause__ or error
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if "/kinvec/" in frame.filename]
    return f"{type(cause).__name__} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])


if __name__ == "__main__":
    wanted, seconds = sys.argv[1], sys.argv[2]
    if wanted != "all":
        main(wanted, int(seconds))
    else:
        for name in READERS:
            subprocess.run([sys.executable, __file__, name, seconds], check=True)
        found = sorted(path.name for path in OUT.iterdir())
        print(f"{len(READERS)} readers, {seconds} s each; bytes that break a promise: {', '.join(found) or 'none'}")
        sys.exit(bool(found))
