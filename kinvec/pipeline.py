"""What a run is: recipe → data → evaluation of the base → training → evaluation of the tuned model → report.

Everything a run makes is in its folder; the same command on the same folder continues where it was stopped.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinvec import checkpoint, distributed, tasks
from kinvec.adapters import add_lora, merge_lora, round_weights, shorten
from kinvec.backbone import resolve_device, resolve_precision, to_int8
from kinvec.card import write_card
from kinvec.config import differences, dump, merged
from kinvec.console import say
from kinvec.contracts import Encoder, KinvecError, Problem, RecipeError, Result, RetrievalData
from kinvec.embedder import Embedder, add_language_head, configure, open_folder, unrounded, with_prompts
from kinvec.files import (
    content_fingerprint,
    read_written,
    replace_folder,
    sweep,
    sweep_beside,
    write_json,
    write_text,
)
from kinvec.folder import refuse_damaged, save_adapter
from kinvec.forecast import evaluation, in_words, training, whole
from kinvec.kinds import KINDS
from kinvec.machine import release_pages, set_threads
from kinvec.merging import GUARD_FILE, check_metrics, keep_guards
from kinvec.pooling import Normalize
from kinvec.recipe import Recipe
from kinvec.run_data import OpenSet, RunData, describe, examined, measured, mixture, open_run_data, prepared
from kinvec.trainer import fit
from kinvec.validation import Listener, validation

RUN_FILE = "run.json"  # its presence says that a folder is a run of ours
TRAINED = "training.json"  # its presence says that training is finished, and the model saved


def run(recipe: Recipe, force: bool = False, base: Path | None = None) -> dict[str, Any]:
    """Do the whole run, or what is left of it; returns its summary.

    `base` is a run that differs in its seed alone: its results of the base are taken over instead of made again.
    Raises `KinvecError` or `RecipeError` for bad data, a bad model or a folder that is not this run's, before the
    folder is made.
    """
    distributed.start()
    set_threads(recipe.threads)
    data = distributed.in_turn(partial(open_run_data, recipe))
    if distributed.world() == 1 and (force or not _has_begun(recipe)):
        _refuse_foreign(Path(recipe.out))  # before anything takes time
        for line in in_words(_planned(recipe, data)):
            say(line)
    embedder = open_model(recipe)
    begun = distributed.led(partial(_begin, recipe, data, embedder, force, base), embedder)
    if begun.finished is not None:
        return begun.finished
    trained = _train(recipe, begun, embedder, data)
    return distributed.led(partial(_conclude, recipe, begun.folder, embedder, data, trained), embedder)


def plan_run(recipe: Recipe) -> dict[str, Any]:
    """What the run would take on this machine, measured (see `kinvec.forecast`). Raises as `run`; writes nothing."""
    set_threads(recipe.threads)
    return _planned(recipe, open_run_data(recipe))


def _planned(recipe: Recipe, data: RunData) -> dict[str, Any]:
    """The model is opened for it alone: measuring leaves adapters and gradients behind."""
    embedder, evaluated = open_model(recipe), dict[str, tuple[float, int]]()
    if recipe.evaluate:
        evaluated["base"] = evaluated["tuned"] = evaluation(embedder, partial(_measure_all, data))
    if any(one.dev is not None for one in data.sets):
        evaluated["dev"] = evaluation(embedder, partial(develop, data, recipe.trainer.batch_size))
    with torch.random.fork_rng():
        _adapt(recipe, data, embedder)
        trained = training(embedder, mixture(recipe, prepared(data, embedder), embedder.prompts), recipe.trainer)
    return whole(embedder, trained, evaluated)


def _has_begun(recipe: Recipe) -> bool:
    return Path(recipe.out).is_dir() and any(Path(recipe.out).iterdir())


@dataclass(frozen=True)
class _Begun:
    """A run folder, and how far it had come: the summary of a finished run, that of a finished training."""

    folder: Path
    finished: dict[str, Any] | None = None
    trained: dict[str, Any] | None = None


def _begin(recipe: Recipe, data: RunData, embedder: Embedder, force: bool, base: Path | None) -> _Begun:
    """What comes before training: the folder, the warnings, the base model's results."""
    folder = claim_folder(recipe, data, embedder, force)
    _drop_damaged(folder)
    if (finished := read_written(folder / "summary.json")) is not None:
        say(f"{folder}: this run is finished; --force starts it afresh")
        return _Begun(folder, finished=finished)
    for warning in data.warnings:
        say(f"warning: {warning}")
    if recipe.evaluate:
        if base is not None and tasks.same_but_seed(base, folder):
            _take_over(base / "results" / "base", folder / "results" / "base")
        evaluate_into(folder / "results" / "base", embedder, data)
    check_metrics(data.guards, folder / "results" / "base")
    return _Begun(folder, trained=read_written(folder / TRAINED))


def _drop_damaged(folder: Path) -> None:
    """Where the model's files are damaged, forget that it was made: it is made again from the last checkpoint.

    Raises `KinvecError` where there is no checkpoint.
    """
    try:
        refuse_damaged(folder / "model")
    except KinvecError as error:
        if checkpoint.latest(folder / "checkpoints") is None:
            raise
        say(f"warning: {error}; here it is made again from the last checkpoint")
        for name in ("summary.json", TRAINED, GUARD_FILE):
            (folder / name).unlink(missing_ok=True)


def _conclude(
    recipe: Recipe, folder: Path, embedder: Embedder, data: RunData, trained: dict[str, Any]
) -> dict[str, Any]:
    """What comes after training: the tuned model's results, the guard, the comparison, the report; the summary."""
    release_pages()  # what training has left in pieces
    embedder.name = str(folder / "model")
    if recipe.evaluate:
        evaluate_into(folder / "results" / "tuned", embedder, data)
    guard = _guard(recipe, folder, embedder, data) if data.guards else None
    summary = _finish(recipe, folder, embedder, data, {"training": trained} | ({"guard": guard} if guard else {}))
    if recipe.push_to_hub and not broken(summary):
        push(folder / "model", recipe.push_to_hub)
    return summary


def _guard(recipe: Recipe, folder: Path, embedder: Embedder, data: RunData) -> dict[str, Any]:
    """The verdict of the guards; `embedder` then is what `model/` is: a mixture with the base where one was needed."""
    choosing = partial(develop, data, recipe.trainer.batch_size)
    return keep_guards(folder, embedder, recipe.model, data.guards, choosing, partial(evaluate_into, data=data))


def broken(summary: Mapping[str, Any]) -> bool:
    """Whether a run ended with a broken guard."""
    return summary.get("guard", {}).get("verdict") == "broken"


def open_model(recipe: Recipe) -> Embedder:
    """The model to start from, in float32 unless `lora.base` says otherwise, with the recipe's prompts."""
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
    if recipe.lora.base == "bf16" and embedder.precision != "bf16":
        raise RecipeError("lora.base=bf16 needs bf16 arithmetic, and this run's is fp32; set precision=bf16")
    if recipe.lora.few_bits and recipe.trainer.shard:
        raise RecipeError(f"trainer.shard spreads no base in {recipe.lora.base}; leave one of the two out")
    if recipe.lora.base != "fp32" and embedder.precision == "bf16":
        round_weights(embedder.backbone)
    if embedder.precision == "int8":  # of a run that is searched: none is trained so
        to_int8(embedder.backbone)
    return embedder.to(device)


def claim_folder(recipe: Recipe, data: RunData, embedder: Embedder, force: bool) -> Path:
    """The run folder: made, or recognised as this run's. Inputs are compared by content, not by path.

    Raises `KinvecError` for a folder that is not ours, and for one of a run with other settings, naming them.
    """
    folder = Path(recipe.out)
    sweep_beside(folder)
    identity: dict[str, Any] = {
        "format": 1,
        "settings": _identity(recipe),
        "inputs": {"model": embedder.fingerprint} | _inputs(data),
    }
    _refuse_foreign(folder)
    if not force and folder.exists() and any(folder.iterdir()):
        _same_run(folder, identity)
        sweep(folder)
        return folder
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_json(beside / RUN_FILE, identity)
        write_text(beside / "recipe.yaml", dump(recipe))
        write_json(beside / "environment.json", environment(embedder))
        write_json(beside / "data.json", describe_data(data, embedder))
        write_json(beside / "doctor.json", examined(data))
        for one in data.sets:
            if (audit := Path(one.settings.train) / "audit.json").is_file():  # of negatives that kinvec mine found
                shutil.copyfile(audit, beside / f"audit{one.name and f'-{one.name}'}.json")
        return replace_folder(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _refuse_foreign(folder: Path) -> None:
    """Raise unless a run may be there: `KinvecError` for other things, `OSError` where no folder can be made."""
    if folder.is_file():
        raise KinvecError(f"{folder} is a file; choose another out=")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN_FILE).is_file():
        raise KinvecError(f"{folder}: the folder is not empty and not a run of kinvec; choose another out=")


def _inputs(data: RunData) -> dict[str, str]:
    """Hashes of what the data sets hold, and of objectives that are files of the user."""
    found: dict[str, str] = {}
    for one in data.sets:
        own = {"train": one.table.fingerprint}
        own |= {name: part.fingerprint for name, part in (("dev", one.dev), ("test", one.test)) if part is not None}
        if ":" in one.settings.objective.name:
            own["objective"] = content_fingerprint(one.settings.objective.name.rpartition(":")[0])
        found |= {f"{one.name}.{key}" if one.name else key: value for key, value in own.items()}
    found |= {f"tasks.{task.name}": task.problem.fingerprint for task in data.tasks}
    for guard in data.guards:
        found |= {f"guard.{guard.name}": guard.problem.fingerprint, f"guard.{guard.name}.dev": guard.dev.fingerprint}
    return found


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide the result; where things lie and are sent to does not."""
    settings = recipe.model_dump(mode="json")
    for key in ("out", "model", "push_to_hub", "device", "threads"):
        settings.pop(key)
    for one in (settings["data"], *settings["data"]["sets"].values()):
        for key in ("train", "dev", "test"):
            one.pop(key)
    for task in (*settings["tasks"].values(), *settings["guard"].values()):
        task.pop("data")
        task.pop("dev", None)
    for key in ("trackers", "memory_budget", "keep", "keep_best", "shard"):
        settings["trainer"].pop(key)
    return settings


def _same_run(folder: Path, identity: Mapping[str, Any]) -> None:
    old, made = read_written(folder / RUN_FILE), read_written(folder / "environment.json")
    if old is None or made is None:
        name = RUN_FILE if old is None else "environment.json"
        raise KinvecError(f"{folder / name}: damaged or gone; restore it from a copy, or --force starts the run afresh")
    before = merged(_identity(Recipe()), old["settings"])  # a setting that did not exist then was as its default is
    changed = [*differences(before, identity["settings"])]
    changed += [f"{line.split(':')[0]}: its content differs" for line in differences(old["inputs"], identity["inputs"])]
    if changed:
        raise KinvecError(
            f"{folder}: holds a run with other settings ({'; '.join(changed[:5])}); "
            "choose another out=, or --force to start afresh"
        )
    if (threads := made.get("threads")) != torch.get_num_threads():
        say(f"warning: begun with {threads} threads, continued with {torch.get_num_threads()}: last bits may differ")


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


def describe_data(data: RunData, embedder: Embedder) -> dict[str, Any]:
    """Counts, token lengths over a sample of rows, share of truncated texts, warnings."""
    told = describe(data)
    lengths = {side: [len(ids) for ids in _untruncated(embedder, found)] for side, found in told.pop("texts").items()}
    tokens = {side: _length_summary(values, embedder.max_length) for side, values in lengths.items()}
    return told | {"max_length": embedder.max_length, "tokens": tokens}


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


def _take_over(results: Path, folder: Path) -> None:
    """Copy the results that are not there yet."""
    for place in (path.parent for path in results.glob("*/results.json")):
        if not (folder / place.name / "results.json").is_file():
            beside = folder / f".{place.name}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            replace_folder(shutil.copytree(place, beside), folder / place.name)


def evaluate_into(folder: Path, embedder: Embedder, data: RunData) -> None:
    """Evaluate on all that the run names, but for results that are there; where it is quick, cheaper vectors too."""
    for name, problem, measures, prompts in measured(data):
        place = folder / name
        if (place / "results.json").is_file():
            continue
        sizes = ", ".join(f"{count:,} {what}" for what, count in KINDS["texts"].sizes(problem).items())
        say(f"evaluating {folder.name} on {name}: {sizes}")
        tasks.save_result(_measure(data, problem, with_prompts(embedder, prompts), measures), place)


def _measure(data: RunData, problem: Problem, encoder: Any, measures: Sequence[str]) -> Result:
    if tasks.small_enough(problem, measures):
        dimensions = sorted({m for one in data.sets for m in one.settings.objective.dimensions})
        return tasks.with_cheaper(problem, encoder, measures, dimensions)
    return tasks.measure(problem, encoder, measures)


def _measure_all(data: RunData, encoder: Any) -> None:
    for _, problem, measures, prompts in measured(data):
        _measure(data, problem, with_prompts(encoder, prompts), measures)


def _develop(one: OpenSet, encoder: Encoder, batch_size: int) -> dict[str, float]:
    """Dev metrics of one data set; of a search problem also its loss and its cosines, from the same vectors."""
    if not isinstance(one.dev, RetrievalData):
        return one.kind.develop(one.dev, encoder)
    heard = Listener(encoder, one.dev)
    found = one.kind.develop(one.dev, heard)
    return found | validation(one.dev, heard, one.objective, batch_size, one.settings.negatives_per_query)


def develop(data: RunData, batch_size: int, encoder: Encoder) -> dict[str, float]:
    """Dev metrics, the first of which chooses the checkpoint: of several data sets, the mean of their main metrics."""
    found = {
        one.name: _develop(one, with_prompts(encoder, one.settings.prompts), batch_size)
        for one in data.sets if one.dev is not None
    }  # fmt: skip
    if len(data.sets) == 1:
        return found[""]
    mean = sum(next(iter(metrics.values())) for metrics in found.values()) / len(found)
    return {"mean": mean} | {f"{name} {key}": value for name, own in found.items() for key, value in own.items()}


def _train(recipe: Recipe, begun: _Begun, embedder: Embedder, data: RunData) -> dict[str, Any]:
    """Train, unless the tuned model is there already; `embedder` then holds it."""
    folder = begun.folder
    if begun.trained is not None:
        tuned = open_folder(folder / "model")
        embedder.load_state_dict(tuned.state_dict())
        embedder.lineage = tuned.lineage
        return begun.trained
    _adapt(recipe, data, embedder)
    evaluate = (
        partial(develop, data, recipe.trainer.batch_size) if any(one.dev is not None for one in data.sets) else None
    )
    source = mixture(recipe, prepared(data, embedder), embedder.prompts)
    trained = fit(embedder, source, recipe.trainer, folder, evaluate, recipe.seed)
    with unrounded(embedder):
        if recipe.lora.rank:
            distributed.led(partial(save_adapter, embedder, folder / "adapter", recipe.model))
        merge_lora(embedder.backbone)
        embedder.lineage.append(_lineage(recipe, data, embedder, trained))
        distributed.led(partial(embedder.save, folder / "model"))
    distributed.led(partial(write_json, folder / TRAINED, trained))
    return trained


def _adapt(recipe: Recipe, data: RunData, embedder: Embedder) -> None:
    """Put on what is trained besides the weights: a head that predicts tokens, adapters."""
    torch.manual_seed(recipe.seed)  # adapters draw their start from it
    if any(one.objective.ask for one in data.sets):
        add_language_head(embedder).requires_grad_(not recipe.lora.rank)
    if recipe.lora.rank:
        device = embedder.device
        with unrounded(embedder):
            add_lora(embedder.backbone, recipe.lora)
            if recipe.lora.few_bits:
                shorten(embedder.backbone, recipe.lora.base, device)


def _lineage(recipe: Recipe, data: RunData, embedder: Embedder, trained: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": len(embedder.lineage) + 1,
        "objective": " + ".join(dict.fromkeys(one.objective.name for one in data.sets)),
        "base": recipe.model,
        "recipe": _identity(recipe),
        "data": data.fingerprint,
        "seed": recipe.seed,
        "versions": environment(embedder)["versions"],
        "metrics": {key: trained[key] for key in ("steps", "best_step", "best_score")},
    }


def _finish(recipe: Recipe, folder: Path, embedder: Embedder, data: RunData, done: dict[str, Any]) -> dict[str, Any]:
    """Compare, write the card and the page, and the summary last: its presence says that the run is finished."""
    from kinvec.reporting import build_report

    summary: dict[str, Any] = {"out": str(folder), "model": str(folder / "model"), **done, "results": []}
    base, tuned = folder / "results" / "base", folder / "results" / "tuned"
    if recipe.evaluate:
        for name, *_ in measured(data):
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
