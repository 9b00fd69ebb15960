"""`kinvec embed`: texts in, a folder of vectors out; what is there already is not encoded again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kinvec.encoders import LastingEncoder


def embed(
    model: str | Path,
    out: str | Path,
    *,
    queries: str | Path | None = None,
    docs: str | Path | None = None,
    columns: Mapping[str, Any] | None = None,
    layout: str = "kinvec",
    stored: str = "float32",
    dimensions: int | None = None,
    prompts: Mapping[str, str] | None = None,
    api_model: str | None = None,
    force: bool = False,
    precision: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Embed `queries` and `docs` (one may be absent) into the folder `out`, and return its manifest.

    `model`, `prompts` and `api_model` are those of `encoders.open_encoder`: a server's vectors can be kept, too;
    `columns` are role → column, where columns have other names (`files.read_queries`, `files.read_documents`).
    The same call continues a folder that was begun, and leaves a finished one as it is; `force` starts afresh. Memory
    does not grow with the number of texts. With `layout="nemo"` the vectors are there a second time, as NeMo's GPT
    embedding model writes them. Of `dimensions` the first so many are kept; `stored` is how documents are (a key of
    `quantising.PRECISIONS`; queries stay float32). Raises `KinvecError` if a source is wrong, if `out` holds other
    things, or if it was begun with another model, other texts or other settings.
    """
    from kinvec.console import say
    from kinvec.contracts import RecipeError
    from kinvec.encoders import each, open_encoder
    from kinvec.files import read_judgements, vectors
    from kinvec.machine import set_threads

    if layout not in LAYOUTS:
        raise RecipeError(f"layout '{layout}' is unknown; known are {' and '.join(LAYOUTS)}")
    sources = _sources(queries, docs, columns)
    form = _form(stored, dimensions, docs, layout)
    folder = Path(out)
    vectors.refuse_foreign(folder)
    set_threads(threads)
    content = {side: _fingerprint(source) for side, (source, _) in sources.items()} | form
    content |= {"columns": dict(columns)} if columns else {}
    load = partial(open_encoder, str(model), precision=precision, device=device, prompts=prompts, api_model=api_model)
    state, encoder = None if force else vectors.read_state(folder), None
    if state is not None:
        encoder = load()
        vectors.refuse_changed(folder, state, _settings(encoder, content))
        state = vectors.mended(folder, state)
    if state is None or encoder is None:
        judged = read_judgements(queries, columns=columns) if queries is not None else ()
        texts = {side: read(source) for side, (source, read) in sources.items()}
        with vectors.listed(folder, texts, judged) as (new, rows):
            encoder = encoder or load()
            _check_dimensions(encoder, dimensions)
            state = vectors.begin(folder, new, rows, _settings(encoder, content))
    elif state.pop("finished"):
        say(f"{folder} is finished: the same model, texts and settings; --force makes it again")
        _lay_out(folder, layout, state, encoder)
        return state
    else:
        say(f"continuing {folder}")
    encode = {"query": each(encoder, "query"), "doc": each(encoder, "document")}
    for side, (source, read) in sources.items():
        n = state["rows"][side]
        vectors.write_side(folder, side, n, read(source), encode[side], _teller(side, n))
    about = _about(encoder, model) | (_store(folder, state["rows"], form, encoder) if form else {})
    manifest = vectors.finish(folder, state, about)
    _lay_out(folder, layout, manifest, encoder)
    return manifest


LAYOUTS = ("kinvec", "nemo")


Source = tuple[str | Path, Callable[..., Iterator[tuple[str, str]]]]


def _sources(
    queries: str | Path | None, docs: str | Path | None, columns: Mapping[str, Any] | None
) -> dict[str, Source]:  # fmt: skip
    """What is to be embedded, and what reads it as ids and texts, by side."""
    from kinvec.contracts import RecipeError
    from kinvec.files import read_documents, read_queries

    given = {"query": (queries, read_queries), "doc": (docs, read_documents)}
    found: dict[str, Source] = {
        side: (source, partial(read, columns=columns)) for side, (source, read) in given.items() if source is not None
    }
    if not found:
        raise RecipeError("there is nothing to embed; add --queries FILE, --docs FILE or both")
    return found


def _form(stored: str, dimensions: int | None, docs: str | Path | None, layout: str) -> dict[str, Any]:
    """What is asked for besides the model's own float32 vectors; nothing, if nothing is."""
    from kinvec.contracts import RecipeError
    from kinvec.quantising import PRECISIONS

    if stored not in PRECISIONS:
        raise RecipeError(f"--stored {stored} is unknown; known are {', '.join(PRECISIONS)}")
    form: dict[str, Any] = {"stored": stored} if stored != "float32" else {}
    form |= {"dimensions": dimensions} if dimensions is not None else {}
    if form and (docs is None or layout != "kinvec"):
        raise RecipeError("--stored and --dimensions are for documents in our own layout; add --docs, drop --layout")
    return form


def _check_dimensions(encoder: LastingEncoder, dimensions: int | None) -> None:
    from kinvec.contracts import RecipeError

    if dimensions is not None and not 0 < dimensions <= (d := encoder.encode_documents(["one text"]).shape[1]):
        raise RecipeError(f"--dimensions {dimensions}: {encoder.name} gives vectors of {d} dimensions")


def _store(folder: Path, rows: dict[str, int], form: dict[str, Any], encoder: LastingEncoder) -> dict[str, Any]:
    """Cut and scale both sides, and store the documents' in their form; what the manifest says of it.

    Scores are inner products from then on: what is cut and rounded is not scaled again.
    """
    import numpy as np

    from kinvec.files import vectors
    from kinvec.quantising import store
    from kinvec.tasks.evaluation import scaling

    scale, ranges, stored = scaling(_similarity(encoder)), folder / "ranges.npy", form.get("stored", "float32")
    paths = {side: [folder / name for name in vectors.shard_names(side, n)] for side, n in rows.items()}
    if not ranges.exists():
        dimensions = form.get("dimensions") or np.load(paths["doc"][0], mmap_mode="r").shape[1]
        for path in paths.get("query", ()):
            vectors.write_array(path, scale(np.load(path)[:, :dimensions]))
    else:
        dimensions = np.load(ranges).shape[1]
    store(paths["doc"], ranges, stored, dimensions, scale)
    said = {"dimension": dimensions, "stored": stored, "ranges": ranges.name, "similarity": "dot"}
    return said | {"dtype": str(np.load(paths["doc"][0], mmap_mode="r").dtype)}


def _lay_out(folder: Path, layout: str, manifest: dict[str, Any], encoder: LastingEncoder) -> None:
    from kinvec.files import vectors

    if layout == "nemo":
        stages = [stage for stage in getattr(encoder, "lineage", ()) if "trainer" in stage.get("recipe", {})]
        samples = sum(stage["metrics"]["steps"] * stage["recipe"]["trainer"]["batch_size"] for stage in stages)
        vectors.write_nemo_layout(folder, manifest["rows"], samples)


def _fingerprint(source: str | Path) -> str:
    from kinvec.files import content_fingerprint
    from kinvec.files.sources import existing

    return content_fingerprint(existing(str(source)))


def _settings(encoder: LastingEncoder, content: dict[str, Any]) -> dict[str, Any]:
    """All that the bytes of the vectors depend on. Threads, too: they change the order of sums in a product here."""
    import torch

    from kinvec.files import vectors

    device = getattr(encoder, "device", None)
    here = {} if device is None else {"device": device.type, "threads": torch.get_num_threads()}
    precision = getattr(encoder, "precision", "")
    return {"model": encoder.fingerprint, "precision": precision, **here, "window": vectors.WINDOW, **content}


def _similarity(encoder: LastingEncoder) -> str:
    return getattr(encoder, "similarity", "cosine")


def _about(encoder: LastingEncoder, model: str | Path) -> dict[str, Any]:
    from kinvec.embedder import Embedder
    from kinvec.tasks.rankings import versions

    return {
        "model": str(model) if isinstance(encoder, Embedder) else encoder.name,
        "prompts": getattr(encoder, "prompts", {}),
        "max_length": getattr(encoder, "max_length", None),
        "precision": getattr(encoder, "precision", ""),
        "dtype": "float32",
        "similarity": _similarity(encoder),
        "versions": versions(),
    }


def _teller(side: str, rows: int) -> Callable[[int, bool], None]:
    """Says after each window how far a side of several windows is; within a window the encoder shows its own bar."""
    from kinvec.console import say

    begun, done, encoded = time.monotonic(), 0, 0

    def advance(n: int, new: bool) -> None:
        nonlocal done, encoded
        done, encoded = done + n, encoded + n * new
        if new and rows > n:
            minutes = (time.monotonic() - begun) / encoded * (rows - done) / 60
            say(f"{side}: {done:,} of {rows:,} texts, about {minutes:,.0f} min left")

    return advance


def command(
    model: Annotated[
        str,
        typer.Option(help="A model folder, hub name or pkg:NAME; st:NAME; https://HOST/v1 for a server like OpenAI's."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write vectors, ids and manifest.json into.")],
    queries: Annotated[str | None, typer.Option(help="A file of queries, embedded with the query prompt.")] = None,
    docs: Annotated[str | None, typer.Option(help="A file of documents, embedded with the document prompt.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="A column by another name: query, query_id, pos_doc, pos_id, text."),
    ] = None,
    layout: Annotated[str, typer.Option(help="kinvec, or nemo: a second copy under NeMo's names.")] = "kinvec",
    prompt: Annotated[
        list[str] | None, typer.Option(help="query=TEXT or document=TEXT, put before each; may be repeated.")
    ] = None,
    api_model: Annotated[str | None, typer.Option(help="Which model of a server; its key: KINVEC_API_KEY.")] = None,
    stored: Annotated[str, typer.Option(help="Documents as float32, float16, int8 or binary.")] = "float32",
    dimensions: Annotated[int | None, typer.Option(help="Keep the first so many dimensions, scaled again.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Start afresh, deleting the vectors in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, int8, or auto: bf16 where the hardware has it.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all unless set.")] = None,
) -> None:
    """Turn queries and documents into a folder of vectors.

    The same command continues a folder that was stopped half-way. `kinvec evaluate --embeddings` scores the folder.
    """
    from kinvec.encoders import named_prompts
    from kinvec.files import named_columns

    manifest = embed(
        model, out, queries=queries, docs=docs, columns=named_columns(column or ()), layout=layout, stored=stored,
        dimensions=dimensions, prompts=named_prompts(prompt or ()), api_model=api_model, force=force,
        precision=precision, device=device, threads=threads,
    )  # fmt: skip
    if as_json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return
    for side, rows in manifest["rows"].items():
        files = ", ".join(manifest[side]["files"][:3])
        print(f"{side}: {rows:,} vectors of {manifest['dimension']} dimensions in {files}")
    print(f"written to {out}")
