"""`kinvec convert`: a model folder ↔ NVIDIA NeMo's `.nemo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    mcore: bool = True,
    tokenizer: str | None = None,
    precision: str = "keep",
) -> dict[str, Any]:
    """Convert a BERT model folder (or hub name, or `pkg:NAME`) to a `.nemo`, or a `.nemo` to a model folder.

    Returns what was written. `mcore` says which form a `.nemo` gets; `tokenizer` names the tokenizer where the archive
    or the folder does not; `precision` is fp32, bf16, fp16 or keep. Raises `KinvecError` for what cannot be converted.
    """
    from kinvec.contracts import RecipeError
    from kinvec.formats.nemo import PRECISIONS, read_nemo, write_nemo

    if precision not in PRECISIONS:
        raise RecipeError(f"precision '{precision}' is unknown; use one of {', '.join(PRECISIONS)}")
    source, target = str(source), Path(destination)
    reads, writes = source.endswith(".nemo"), target.suffix == ".nemo"
    if reads == writes:
        which = "both are" if reads else "neither is"
        raise RecipeError(f"convert has a model folder on one side and a .nemo on the other; here {which} a .nemo")
    if writes:
        return write_nemo(source, target, mcore=mcore, tokenizer=tokenizer, precision=precision)
    return read_nemo(Path(source), target, tokenizer=tokenizer, precision=precision)


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .nemo, or a BERT: folder, hub name or pkg:NAME.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make of a .nemo; else FILE.nemo.")],
    mcore: Annotated[
        bool, typer.Option("--mcore/--no-mcore", help="The .nemo's form: a sharded folder, or one file of weights.")
    ] = True,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer of a foreign .nemo: a folder or hub name; or the name to write into a .nemo."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Weights as fp32, bf16 or fp16; keep leaves them.")] = "keep",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Convert a BERT between a model folder and NVIDIA NeMo's .nemo, without changing a bit of its weights.

    A .nemo is checked before anything in it is used; nothing of it is run.
    """
    said = convert(source, destination, mcore=mcore, tokenizer=tokenizer, precision=precision)
    if as_json:
        print(json.dumps(said, indent=2, ensure_ascii=False))
        return
    for key, value in said.items():
        if value:
            print(f"{key.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
