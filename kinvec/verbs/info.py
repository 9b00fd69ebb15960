"""`kinvec info`: what a model folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def info(model: str) -> dict[str, Any]:
    """What a model is: architecture, sizes, pooling, prompts, how texts go through it, and where it comes from.

    Takes a folder, a hub name or `pkg:NAME`, or a `.nemo`, of which only the settings are read. Raises `KinvecError`
    for what is no model.
    """
    if model.endswith(".nemo"):
        from kinvec.formats.nemo import describe

        return describe(Path(model))
    from kinvec.embedder import open_folder

    embedder = open_folder(model)
    config: Any = embedder.backbone.model.config
    return {
        "model": model,
        "architecture": type(embedder.backbone.model).__name__,
        "attention": embedder.attention,
        "parameters": sum(parameter.numel() for parameter in embedder.parameters()),
        "layers": getattr(config.get_text_config(), "num_hidden_layers", None),
        "dimension": embedder.dimension,
        "max_length": embedder.max_length,
        "pooling": list(embedder.pooling),
        "head": [type(module).__name__ for module in embedder.head],
        "similarity": embedder.similarity,
        "prompts": embedder.prompts,
        "include_prompt": embedder.include_prompt,
        "packed": embedder.backbone.packs,
        "fingerprint": embedder.fingerprint,
        "lineage": embedder.lineage,
    }


def command(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, pkg:NAME, or a .nemo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a model folder is: architecture, pooling, prompts, maximum length, lineage."""
    said = info(model)
    if as_json:
        print(json.dumps(said, indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("", Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    for key, value in said.items():
        if key != "lineage":
            table.add_row(key.replace("_", " "), _plain(key, value))
    for stage in said.get("lineage", []):
        made = f"{stage['objective']} from {stage['base']}, seed {stage['seed']}, {stage['metrics']['steps']} steps"
        table.add_row(f"stage {stage['stage']}", made)
    Console().print(table)


def _plain(key: str, value: Any) -> str:
    if key == "packed":
        return (
            "texts laid end to end, without padding" if value else "padded (the architecture takes no other attention)"
        )
    if isinstance(value, dict):
        return ", ".join(f"{name} {text!r}" for name, text in value.items()) or "none"
    if isinstance(value, list):
        return " → ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
