"""The model card: what the folder is, how it was made, and what it gained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinvec.embedder import Embedder
from kinvec.files import write_text
from kinvec.recipe import Recipe

CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, kinvec]
base_model: {base}
---

# {title}

An embedding model of {dimension} dimensions (texts up to {max_length} tokens, {pooling} pooling), tuned from `{base}`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}")
vectors = model.encode_query(["a question"]), model.encode_document(["a document"])
```

{prompts}## Results
{results}{guard}
## Lineage
{lineage}
"""


def write_card(folder: Path, recipe: Recipe, summary: Mapping[str, Any], embedder: Embedder) -> None:
    """Write `README.md` into the model folder."""
    base = recipe.model.removeprefix("pkg:")
    prompts = "".join(f"- {name}: `{text}`\n" for name, text in embedder.prompts.items())
    text = CARD.format(
        base=Path(base).name if Path(base).is_absolute() else base,
        title=Path(recipe.out).name,
        dimension=embedder.dimension,
        max_length=embedder.max_length,
        pooling=" + ".join(embedder.pooling),
        prompts=f"Prompts, put before every text:\n\n{prompts}\n" if prompts else "",
        results=_results(summary),
        guard=f"\nThe forgetting guard: {summary['guard']['said']}.\n" if "guard" in summary else "",
        lineage="\n".join(_stage(stage) for stage in embedder.lineage),
    )
    write_text(folder / "README.md", text)


def _results(summary: Mapping[str, Any]) -> str:
    lines = []
    for result in summary["results"]:
        lines += [
            "",
            f"{result['task']}, {result['queries']} test {result['unit']}; "
            "intervals are those of the paired difference.",
            "",
        ]
        lines += ["| metric | base | tuned | difference | 95 % interval |", "|---|---|---|---|---|"]
        for metric, row in result["metrics"].items():
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            lines.append(
                f"| {metric} | {row['base']:.4f} | {row['tuned']:.4f} | {row['difference']:+.4f} | {interval} |"
            )
    return "\n".join(lines) + "\n" if lines else "\nNot evaluated.\n"


def _stage(stage: Mapping[str, Any]) -> str:
    metrics = ", ".join(f"{key} {value}" for key, value in stage["metrics"].items() if value is not None)
    made = f"{stage['stage']}. {stage['objective']} from `{stage['base']}`, seed {stage['seed']}"
    mixed = f"; {stage['share']:g} of the tuned weights, the rest the base's" if "share" in stage else ""
    return f"{made}, data {stage['data'][:12]}: {metrics}{mixed}"
