"""What a run is: recipe → data → evaluation of the base → training → evaluation of the tuned model → report.

Everything a run makes is in its folder; the same command on the same folder continues where it was stopped.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from kinvec import tasks
from kinvec.backbone import add_lora, merge_lora, resolve_device, resolve_precision, set_threads
from kinvec.card import write_card
from kinvec.config import differences, dump
from kinvec.console import say
from kinvec.contracts import KinvecError, Problem
from kinvec.embedder import Embedder, add_language_head, configure, open_folder
from kinvec.files import (
    Table,
    content_fingerprint,
    open_data,
    replace_folder,
    write_json,
    write_text,
)
from kinvec.folder import save_adapter
from kinvec.kinds import CLASSIFIER_TEXTS, DEV_CLASSIFIER_TEXTS, KINDS, Kind
from kinvec.objectives import Objective, make_objective
from kinvec.pooling import Normalize
from kinvec.recipe import Recipe
from kinvec.sampling import hold_out
from kinvec.trainer import fit

RUN_FILE = "run.json"  # its presence says that a folder is a run of ours


@dataclass(frozen=True)
class RunData:
    """What a run trains on, chooses by, and is judged by. `examples` are the table's rows that are trained on."""

    table: Table
    examples: Int[np.ndarray, " E"]
    dev: Problem | None
    test: Problem | None
    warnings: list[str]

    @property
    def kind(self) -> Kind:
        """What is done with data of this kind."""
        return KINDS[self.table.kind]


def run(recipe: Recipe, force: bool = False) -> dict[str, Any]:
    """Do the whole run, or what is left of it; returns its summary.

    Raises `KinvecError` or `RecipeError` for bad data, a bad model or a folder that is not this run's, before the
    folder is made.
    """
    set_threads(recipe.threads)
    objective = make_objective(recipe.objective)
    data = open_run_data(recipe)
    embedder = open_model(recipe)
    folder = claim_folder(recipe, data, embedder, force)
    if (folder / "summary.json").is_file():
        say(f"{folder}: this run is finished; --force starts it afresh")
        return json.loads((folder / "summary.json").read_text("utf-8"))
    for warning in data.warnings:
        say(f"warning: {warning}")
    if recipe.evaluate:
        evaluate_into(folder / "results" / "base", embedder, data)
    trained = _train(recipe, folder, embedder, objective, data)
    embedder.name = str(folder / "model")
    if recipe.evaluate:
        evaluate_into(folder / "results" / "tuned", embedder, data)
    summary = _finish(recipe, folder, embedder, data, trained)
    if recipe.push_to_hub:
        push(folder / "model", recipe.push_to_hub)
    return summary


def open_run_data(recipe: Recipe) -> RunData:
    """Open all data of the run; nothing of a model is loaded before this has succeeded."""
    settings = recipe.data
    table = open_data(
        settings.train, split=settings.split, kind=settings.kind, columns=settings.columns, skip_bad=settings.skip_bad
    )
    objective = make_objective(recipe.objective)
    if table.kind != objective.kind:
        fitting = f"; for these data set objective.name={FITTING[table.kind]}" if table.kind in FITTING else ""
        raise KinvecError(
            f"{settings.train}: holds {table.kind}; {objective.name} training needs {NEEDS[objective.kind]}{fitting}"
        )
    kind = KINDS[table.kind]
    warnings = list(table.warnings)
    if table.dropped:
        warnings.append(f"{table.dropped:,} bad rows were dropped (data.skip_bad)")
    examples = kind.rows(table, settings)
    test = _named(recipe, kind, "test")
    if test is None and kind.held and recipe.evaluate and settings.holdout:
        examples, held = _hold_out(table, examples, settings.holdout, "test")
        test = kind.held(table, held, settings, "test")
    dev = _named(recipe, kind, "dev")
    if dev is None and kind.held and settings.holdout and recipe.evaluate and recipe.trainer.eval_every != 0:
        examples, held = _hold_out(table, examples, settings.holdout, "dev")
        dev = kind.held(table, held, settings, "dev")
    if not len(examples):
        raise KinvecError(f"{settings.train}: no query is left to train on; lower data.holdout or give more data")
    if test is not None:
        shared = _shared_queries(table, examples, kind, test)
        if shared:
            warnings.append(
                f"{shared} training queries are also test queries: the gain will look too good (see kinvec check)"
            )
        test = kind.complete(test, table, examples, CLASSIFIER_TEXTS)
    if dev is not None:
        dev = kind.complete(dev, table, examples, DEV_CLASSIFIER_TEXTS)
    return RunData(table, examples, dev, test, warnings)


NEEDS = {
    "retrieval": "queries with positive documents", "labelled": "texts with labels",
    "pairs": "pairs of texts with scores", "texts": "plain texts",
}  # fmt: skip
FITTING = {"retrieval": "contrastive", "labelled": "triplet", "pairs": "cosent", "texts": "simcse"}


def _named(recipe: Recipe, kind: Kind, name: str) -> Problem | None:
    """The evaluation data named in the recipe, else the split of that name beside the training split."""
    settings = recipe.data
    test = name == "test"
    place, split = (settings.test, settings.test_split) if test else (settings.dev, "dev")
    wanted = recipe.evaluate and (test or recipe.trainer.eval_every != 0)
    if place is not None and (recipe.evaluate or not test):
        return kind.named(place, split, settings)
    return kind.named(settings.train, split, settings) if wanted and kind.beside(settings.train, split) else None


def _hold_out(table: Table, examples: np.ndarray, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    kept, held = hold_out(table, share, name, KINDS[table.kind].column)
    return np.intersect1d(examples, kept), np.intersect1d(examples, held)


def _shared_queries(table: Table, examples: np.ndarray, kind: Kind, test: Problem) -> int:
    known = {" ".join(text.split()).lower() for text in kind.asked(test)}
    chosen = set(examples.tolist())
    shared = row = 0
    for batch in table.batches([kind.column]):
        for query in batch.column(0).to_pylist():
            shared += row in chosen and " ".join(query.split()).lower() in known
            row += 1
    return shared


def open_model(recipe: Recipe) -> Embedder:
    """The model to start from, in float32, with the recipe's prompts and adapters on."""
    device = resolve_device(recipe.device)
    embedder = open_folder(recipe.model, recipe.data.max_length)
    embedder.precision = resolve_precision(recipe.precision, device)
    pooling = [recipe.pooling] if isinstance(recipe.pooling, str) else recipe.pooling
    configure(embedder, recipe.attention, pooling, recipe.append_eos)
    embedder.prompts |= recipe.prompts
    if recipe.pool_prompt is not None:
        embedder.include_prompt = recipe.pool_prompt
    if embedder.similarity == "cosine" and not any(isinstance(module, Normalize) for module in embedder.head):
        embedder.head.append(Normalize())  # trained by cosine: say so in the folder, so that no reader forgets it
    return embedder.to(device)


def claim_folder(recipe: Recipe, data: RunData, embedder: Embedder, force: bool) -> Path:
    """The run folder: made, or recognised as this run's. Inputs are compared by content, not by path.

    Raises `KinvecError` for a folder that is not ours, and for one of a run with other settings, naming them.
    """
    folder = Path(recipe.out)
    identity: dict[str, Any] = {
        "format": 1,
        "settings": _identity(recipe),
        "inputs": {"model": embedder.fingerprint, "train": data.table.fingerprint}
        | {name: part.fingerprint for name, part in (("dev", data.dev), ("test", data.test)) if part is not None},
    }
    if ":" in recipe.objective.name:
        identity["inputs"]["objective"] = content_fingerprint(recipe.objective.name.rpartition(":")[0])
    if folder.exists() and any(folder.iterdir()):
        if not (folder / RUN_FILE).is_file():
            raise KinvecError(f"{folder}: the folder is not empty and not a run of kinvec; choose another out=")
        if not force:
            _same_run(folder, identity)
            _sweep(folder)
            return folder
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_json(beside / RUN_FILE, identity)
        write_text(beside / "recipe.yaml", dump(recipe))
        write_json(beside / "environment.json", environment(embedder))
        write_json(beside / "data.json", describe_data(data, embedder))
        return replace_folder(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide the result; where things lie and are sent to does not."""
    settings = recipe.model_dump(mode="json")
    for key in ("out", "model", "push_to_hub", "device", "threads"):
        settings.pop(key)
    for key in ("train", "dev", "test"):
        settings["data"].pop(key)
    for key in ("trackers", "memory_budget", "keep"):
        settings["trainer"].pop(key)
    return settings


def _same_run(folder: Path, identity: Mapping[str, Any]) -> None:
    old = json.loads((folder / RUN_FILE).read_text("utf-8"))
    changed = [*differences(old["settings"], identity["settings"])]
    changed += [f"{line.split(':')[0]}: its content differs" for line in differences(old["inputs"], identity["inputs"])]
    if changed:
        raise KinvecError(
            f"{folder}: holds a run with other settings ({'; '.join(changed[:5])}); "
            "choose another out=, or --force to start afresh"
        )
    before = json.loads((folder / "environment.json").read_text("utf-8")).get("threads")
    if before != torch.get_num_threads():
        say(f"warning: begun with {before} threads, continued with {torch.get_num_threads()}: last bits may differ")


def _sweep(folder: Path) -> None:
    """Remove what a killed process left beside the files it was writing."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def environment(embedder: Embedder) -> dict[str, Any]:
    """Versions and machine."""
    packages = ("kinvec", "torch", "transformers", "peft", "tokenizers", "numpy", "pyarrow", "ir-measures")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": found | {"python": platform.python_version()},
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "simd": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "device": str(embedder.device),
        "precision": embedder.precision,
    }


def describe_data(data: RunData, embedder: Embedder, sample: int = 2000) -> dict[str, Any]:
    """Counts, token lengths over a sample of rows, share of truncated texts, warnings."""
    rows = data.examples[:: max(1, len(data.examples) // sample)]
    texts: dict[str, list[str]] = {}
    for row in rows.tolist():
        for side, text in data.kind.texts(data.table, row):
            texts.setdefault(side, []).append(text)
    lengths = {side: [len(ids) for ids in _untruncated(embedder, found)] for side, found in texts.items()}
    counts = {"examples": len(data.examples), "dropped": data.table.dropped}
    for name, part in (("dev", data.dev), ("test", data.test)):
        if part is not None:
            counts |= {f"{name}_{what}": count for what, count in data.kind.sizes(part).items()}
    return {
        "source": data.table.source,
        "counts": counts,
        "max_length": embedder.max_length,
        "tokens": {side: _length_summary(values, embedder.max_length) for side, values in lengths.items()},
        "warnings": data.warnings,
    }


def _untruncated(embedder: Embedder, texts: list[str]) -> list[list[int]]:
    return embedder.tokenizer(texts, verbose=False)["input_ids"] if texts else []


def _length_summary(values: list[int], limit: int) -> dict[str, Any]:
    array = np.array(values or [0])
    counts, edges = np.histogram(array, bins=min(24, max(1, len(set(values)))))
    return {
        "mean": round(float(array.mean()), 1), "p95": float(np.percentile(array, 95)), "max": int(array.max()),
        "truncated_share": round(float((array > limit).mean()), 4), "sampled": len(values),
        "histogram": {"counts": counts.tolist(), "edges": [round(float(edge), 1) for edge in edges]},
    }  # fmt: skip


def evaluate_into(folder: Path, embedder: Embedder, data: RunData) -> None:
    """Evaluate on the test data, unless the result is there already."""
    if data.test is None:
        return
    place = folder / (data.test.name or data.table.kind)
    if (place / "results.json").is_file():
        return
    sizes = ", ".join(f"{count:,} {what}" for what, count in data.kind.sizes(data.test).items())
    say(f"evaluating {folder.name} on {sizes}")
    tasks.save_result(tasks.measure(data.test, embedder), place)


def _train(recipe: Recipe, folder: Path, embedder: Embedder, objective: Objective, data: RunData) -> dict[str, Any]:
    """Train, unless the tuned model is there already; `embedder` then holds it."""
    done = folder / "training.json"
    if done.is_file():
        tuned = open_folder(folder / "model")
        embedder.load_state_dict(tuned.state_dict())
        embedder.lineage = tuned.lineage
        return json.loads(done.read_text("utf-8"))
    torch.manual_seed(recipe.seed)  # adapters draw their start from it
    if objective.ask:
        add_language_head(embedder).requires_grad_(not recipe.lora.rank)
    if recipe.lora.rank:
        add_lora(embedder.backbone, recipe.lora)
    source = data.kind.source(data.table, data.examples, recipe.data, recipe.seed)
    dev = data.dev

    def evaluate(model: Embedder) -> dict[str, float]:
        assert dev is not None
        return data.kind.develop(dev, model)

    trained = fit(
        embedder, objective, source, recipe.trainer, folder, evaluate if dev is not None else None, recipe.seed
    )
    if recipe.lora.rank:
        save_adapter(embedder, folder / "adapter", recipe.model)
    merge_lora(embedder.backbone)
    embedder.lineage.append(_lineage(recipe, data, embedder, trained))
    embedder.save(folder / "model")
    write_json(done, trained)
    return trained


def _lineage(recipe: Recipe, data: RunData, embedder: Embedder, trained: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": len(embedder.lineage) + 1,
        "objective": recipe.objective.name,
        "base": recipe.model,
        "recipe": _identity(recipe),
        "data": data.table.fingerprint,
        "seed": recipe.seed,
        "versions": environment(embedder)["versions"],
        "metrics": {key: trained[key] for key in ("steps", "best_step", "best_score")},
    }


def _finish(recipe: Recipe, folder: Path, embedder: Embedder, data: RunData, trained: dict[str, Any]) -> dict[str, Any]:
    """Compare, write the card and the page, and the summary last: its presence says that the run is finished."""
    from kinvec.reporting import build_report

    summary: dict[str, Any] = {"out": str(folder), "model": str(folder / "model"), "training": trained, "results": []}
    base, tuned = folder / "results" / "base", folder / "results" / "tuned"
    if recipe.evaluate and data.test is not None:
        for name in sorted(path.name for path in tuned.iterdir() if path.is_dir()):
            before, after = tasks.load_result(base / name), tasks.load_result(tuned / name)
            comparison = tasks.compare(before, after)
            summary["results"].append(
                {
                    "task": name, "queries": comparison.queries, "unit": tasks.unit_of(comparison.kind),
                    "baselines": before.baselines,
                    "metrics": {
                        d.metric: {
                            "base": d.a, "tuned": d.b,
                            "difference": d.difference, "low": d.low, "high": d.high, "p": d.p,
                        }
                        for d in comparison.metrics
                    },
                }
            )  # fmt: skip
    write_card(folder / "model", recipe, summary, embedder)
    summary["report"] = str(build_report(folder))
    write_json(folder / "summary.json", summary)
    return summary


def push(folder: Path, name: str) -> str:
    """Upload a model folder to the hub and return its address. Raises `KinvecError` when the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Model tuned with kinvec"))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise KinvecError(
            f"push_to_hub: could not upload {folder} as '{name}' ({reason}); the model itself is complete"
        ) from None
