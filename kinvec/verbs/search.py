"""`kinvec search`: a question in, the answers of a run's base and tuned model side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from kinvec.contracts import Corpus, RetrievalData
    from kinvec.embedder import Embedder

SIDES = ("base", "tuned")
SNIPPET = 240  # characters of an answer that a table shows


@dataclass(frozen=True)
class Engine:
    """One model with its vectors of the corpus and the ranks of its ids, ready to be asked."""

    embedder: Embedder
    corpus: Corpus
    shards: list[np.ndarray]
    ranks: np.ndarray

    def answers(self, question: str, k: int) -> list[dict[str, Any]]:
        """The k best documents for a question, best first: id, score, text."""
        from kinvec.topk import top_k

        scores, rows = top_k(self.embedder.encode_queries([question]), self.shards, self.ranks, k)
        found = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        return [{"id": self.corpus.ids[row], "score": score, "text": self.corpus.texts[row]} for row, score in found]


def search(
    run: str | Path,
    question: str,
    k: int = 5,
    *,
    precision: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """What both models of a run answer: `{"question": …, "base": [{id, score, text}, …], "tuned": […]}`.

    The corpus is the one that the run was evaluated on. Its vectors are made at the first call and kept in the run
    folder. Raises `KinvecError` where the folder is no finished run's or the run's data are no longer there.
    """
    return ask(open_engines(run, precision=precision, device=device, threads=threads), question, k)


def ask(engines: dict[str, Engine], question: str, k: int) -> dict[str, Any]:
    """The answers of every engine to one question."""
    return {"question": question} | {side: engine.answers(question, k) for side, engine in engines.items()}


def open_engines(
    run: str | Path, *, precision: str | None = None, device: str | None = None, threads: int | None = None
) -> dict[str, Engine]:
    """Both models of a run with their vectors of its evaluation corpus; settings default to the run's own."""
    from kinvec.adapters import LoraSettings
    from kinvec.contracts import KinvecError, RetrievalData
    from kinvec.machine import set_threads
    from kinvec.pipeline import open_model, open_run_data
    from kinvec.recipe import load_recipe

    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise KinvecError(f"{folder} is no run folder (it has no recipe.yaml); name the folder that kinvec train wrote")
    if not (folder / "model" / "modules.json").is_file():
        raise KinvecError(f"{folder}: the run has no tuned model yet; run the same kinvec train again, it continues")
    own = load_recipe(folder / "recipe.yaml")
    # Nothing is trained, so adapters' bits ask for no precision.
    given = {"precision": precision, "device": device, "threads": threads, "lora": LoraSettings()}
    recipe = own.model_copy(update={key: value for key, value in given.items() if value is not None})
    set_threads(recipe.threads)
    data = open_run_data(recipe)
    problems = [problem for one in data.sets for problem in (one.test, one.dev) if problem is not None]
    if not problems:
        raise KinvecError(f"{folder}: the run was made without evaluation data, so there is no corpus to search")
    searchable = [problem for problem in problems if isinstance(problem, RetrievalData)]
    if not searchable:
        raise KinvecError(f"{folder}: the run learned from {data.sets[0].table.kind}, so there is no corpus to search")
    models = {"base": recipe, "tuned": recipe.model_copy(update={"model": str(folder / "model"), "prompts": {}})}
    embedders = {side: open_model(models[side]) for side in SIDES}
    return {side: _engine(folder / "search", embedders[side], searchable[0]) for side in SIDES}


def _engine(folder: Path, embedder: Embedder, data: RetrievalData) -> Engine:
    """The model with its vectors: those kept from before if model and data are the same, else made now."""
    from kinvec.encoders import each
    from kinvec.files import vectors
    from kinvec.topk import rank_ids

    settings = {
        "model": embedder.fingerprint, "precision": embedder.precision,
        "data": data.fingerprint, "window": vectors.WINDOW,
    }  # fmt: skip
    documents = partial(zip, data.corpus.ids, data.corpus.texts, strict=True)
    sides = {"doc": (documents, each(embedder, "document"))}
    shards = vectors.kept(folder / embedder.fingerprint, sides, settings)["doc"].shards
    return Engine(embedder, data.corpus, shards, rank_ids(data.corpus.ids))


def command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    question: Annotated[str | None, typer.Argument(help="What to search for; without it, you are asked.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Answers of each model.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each question.")] = False,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, int8 or auto; unset, as the run.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto; unset, as the run.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; unset, as the run.")] = None,
) -> None:
    """Ask a question and see what the base and the tuned model answer, side by side.

    The documents are those the run was evaluated on. They are encoded once with each model and kept in the run folder.
    """
    engines = open_engines(run, precision=precision, device=device, threads=threads)
    for asked in [question] if question is not None else _questions(run, engines):
        found = ask(engines, asked, k)
        if as_json:
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            show(found)


def _questions(run: Path, engines: dict[str, Engine]) -> Iterator[str]:
    """Questions typed at a prompt, or one a line from a pipe; an empty line or the end of the input ends them."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    print(f"{len(engines['base'].corpus):,} documents of {run}. Type a question; an empty line ends.")
    while True:
        try:
            asked = input("\nquestion> ").strip()
        except EOFError:
            return
        if not asked:
            return
        yield asked


def show(found: dict[str, Any]) -> None:
    """Print the answers to one question in two columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(found["question"], style="bold"), title_justify="left", show_lines=True)
    table.add_column("", justify="right")
    for side in SIDES:
        table.add_column(side, ratio=1)
    places = {side: {answer["id"]: place for place, answer in enumerate(found[side], 1)} for side in SIDES}
    for place, (base, tuned) in enumerate(zip(found["base"], found["tuned"], strict=True), 1):
        table.add_row(str(place), _cell(base), _cell(tuned, _moved(tuned["id"], place, places["base"])))
    Console().print(table)


def _moved(identity: str, place: int, before: dict[str, int]) -> str:
    """How the tuned model's answer stood with the base."""
    if identity not in before:
        return " new"
    return "" if before[identity] == place else f" was {before[identity]}"


def _cell(answer: dict[str, Any], note: str = "") -> Any:
    from rich.text import Text

    text = " ".join(answer["text"].split())
    shown = text if len(text) <= SNIPPET else text[:SNIPPET].rsplit(" ", 1)[0] + " …"
    return Text.assemble((f"{answer['score']:.3f} {answer['id']}{note}\n", "dim"), shown)
