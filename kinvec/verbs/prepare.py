"""`kinvec prepare`: raw text into training texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kinvec.preparing import Counts


def prepare(
    *sources: str | Path,
    out: str | Path,
    unit: str = "paragraph",
    columns: Mapping[str, Any] | None = None,
    model: str | None = None,
    tokens: int = 512,
    across: bool = False,
    shortest: int = 20,
    holdout: float = 0.05,
) -> dict[str, Any]:
    """Cut the articles of the sources into texts, and write `train.jsonl` and `dev.jsonl` into the folder `out`.

    `unit` is paragraph, sentence, or block: `tokens` tokens of `model`'s tokenizer, `across` articles or within them.
    `columns` says which columns of data files are the `text`. Returns what was done and counted. Raises `KinvecError`
    for a bad source and `RecipeError` for bad settings.
    """
    from kinvec.contracts import RecipeError
    from kinvec.preparing import UNITS, Counts, blocks, write_texts

    if unit not in (*UNITS, "block"):
        raise RecipeError(f"unit '{unit}' is unknown; known are {', '.join(UNITS)} and block")
    if unit == "block" and model is None:
        raise RecipeError("blocks are counted in a model's tokens; add --model NAME")
    if not 0 <= holdout < 1:
        raise RecipeError(f"--holdout is a share from 0 to below 1, not {holdout}")
    if tokens < 1:
        raise RecipeError(f"--tokens is at least 1, not {tokens}")
    said = {"sources": [str(source) for source in sources], "unit": unit, "shortest": shortest, "holdout": holdout}
    counts = Counts()
    articles = _articles(sources, columns, counts)
    if unit == "block":
        said |= {"model": model, "tokens": tokens, "across": across}
        texts: Iterator[str] = blocks(articles, _tokenizer(str(model)), tokens, across)
    else:
        texts = (text for article in articles for text in UNITS[unit](article))
    write_texts(texts, Path(out), said, shortest=shortest, share=holdout, counts=counts)
    return said | vars(counts)


def _articles(
    sources: tuple[str | Path, ...], columns: Mapping[str, Any] | None, counts: Counts
) -> Iterator[str]:  # fmt: skip
    from kinvec.contracts import RecipeError
    from kinvec.files import read_documents
    from kinvec.files.sources import existing

    if not sources:
        raise RecipeError("there is nothing to prepare; name files or folders of text")
    for source in sources:
        path = existing(str(source))
        for file in sorted(path.rglob("*.txt")) if path.is_dir() and not _is_data(path) else [path]:
            if file.suffix == ".txt":  # one article: its paragraphs are what a line-by-line reader would lose
                counts.articles += 1
                yield file.read_text("utf-8")
                continue
            for _, text in read_documents(file, columns=columns):
                counts.articles += 1
                yield text


def _is_data(path: Path) -> bool:
    return (path / "corpus.jsonl").is_file() or not any(path.rglob("*.txt"))


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    from kinvec.backbone import fetch

    return AutoTokenizer.from_pretrained(fetch(model), trust_remote_code=False)


def command(
    sources: Annotated[list[str], typer.Argument(metavar="SRC…", help="Text files, folders of them, or data files.")],
    out: Annotated[Path, typer.Option(help="The folder for train.jsonl, dev.jsonl and manifest.json.")],
    unit: Annotated[str, typer.Option(help="paragraph, sentence, or block (of tokens).")] = "paragraph",
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=NAME", help="The text by another name: text=NAME, or text=A+B.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer counts the tokens of a block.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a block.")] = 512,
    across: Annotated[bool, typer.Option("--across", help="Let blocks cross the borders of articles.")] = False,
    shortest: Annotated[int, typer.Option(help="Characters below which a text is dropped.")] = 20,
    holdout: Annotated[float, typer.Option(help="Share of the texts held out as dev.jsonl.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was counted as JSON.")] = False,
) -> None:
    """Cut raw text into paragraphs, sentences or blocks for training: no repeats, no scraps, a share held out."""
    from kinvec.files import named_columns

    found = prepare(
        *sources, out=out, unit=unit, columns=named_columns(column or ()), model=model, tokens=tokens, across=across,
        shortest=shortest, holdout=holdout,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print(f"{found['articles']:,} articles → {found['train']:,} training and {found['dev']:,} dev texts in {out}")
    print(f"dropped: {found['too_short']:,} too short, {found['repeated']:,} repeated")
