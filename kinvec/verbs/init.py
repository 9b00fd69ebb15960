"""`kinvec init`: a commented recipe for one's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RECIPE = """\
# A recipe: everything that this run depends on. Whatever is left out has its default; docs/recipe.md lists all keys.
#   kinvec train {file}
# Any key may be given on the command line too, where it wins: kinvec train {file} trainer.epochs=3 seed=7

model: {model}
# The model to start from: a folder, a name on the Hugging Face hub, or pkg:NAME for one inside an installed package.

out: {out}
# The run folder. The same command continues a run that was stopped there.

seed: 42
# Order of the data, dropout, adapters. Train with two or three seeds before you trust a small gain.

# prompts: {{query: "query: ", document: "passage: "}}
# Put before every text, here and wherever the model is used later. Only for models that were trained with prompts
# (E5, BGE, Qwen3-Embedding …); their model cards say which.

data:
  train: {train}
  # {about}
{judged}  # columns: {{{columns}}}     # where your columns have other names
  # skip_bad: true         # drop and count bad rows instead of stopping at the first
  # max_length: 256        # tokens at which texts are cut; kinvec check says how many texts that touches
{objective}
trainer:
  batch_size: {batch_size}           # {batch_why}
  epochs: {epochs}                # {epochs_why}
{rate}  # early_stop: 3          # stop after so many evaluations on dev without a better one
  # memory_budget: 6GiB    # memory for activations; only the speed depends on it

# lora: {{rank: 16}}         # train small adapters instead of all weights: for models that do not fit otherwise
# evaluate: false          # skip the evaluation before and after
"""

HELD_OUT = """\
  # dev: path/to/dev       # chooses the best checkpoint; without it 10 % of the training queries are held out
  # test: path/to/test     # judges base and tuned model; without it the test split of a folder, else another 10 %
"""
NAMED = """\
  # test: path/to/test     # queries with documents, scored pairs or labels: judges base and tuned model; texts cannot
  # dev: path/to/dev       # of the same kinds, chooses the best checkpoint; without it the last one is the model
"""
COLUMNS = {"labelled": "text: body, label: topic", "pairs": "first: a, second: b", "texts": "text: body"}
SENTENCE_BERT = """\
  lr: 2.0e-5               # Sentence-BERT (Reimers and Gurevych 2019); small models bear 3e-5 to 5e-5
  warmup: 0.1              # share of the steps; the same paper
  schedule: linear         # the same paper
"""
SIMCSE = """\
  dropout: 0.1             # what makes two embeddings of a text differ; SimCSE (Gao et al. 2021)
  lr: 3.0e-5               # the same paper, for models as large as BERT base
  warmup: 0                # the same paper
  schedule: linear         # the same paper
"""
OBJECTIVES = {
    "retrieval": """\
  negatives_per_query: 4   # of the hard negatives a row brings, where it brings any

objective:
  name: contrastive        # InfoNCE (van den Oord et al. 2018): the query's own document against the batch's others
  temperature: 0.05        # sentence-transformers' scale of 20 for cosine similarities
""",
    "labelled": """\
  # labels: [one, another] # those only; the others are left out
  texts_per_label: 4       # texts of a label in a batch (Hermans et al. 2017)

objective:
  name: triplet            # texts of one label nearer to each other than to those of another
  mining: semi-hard        # Schroff et al. 2015
  margin: 0.1              # 0.2 there, of squared Euclidean distance, which is 0.1 of 1 − cosine
""",
    "pairs": """\
  # score_range: [0, 5]    # lowest and highest score; without it, those of the training data

objective:
  name: cosent             # cosines in the order of the scores (CoSENT, Huang et al. 2024)
  temperature: 0.05        # sentence-transformers' scale of 20
""",
    "texts": """\

objective:
  name: simcse             # a text should find itself under another dropout mask (Gao et al. 2021)
  temperature: 0.05        # the same paper
  # name: mlm              # or go on with pre-training on your texts; a decoder has mntp (kinvec train mntp) and clm
""",
}
HOLDS = {
    "retrieval": "queries with their documents", "labelled": "texts with their labels", "pairs": "scored pairs",
    "texts": "plain texts",
}  # fmt: skip


def init(
    file: str | Path = "recipe.yaml",
    data: str | Path | None = None,
    *,
    model: str = "sentence-transformers/all-MiniLM-L6-v2",
    from_nemo: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a commented recipe to `file`, fitted to `data` where that is given; says what it found and what is next.

    With `from_nemo`, a file with the arguments of a NeMo command, the recipe is what that command does. Raises
    `KinvecError` if the file is there already (and not `force`), if `data` cannot be read, or if there are no such
    arguments.
    """
    from kinvec.contracts import KinvecError
    from kinvec.files import write_text

    path = Path(file)
    if path.exists() and not force:
        raise KinvecError(f"{path} is there already; name another file, or --force to write over it")
    if from_nemo is not None:
        return _from_nemo(path, Path(from_nemo))
    found = {"kind": None, "rows": None} if data is None else look_at(data)
    rows, source = found["rows"], "path/to/your/data" if data is None else str(data)
    kind = found["kind"] or "retrieval"
    texts = kind == "texts"
    batch, batch_why, epochs, epochs_why = FOR_TEXTS if texts else suggest(rows)
    text = RECIPE.format(
        file=path, model=_quoted(model), out=_quoted(f"runs/{path.stem}"), train=_quoted(source),
        about=(
            "A BEIR folder, or a file (JSON array, JSONL, CSV, Parquet) with columns query and pos_doc, perhaps neg_doc"
            if rows is None
            else f"{rows:,} {HOLDS[kind]}"
        ),
        judged=NAMED if texts else HELD_OUT, columns=COLUMNS.get(kind, "query: question, pos_doc: answer"),
        rate=SIMCSE if texts else SENTENCE_BERT,
        objective=OBJECTIVES[kind], batch_size=batch, batch_why=batch_why, epochs=epochs, epochs_why=epochs_why,
    )  # fmt: skip
    write_text(path, text)
    return {"file": str(path), **found, "next": [f"kinvec check {source}", f"kinvec train {path}"]}


def _from_nemo(path: Path, source: Path) -> dict[str, Any]:
    from kinvec.contracts import one_sentence
    from kinvec.files import write_text
    from kinvec.files.sources import existing
    from kinvec.formats.nemo_recipe import collapses, read_overrides, recipe_of, write_recipe

    with one_sentence(f"{source}: not the arguments of a NeMo command", "write them as key=value"):
        overrides = read_overrides(existing(str(source)).read_text("utf-8"))
        settings, left = recipe_of(overrides)
        warnings = collapses(overrides)
    write_text(path, write_recipe(settings, left, warnings, str(source), str(path)))
    data = settings.get("data.train", "path/to/train.json")
    next_steps = [f"kinvec check {data}", f"kinvec train {path}"]
    return {
        "file": str(path), "kind": None, "rows": None, "left": left, "warnings": warnings, "next": next_steps,
    }  # fmt: skip


def _quoted(text: str) -> str:
    """The text as a YAML value, in JSON's quotes (which are YAML's too) where it would read as something else."""
    import yaml

    try:
        plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def look_at(data: str | Path) -> dict[str, Any]:
    """Kind and number of rows. Raises `KinvecError` where the data are not as they should be."""
    from kinvec.files import detect_kind, open_data

    return {"kind": detect_kind(data), "rows": len(open_data(data))}


FOR_TEXTS = 64, "texts that compete in a step; the same paper", 1, "the same paper, of a million sentences"


def suggest(rows: int | None) -> tuple[int, str, int, str]:
    """(batch size, why, epochs, why) for so many training queries; None where the number is not known."""
    if rows is None or rows >= 20_000:
        return 64, "queries that compete in a step; memory does not limit it", 1, "passes over the training pairs"
    if rows >= 3_000:
        return 64, "queries that compete in a step; memory does not limit it", 2, "a few thousand pairs: two passes"
    return 32, "little data: more steps teach more than more negatives", 3, "measured on SciFact (docs/experiments.md)"


def command(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    data: Annotated[str | None, typer.Option(help="Your training data: a file or a folder; it is looked at.")] = None,
    model: Annotated[
        str, typer.Option(help="The model to start from: a folder, a hub name, or pkg:NAME.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    from_nemo: Annotated[
        Path | None, typer.Option(help="A file with a NeMo command's key=value arguments; they become the recipe.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a recipe that is there.")] = False,
) -> None:
    """Write a commented recipe for your own data, and say what to do next."""
    told = init(file, data, model=model, from_nemo=from_nemo, force=force)
    if told["rows"] is not None:
        print(f"{data}: {told['rows']:,} {HOLDS[told['kind']]} ({told['kind']})")
    for text in told.get("warnings", ()):
        print(f"warning: {text}")
    for key, why in told.get("left", {}).items():
        print(f"not carried over: {key} ({why})")
    print(f"wrote {told['file']}; next:")
    for line in told["next"]:
        print(f"  {line}")
