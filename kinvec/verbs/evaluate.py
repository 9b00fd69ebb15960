"""`kinvec evaluate`: a model (or vectors) and judged data in, every query's measures out, with BM25 beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinvec.console import plain_table

if TYPE_CHECKING:
    from kinvec.contracts import Encoder, Problem, Qrels, Result, RetrievalData


def evaluate(
    model: str | Path | Encoder | None = None,
    data: str | Path | None = None,
    *,
    split: str = "test",
    task: str | None = None,
    columns: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    embeddings: str | Path | None = None,
    measures: Sequence[str] = (),
    prompts: Mapping[str, str] | None = None,
    api_model: str | None = None,
    cheaper: bool = False,
    dimensions: Sequence[int] = (),
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Result:
    """Evaluate `model` on `data`: retrieval (BEIR folder, examples), pairs or labelled texts, whichever it is.

    `task`, a key of `files.TASKS`, says it where the data leave a choice: `reranking`, `clustering`, …; `columns` are
    role → column, where columns have other names. `model` is an encoder of your own, or, with `prompts` and
    `api_model`, a name that `encoders.open_encoder` knows: a model of ours, one that sentence-transformers opens
    (`st:NAME`), or one on a server (`https://HOST/v1`); `bm25` is the lexical baseline by itself. With `embeddings`, a
    folder that `kinvec embed` wrote, its vectors are scored instead of a model, by the judgements of `data` or by its
    own. `measures` default to the task's own. With `cheaper` the result also says what fewer dimensions (`dimensions`:
    which) and bits cost (`tasks.cheaper`). With `out` the result is written there. Raises `RecipeError` for arguments
    that do not go together and `KinvecError` for what is wrong with data or model, before anything is encoded.
    """
    from kinvec import tasks
    from kinvec.contracts import RecipeError, one_sentence
    from kinvec.machine import set_threads
    from kinvec.metrics import parse_measures

    if (model is None) == (embeddings is None):
        raise RecipeError("evaluate takes either --model NAME or --embeddings FOLDER; give one of them")
    if embeddings is not None and (prompts or api_model):
        raise RecipeError("vectors are there already: prompts and --api-model go with --model")
    if columns and data is None:
        raise RecipeError("--column says what the columns of judged data are; add --data FILE")
    if embeddings is not None and task not in (None, "retrieval"):
        raise RecipeError(f"vectors on disk are scored by judged queries; --task {task} goes with --model")
    if model is not None and data is None:
        raise RecipeError("evaluate needs judged data; add --data FOLDER_OR_FILE")
    parse_measures([name for name in measures if name not in (*tasks.LABELLED, *tasks.TRIPLETS, *tasks.TOLD_APART)])
    if out is not None:
        tasks.refuse_foreign(Path(out))
    if dimensions and not cheaper:
        raise RecipeError("--dimension says which dimensions --cheaper tries; add --cheaper")
    set_threads(threads)
    if embeddings is not None:
        with one_sentence(f"{embeddings}: these vectors cannot be scored", "are they whole? embed again"):
            result = _score_vectors(Path(embeddings), data, split, columns, measures, dimensions if cheaper else None)
    else:
        assert model is not None and data is not None
        result = _score_model(
            model, _opened(data, split, task, columns), measures, dimensions if cheaper else None,
            precision=precision, device=device, prompts=prompts, api_model=api_model,
        )  # fmt: skip
    if out is not None:
        tasks.save_result(result, out)
    return result


def _opened(data: str | Path, split: str, task: str | None, columns: Mapping[str, Any] | None) -> Problem:
    from kinvec.console import say
    from kinvec.files import open_problem

    problem = open_problem(data, split=split, task=task, columns=columns)
    if problem.kind == "clustering" and task is None:
        say(f"{data} has no split train to learn classifiers from: its texts are clustered")
    return problem


def _score_model(
    model: str | Path | Encoder, data: Problem, measures: Sequence[str], cheaper: Sequence[int] | None, **opening: Any
) -> Result:
    """Score a model; where `cheaper` is given, cheaper vectors too, of these dimensions or the usual ones."""
    from kinvec import tasks
    from kinvec.contracts import RecipeError, RetrievalData
    from kinvec.encoders import open_encoder

    lexical = isinstance(model, str) and model.lower() == "bm25"
    if cheaper is not None and (lexical or data.kind != "retrieval"):
        raise RecipeError("--cheaper measures vectors on queries with judged documents; leave it out here")
    if lexical:
        if not isinstance(data, RetrievalData):
            raise RecipeError("bm25 searches; it does not score pairs of texts. Name a model")
        if data.kind == "reranking":
            return tasks.lexical_reranking(data, measures)
        return tasks.bm25(data, tuple(measures) or tasks.MEASURES)
    encoder = open_encoder(str(model), **opening) if isinstance(model, str | Path) else model
    if cheaper is not None:
        assert isinstance(data, RetrievalData)
        return tasks.with_cheaper(data, encoder, measures, cheaper)
    return tasks.measure(data, encoder, measures)


def _score_vectors(
    folder: Path, source: str | Path | None, split: str, columns: Mapping[str, Any] | None, measures: Sequence[str],
    cheaper: Sequence[int] | None,
) -> Result:  # fmt: skip
    from kinvec import tasks
    from kinvec.contracts import KinvecError, RecipeError, RetrievalData
    from kinvec.files import open_problem, vectors
    from kinvec.quantising import Restored

    queries, documents = vectors.open_vectors(folder, "query"), vectors.open_vectors(folder, "doc")
    said = vectors.read_state(folder) or {}
    shards: list[Any] = list(documents.shards)
    if said.get("stored", "float32") != "float32":
        if cheaper is not None:
            raise RecipeError(f"{folder} holds {said['stored']} vectors; --cheaper starts from float32")
        if Path(said["ranges"]).name != said["ranges"]:
            raise KinvecError(f"{folder}: its manifest names '{said['ranges']}', which is not in the folder; refused")
        ranges = vectors.open_array(folder / said["ranges"])
        shards = [Restored(shard, said["stored"], ranges) for shard in shards]
    qrels = _judged_queries(source, columns) if source is not None else vectors.open_judgements(folder)
    baselines = {}
    if qrels:
        data = _without_texts(folder, documents.ids, qrels)
    elif source is None:
        raise KinvecError(f"{folder} has no judgements (qrels.tsv); add --data with judged queries")
    else:
        opened = open_problem(source, split=split, columns=columns)
        if not isinstance(opened, RetrievalData):
            raise KinvecError("an embeddings folder is scored by judged queries; scored pairs need --model")
        ranked = [name for name in measures if name not in tasks.TRIPLETS]
        data, baselines = opened, {"BM25": tasks.bm25(opened, ranked or tasks.MEASURES).metrics}
    sides = (queries.ids, queries.shards), (documents.ids, shards)
    similarity = said.get("similarity", "dot")
    result = tasks.from_vectors(data, *sides, measures, similarity=similarity)
    if cheaper is not None:
        result.cheaper = tasks.cheaper(data.qrels, *sides, measures, similarity=similarity, dimensions=cheaper)
    result.model, result.prompts = said.get("model", str(folder)), said.get("prompts", {})
    result.baselines = baselines
    return result


def _judged_queries(source: str | Path, columns: Mapping[str, Any] | None) -> Qrels | None:
    """The judgements of a file of query rows that name their documents (`query_id`, `doc_id`) and hold no documents."""
    from kinvec.contracts import KinvecError
    from kinvec.files import detect_kind, read_judgements

    if not Path(source).is_file():
        return None
    try:
        detect_kind(source, columns=columns)
        return None
    except KinvecError:
        qrels: Qrels = {}
        for query, document, grade in read_judgements(source, columns=columns):
            qrels.setdefault(query, {})[document] = grade
        return qrels or None


def _without_texts(folder: Path, documents: Sequence[str], qrels: Qrels) -> RetrievalData:
    """What can be scored of vectors and judgements alone: ids, no texts."""
    from kinvec.contracts import Corpus, RetrievalData
    from kinvec.files import content_fingerprint

    key = content_fingerprint(json.dumps([qrels, list(documents)]).encode())
    return RetrievalData(
        Corpus(documents, [""] * len(documents)), dict.fromkeys(qrels, ""), qrels, key, folder.name, ""
    )


def command(
    model: Annotated[
        str | None,
        typer.Option(
            help="A model folder, hub name or pkg:NAME; st:NAME for sentence-transformers to open; https://HOST/v1 for "
            "a server like OpenAI's; bm25 for BM25 itself."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A BEIR folder, a file of examples, scored pairs, or labelled texts.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Which judgements to score by; test unless set. May be repeated.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="retrieval, reranking, similarity, pair-classification, classification or clustering, where the data "
            "leave a choice."
        ),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=NAME", help="A column by another name, as in query=question.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write results.json and per_query.parquet into this folder.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="Score this folder of vectors instead of a model.")] = None,
    measure: Annotated[list[str] | None, typer.Option(help="A measure such as nDCG@10; may be repeated.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="query=TEXT or document=TEXT, put before each; may be repeated.")
    ] = None,
    api_model: Annotated[str | None, typer.Option(help="Which model of a server; its key: KINVEC_API_KEY.")] = None,
    cheaper: Annotated[
        bool, typer.Option("--cheaper", help="Also measure fewer dimensions × float32, float16, int8, binary.")
    ] = False,
    dimension: Annotated[
        list[int] | None, typer.Option(help="Tried by --cheaper; may be repeated. Unset: those trained, or halves.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, int8, or auto: bf16 where the hardware has it.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all unless set.")] = None,
) -> None:
    """Measure a model on judged queries, pairs or labelled texts, query by query.

    Retrieval searches the whole corpus and shows BM25 beside the model, and where documents are judged as negatives the
    margin of the triplets; reranking orders the judged documents alone. Scored pairs give Spearman and Pearson, pairs
    labelled 0 and 1 average precision, labelled texts accuracies, silhouette and v-measure.
    """
    from kinvec.encoders import named_prompts
    from kinvec.files import named_columns

    results = _of_splits(
        model, data, split or ["test"], task=task, columns=named_columns(column or ()), out=out, embeddings=embeddings,
        measures=measure or (), prompts=named_prompts(prompt or ()), api_model=api_model, cheaper=cheaper,
        dimensions=dimension or (), precision=precision, device=device, threads=threads,
    )  # fmt: skip
    if as_json:
        from kinvec.tasks import summary

        told = [summary(result) for result in results]
        print(json.dumps(told if len(told) > 1 else told[0], indent=2, ensure_ascii=False))
        return
    for result in results:
        show(result)
    if out is not None:
        print(f"written to {out}")


def _of_splits(
    model: str | None, data: str | None, splits: Sequence[str], *, out: Path | None, **settings: Any
) -> list[Result]:
    """The result of each split, of several in a folder of its own; the model is opened, and a corpus encoded, once."""
    from kinvec.encoders import Remembering, open_encoder
    from kinvec.files import open_problem

    if len(splits) == 1:
        return [evaluate(model, data, split=splits[0], out=out, **settings)]
    encoder: Encoder | str | None = model
    if model is not None and data is not None:
        for split in splits:  # all of them are there, or nothing is begun
            open_problem(data, split=split, task=settings["task"], columns=settings["columns"])
        if model.lower() != "bm25":
            opening = ("prompts", "api_model", "precision", "device")
            encoder = Remembering(open_encoder(model, **{name: settings[name] for name in opening}))
    places = {split: out / split if out is not None else None for split in dict.fromkeys(splits)}
    return [evaluate(encoder, data, split=split, out=place, **settings) for split, place in places.items()]


def show(result: Result) -> None:
    """Print a result for a person: one row a metric, the model and the baselines beside each other; cheaper vectors."""
    from rich.console import Console

    from kinvec.tasks import unit_of

    what = unit_of(result.kind)
    split = f", {result.split}" if result.split else ""
    seconds = sum(value for key, value in result.timing.items() if not key.endswith("per_second"))
    precision = f" in {result.precision}" if result.precision else ""
    print(f"{result.task}{split}: {len(result.per_query['id']):,} {what}, {seconds:.1f} s{precision}")
    table = plain_table("metric")
    for name in (result.model, *result.baselines):
        table.add_column(name, justify="right", overflow="fold")
    for metric, value in result.metrics.items():
        beside = [f"{row[metric]:.5f}" if metric in row else "" for row in result.baselines.values()]
        table.add_row(metric, f"{value:.5f}", *beside)
    Console().print(table)
    for metric, threshold in result.thresholds.items():
        print(f"{metric}: pairs with a cosine of {threshold:.4f} or more are taken for positive")
    if result.cheaper:
        show_cheaper(result.cheaper)


def show_cheaper(found: dict[str, Any]) -> None:
    """Print what fewer dimensions and bits cost, and the fewest bytes that keep 99 % and 95 %."""
    from rich.console import Console

    measure, rows = found["measure"], found["rows"]
    table = plain_table("dims", "precision", "bytes", measure, "change", "95 % interval", "kept", left=(1,))
    for row in rows:
        change, stored = row["difference"], row["precision"] + ", rescored" * row["rescored"]
        table.add_row(
            str(row["dimensions"]), stored, f"{row['bytes']:,}", f"{row['metrics'][measure]:.4f}",
            f"{change['value']:+.4f}", f"{change['low']:+.4f} to {change['high']:+.4f}",
            "" if row["kept"] is None else f"{row['kept']:.1%}",
        )  # fmt: skip
    print(f"\ncheaper vectors; rescored: {found['oversampling']} candidates a result, ordered by the full query")
    Console().print(table)
    for share in (0.99, 0.95):
        kept = [row for row in rows if row["kept"] is not None and row["kept"] >= share]
        if kept:
            best = min(kept, key=lambda row: (row["bytes"], row["rescored"]))
            what = f"{best['dimensions']} dimensions, {best['precision']}" + ", rescored" * best["rescored"]
            print(f"{share:.0%} kept in {best['bytes']:,} bytes instead of {rows[0]['bytes']:,}: {what}")
