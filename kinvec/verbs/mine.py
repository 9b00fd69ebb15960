"""`kinvec mine`: a model and judged queries in, training data with hard negatives out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

    from kinvec.contracts import RetrievalData
    from kinvec.encoders import LastingEncoder
    from kinvec.mining import MiningSettings

BEGUN, MANIFEST = "mine.json", "manifest.json"  # whose folder it is, from the start; that it is finished
SAID = "reranker.jsonl"  # what the reranker said so far
UNIT = 1e-3  # what a coordinate of a vector of length 1 may be off by


def mine(
    model: str | Path | None,
    data: str | Path,
    out: str | Path,
    settings: MiningSettings | None = None,
    *,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    embeddings: str | Path | None = None,
    reranker: str | None = None,
    memory: str = "2GiB",
    force: bool = False,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Mine hard negatives for the judged queries of `data` into the folder `out`; returns the audit.

    `model` is whatever `encoders.open_encoder` opens; None, and `embeddings` are vectors that `kinvec embed` made of
    the same queries and documents; `columns` are role → column, where columns have other names. `train.jsonl` is
    training data, `audit.json` says what to think of it, `vectors/` are kept for other settings. The same call
    continues a folder that was begun and leaves a finished one as it is; `force` starts afresh. The process stays
    within `memory`, however large the corpus; the size of it changes nothing in what is found. Raises `KinvecError` if
    the data are wrong, or `out` holds other things or was begun with another model, data or settings.
    """
    from kinvec import mining
    from kinvec.auditing import audit
    from kinvec.backbone import resolve_device
    from kinvec.console import say
    from kinvec.contracts import RecipeError
    from kinvec.encoders import open_encoder
    from kinvec.files import content_fingerprint, open_retrieval, read_written, write_json
    from kinvec.machine import set_threads
    from kinvec.planner import parse_bytes
    from kinvec.reranker import open_reranker, remembering

    if (model is None) == (embeddings is None):
        raise RecipeError("mine takes either --model NAME or --embeddings FOLDER; give one of them")
    budget, settings, place = parse_bytes(memory), settings or mining.MiningSettings(), resolve_device(device)
    set_threads(threads)
    folder, problem = Path(out), _with_positives(open_retrieval(data, split=split, columns=columns))
    encoder = open_encoder(str(model), precision=precision, device=device) if embeddings is None else None
    searcher = encoder.fingerprint if encoder else content_fingerprint(Path(embeddings or ""))
    judge, judge_is = open_reranker(reranker, precision, device) if reranker else (None, None)
    begun = _identity(searcher, problem, settings) | {"reranker": judge_is}
    if _claim(folder, begun, force):
        say(f"{folder} is finished: the same model, data and settings; --force makes it again")
        return read_written(folder / "audit.json")
    if encoder is None:
        problem, queries, shards = _stored(Path(embeddings or ""), problem, folder / "scaled")
        judged = mining.known(problem)
    else:
        judged = mining.known(problem)  # what is wrong with the data is said before anything is encoded
        queries, shards = _encoded(folder / "vectors", encoder, problem)
    at_once = mining.queries_at_once(budget, queries.shape[1], mining.deepest_rank(judged, settings))
    with remembering(judge, folder / SAID) if judge else nullcontext() as asked:
        found = list(mining.mine(problem, judged, queries, shards, settings, asked, at_once, place))
    _write_rows(folder / "train.jsonl", problem, found, teacher=judge is not None)
    told = {"model": str(model or embeddings), "data": str(data), **audit(problem, found, settings)}
    write_json(folder / "audit.json", told)
    checksums = {name: content_fingerprint(folder / name) for name in ("train.jsonl", "audit.json")}
    write_json(folder / MANIFEST, {**begun, "rows": len(found), "checksums": checksums})
    return told


def _with_positives(problem: RetrievalData) -> RetrievalData:
    """The problem without queries for which no document is judged relevant."""
    from kinvec.console import say
    from kinvec.contracts import KinvecError

    qrels = {query: judged for query, judged in problem.qrels.items() if any(grade > 0 for grade in judged.values())}
    if not qrels:
        raise KinvecError(f"{problem.name}: no query has a relevant document; nothing can be mined")
    if len(qrels) < len(problem.qrels):
        say(f"{len(problem.qrels) - len(qrels):,} queries without a relevant document are left out")
    return replace(problem, qrels=qrels)


def _identity(searcher: str, problem: RetrievalData, settings: MiningSettings) -> dict[str, Any]:
    """All that the mined file depends on; `searcher` is the fingerprint of the encoder or of the vectors."""
    return {
        "kind": "kinvec mined data", "format": 1, "model": searcher, "data": problem.fingerprint,
        "settings": settings.model_dump(mode="json"),
    }  # fmt: skip


def _claim(folder: Path, begun: dict[str, Any], force: bool) -> bool:
    """Make the folder ours, or go on in it; whether it is finished, and nothing in it is damaged."""
    from kinvec.config import differences
    from kinvec.console import say
    from kinvec.contracts import KinvecError
    from kinvec.files import damaged, read_written, sweep, write_json

    if folder.is_dir() and any(folder.iterdir()) and not (folder / BEGUN).is_file():
        raise KinvecError(f"{folder} holds other things than mined data; name an empty or a new folder")
    if (folder / BEGUN).is_file() and not force:
        before = read_written(folder / BEGUN)
        if not isinstance(before, dict):
            raise KinvecError(f"{folder / BEGUN}: damaged; add --force to mine again (vectors that are whole are kept)")
        if changed := "; ".join(differences(before, begun)):
            raise KinvecError(f"{folder} was made with other settings ({changed}); name another folder, or add --force")
        sweep(folder)
        finished = read_written(folder / MANIFEST) or {}
        names = damaged(folder, finished.get("checksums", {}))
        if names:
            say(f"{folder}: {', '.join(names)}: damaged or gone; mined again")
        return bool(finished) and not names
    for name in (MANIFEST, SAID):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / BEGUN, begun)
    return False


def _encoded(folder: Path, encoder: LastingEncoder, problem: RetrievalData) -> tuple[np.ndarray, list[np.ndarray]]:
    """The encoder's vectors of the queries and, in shards, of the corpus; kept, and made only once."""
    import numpy as np
    import torch

    from kinvec.encoders import each
    from kinvec.files import vectors
    from kinvec.tasks.evaluation import scaling

    scale = scaling(getattr(encoder, "similarity", "cosine"))

    def queries() -> Iterator[tuple[str, str]]:
        return ((query, problem.queries[query]) for query in problem.qrels)

    def documents() -> Iterator[tuple[str, str]]:
        return zip(problem.corpus.ids, problem.corpus.texts, strict=True)

    settings = {
        "model": encoder.fingerprint, "data": problem.fingerprint, "device": str(getattr(encoder, "device", "")),
        "threads": torch.get_num_threads(), "window": vectors.WINDOW,
    }  # fmt: skip
    sides = {
        "query": (queries, lambda windows: map(scale, each(encoder, "query")(windows))),
        "doc": (documents, lambda windows: map(scale, each(encoder, "document")(windows))),
    }
    kept = vectors.kept(folder, sides, settings)
    return np.concatenate(kept["query"].shards), kept["doc"].shards


def _stored(
    folder: Path, problem: RetrievalData, out: Path
) -> tuple[RetrievalData, np.ndarray, list[np.ndarray]]:  # fmt: skip
    """The problem with its corpus in the order of an embeddings folder, and the vectors of both sides.

    Where they are compared by cosine and are not of length 1, they are brought to it in `out`. Raises `KinvecError`
    where a query or a document has no vector.
    """
    import numpy as np

    from kinvec.contracts import Corpus, KinvecError
    from kinvec.files import vectors
    from kinvec.tasks.evaluation import scaling

    asked, kept = vectors.open_vectors(folder, "query"), vectors.open_vectors(folder, "doc")
    place = {identity: row for row, identity in enumerate(asked.ids)}
    missing = [query for query in problem.qrels if query not in place]
    if missing or len(kept.ids) != len(problem.corpus):
        what = f"query '{missing[0]}' has no vector" if missing else f"has vectors of {len(kept.ids):,} documents"
        raise KinvecError(f"{folder}: {what}, and the data have {len(problem.corpus):,} documents; embed these data")
    queries, shards = np.concatenate(asked.shards)[[place[query] for query in problem.qrels]], kept.shards
    scale = scaling((vectors.read_state(folder) or {}).get("similarity", "dot"))
    if not np.allclose(scale(queries), queries, atol=UNIT):
        queries, shards = (
            scale(queries),
            [_scaled(shard, scale, out / f"doc-{n}.npy") for n, shard in enumerate(shards)],
        )
    if any(a != b for a, b in zip(kept.ids, problem.corpus.ids, strict=True)):
        texts = dict(zip(problem.corpus.ids, problem.corpus.texts, strict=True))
        if other := [identity for identity in kept.ids if identity not in texts]:
            raise KinvecError(f"{folder}: document '{other[0]}' is not in the data; embed these data")
        problem = replace(problem, corpus=Corpus(kept.ids, [texts[identity] for identity in kept.ids]))
    return problem, queries, shards


def _scaled(shard: np.ndarray, scale: Callable[[np.ndarray], np.ndarray], path: Path) -> np.ndarray:
    """The shard's rows at their scale, in a file of its own, block by block."""
    import numpy as np

    from kinvec.files import vectors
    from kinvec.tasks.evaluation import ENCODE_ROWS

    path.parent.mkdir(exist_ok=True)
    blocks = (scale(shard[start : start + ENCODE_ROWS]) for start in range(0, len(shard), ENCODE_ROWS))
    vectors.write_blocks(path, shard.shape, blocks)
    return np.load(path, mmap_mode="r")


def _write_rows(path: Path, problem: RetrievalData, found: list[Any], teacher: bool) -> None:
    """Training data, one query a line; with a teacher, its scores of the positives beside those of the negatives."""
    from kinvec.files import write_lines

    ids, texts = problem.corpus.ids, problem.corpus.texts
    queries = list(problem.qrels)

    def line(mined: Any) -> str:
        row = {
            "query_id": queries[mined.query], "query": problem.queries[queries[mined.query]],
            "pos_id": [ids[doc] for doc in mined.positives], "pos_doc": [texts[doc] for doc in mined.positives],
            "neg_id": [ids[doc] for doc in mined.negatives], "neg_doc": [texts[doc] for doc in mined.negatives],
            "neg_score": [round(score, 6) for score in mined.scores],
        }  # fmt: skip
        if teacher:
            row["pos_score"] = [round(score, 6) for score in mined.positive_scores]
        return json.dumps(row, ensure_ascii=False)

    write_lines(path, map(line, found))


def command(
    data: Annotated[str, typer.Option(help="Judged queries: a BEIR folder, or a file of retrieval examples.")],
    out: Annotated[Path, typer.Option(help="The folder to write train.jsonl and audit.json into.")],
    model: Annotated[
        str | None, typer.Option(help="The model that searches: a folder, a hub name, pkg:NAME, st:NAME.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Instead of a model: what kinvec embed made of these queries and documents.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to mine for.")] = "train",
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=NAME", help="A column by another name, as in query=question.")
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="Hard negatives of a query, at most.")] = 4,
    skip: Annotated[int, typer.Option(min=0, help="Ranks left out at the top.")] = 0,
    depth: Annotated[int, typer.Option(min=1, help="Ranks looked at below those.")] = 100,
    relative: Annotated[float, typer.Option(help="Highest share of the lowest positive's score; 0, no limit.")] = 0.95,
    margin: Annotated[float | None, typer.Option(help="Least distance below the lowest positive's score.")] = None,
    highest: Annotated[float | None, typer.Option(help="Highest score of a negative.")] = None,
    lowest: Annotated[float | None, typer.Option(help="Lowest score of a negative.")] = None,
    draw: Annotated[str, typer.Option(help="top: the first that are left; random: a draw of them.")] = "top",
    bm25: Annotated[bool, typer.Option("--bm25", help="Candidates of BM25 beside the model's.")] = False,
    reranker: Annotated[str | None, typer.Option(help="A cross-encoder, whose scores the limits are then on.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draw.")] = 42,
    memory: Annotated[
        str, typer.Option(help="What the process may take, such as 2GiB; results are the same.")
    ] = "2GiB",
    force: Annotated[bool, typer.Option("--force", help="Start afresh, whatever --out was made with.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, int8, or auto: bf16 where the hardware has it.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all unless set.")] = None,
) -> None:
    """Find hard negatives for your queries, and say how far they can be trusted.

    The nearest documents by exact search, without known positives, their duplicates, and what scores too near a
    positive. `kinvec train data.train=OUT` trains on the folder.
    """
    from kinvec.config import load
    from kinvec.files import named_columns
    from kinvec.mining import MiningSettings

    given = {
        "negatives": negatives, "skip": skip, "depth": depth, "relative": relative or None, "margin": margin,
        "highest": highest, "lowest": lowest, "draw": draw, "lexical": bm25, "seed": seed,
    }  # fmt: skip
    told = mine(
        model, data, out, load(MiningSettings, given), split=split, columns=named_columns(column or ()),
        embeddings=embeddings, reranker=reranker, memory=memory, force=force, precision=precision, device=device,
        threads=threads,
    )  # fmt: skip
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        show(told, out)


def show(told: dict[str, Any], out: Path) -> None:
    """Print the audit for a person."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"{told['queries']:,} queries, {told['negatives']:,} hard negatives from {told['documents']:,} documents; "
        f"{told['too_few']:,} queries ({told['too_few_share']:.1%}) have fewer than {told['wanted']}"
    )
    means = told["mean_scores"]
    console.print(f"mean score of positives {means['positives']:.3f}, of negatives {means['negatives']:.3f}")
    if len(told["sources"]) > 1:
        console.print("brought by " + ", ".join(f"{name} {share:.0%}" for name, share in told["sources"].items()))
    console.print(f"{told['suspected']:,} candidates score too near a positive and are left out, for example:")
    for suspect in told["suspects"][:3]:
        console.print(f"  {suspect['query']}\n    → {suspect['text']}", soft_wrap=False)
    for hub in told["hubs"][:3]:
        console.print(f"a negative of {hub['queries']:,} queries: {hub['text']}")
    console.print(f"written to {out}; next: kinvec train model={told['model']} data.train={out} out=runs/mined")
