"""`kinvec plan`: what a training will take on this machine, measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kinvec.verbs.train import named


def plan(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `train` with the same arguments will take: seconds and bytes, measured with the model on the data.

    Nothing is written. Of a chain of stages each is planned with the model of the first, since those of the others are
    not there yet, under `stages`; of several seeds each takes what the first one does, but for the base's evaluation.
    `seconds` is all of them together. Raises `KinvecError` and `RecipeError` as `train` does before it begins.
    """
    from kinvec.pipeline import plan_run
    from kinvec.recipe import load_seeds

    chains, _ = load_seeds(recipe, overrides)
    first = chains[0][0]
    planned = [plan_run(stage.model_copy(update={"model": first.model})) for stage in chains[0]]
    again = sum(one["seconds"] for one in planned) - planned[0]["evaluation"].get("base", 0.0)
    seconds = planned[0]["evaluation"].get("base", 0.0) + len(chains) * again
    return {"stages": planned, "seeds": len(chains), "seconds": seconds}


def command(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (scifact, demo), a YAML file, or the first key=value.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value …, for example trainer.batch_size=4096 (docs/recipe.md)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto; the same as device=.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; the same as threads=.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or auto; the same as precision=.")] = None,
) -> None:
    """Say what a training will take on this machine: memory, time, and how its steps are cut into chunks.

    The model runs some of the data for a few seconds, and evaluation is tried without it; nothing is written.
    """
    name, given = named(recipe, settings, device=device, threads=threads, precision=precision)
    found = plan(name, given)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from kinvec.console import clock
    from kinvec.forecast import in_words

    for number, one in enumerate(found["stages"], 1):
        if len(found["stages"]) > 1:
            print(f"stage {number} of {len(found['stages'])}")
        print("\n".join(in_words(one)))
    if len(found["stages"]) > 1 or found["seeds"] > 1:
        seeds = f" under {found['seeds']} seeds" if found["seeds"] > 1 else ""
        print(f"all{seeds}: {clock(found['seconds'])}")
