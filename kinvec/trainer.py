"""The training loop: optimiser, schedule, log, checkpoints, signals. Model, objective, batches, evaluator are given.

Steps count from 1; the state after step k is a function of (recipe, data, seed, threads), however often the run was
stopped.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from pydantic import Field, field_validator
from torch import Tensor

from kinvec import distributed, masking
from kinvec.backbone import fuse, has_dropout, layers, recompute_layers, set_dropout, trainable
from kinvec.batching import Pack, Tokens, deal, join, pack, shares
from kinvec.config import Settings
from kinvec.console import progress, say
from kinvec.contracts import KinvecError, RecipeError
from kinvec.embedder import Embedder
from kinvec.faults import Spikes, refuse_fault
from kinvec.fused import replace_dropout
from kinvec.gradcache import backward
from kinvec.machine import ahead, out_of_memory, release_pages
from kinvec.mixing import Mixture, Step
from kinvec.planner import CHUNK_TOKENS, chunks_to_keep, memory_budget, parse_bytes, saved_bytes_per_token
from kinvec.resuming import Progress, keep_log, restore_best, resume, saving
from kinvec.tracking import open_trackers

SMALLEST_CHUNK = 64  # tokens; out of memory below it, halving will not help
GROWTH = 1.5  # of memory over a training: kept pages fragment, and are released when they are so much more


class TrainerSettings(Settings):
    """The loop: how long, how fast, how often."""

    batch_size: int = Field(64, ge=1)
    """Queries that compete in a step, over all ranks. Memory does not limit it: see memory_budget."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs; max_steps overrides it."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    warmup: float = Field(0.1, ge=0)
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up."""
    min_lr: float = Field(0.0, ge=0, le=1)
    """Where the schedule ends, as a share of the peak."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled decay of matrices (biases and norms have none)."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout rates of the model; unset, its own."""
    dropout_on: Literal["all", "attention", "hidden"] = "all"
    """Which rates `dropout` sets: of the attention weights, of hidden states, or both."""
    save_every: int = Field(200, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept, besides the best."""
    keep_best: int = Field(1, ge=1)
    """Best checkpoints kept, by the first measure on dev."""
    eval_every: int | None = None
    """Steps between evaluations on dev; unset, once an epoch; 0, never."""
    early_stop: int = Field(0, ge=0)
    """Stop after this many evaluations without a better one; 0, never."""
    memory_budget: str = "auto"
    """Memory for activations, such as 6GiB; auto is half of what is free. Only speed depends on it."""
    chunk_tokens: int = Field(CHUNK_TOKENS, ge=1)
    """Tokens that go through the model at once."""
    shard: Literal["all", "machine"] | None = None
    """Of several processes: spread the model over all of them (FSDP2), or over those of each machine (HSDP); unset,
    each holds the whole of it."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the model's layers and run each layer again for its gradients: less memory, slower."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Experiment trackers to log to, besides log.jsonl (install the extra `track`)."""

    @field_validator("memory_budget")
    @classmethod
    def _is_an_amount(cls, value: str) -> str:
        if value != "auto":
            parse_bytes(value)
        return value


Evaluate = Callable[[Embedder], dict[str, float]]


def fit(
    embedder: Embedder, source: Mixture, settings: TrainerSettings, run: Path, evaluate: Evaluate | None = None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Train the embedder in place; on return it holds the best weights by dev, else the last.

    Of several processes each does its share of a step (`kinvec.distributed`), and rank 0 evaluates and writes.

    `evaluate` gives dev metrics, the first of which chooses. Continues from the newest checkpoint of `run`. Returns a
    summary: steps, seconds, best step and score, plan. Raises `KinvecError` when the loss stops being a number.
    """
    torch.manual_seed(seed)
    steps_per_epoch = source.steps_per_epoch(settings.batch_size)
    total = settings.max_steps or math.ceil(settings.epochs * steps_per_epoch)
    every = steps_per_epoch if settings.eval_every is None else settings.eval_every
    whole, embedder = embedder, _prepared(embedder, settings)
    _need_dropout(embedder, source)
    optimizer = make_optimizer(embedder, settings)
    state = resume(run, embedder, optimizer, settings.chunk_tokens)
    log_file = run / "log.jsonl" if distributed.rank() == 0 else Path(os.devnull)
    if distributed.rank() == 0:
        keep_log(log_file, state.step)
    plan, spikes = bytes_and_budget(whole, source, settings), Spikes(log_file)
    shares = _announce(source, total, settings)
    trackers, held = open_trackers(list(settings.trackers) if distributed.rank() == 0 else [], run), 0.0
    with (
        _stopping() as stopped,
        saving(run, settings.keep) as save,
        progress("training", total, state.step) as bar,
        open(log_file, "a") as log,
        closing(_steps(embedder, source, settings, range(state.step, total))) as steps,
    ):
        while state.step < total and not (settings.early_stop and state.stale >= settings.early_stop):
            begun = time.perf_counter()
            asked, own = next(steps)
            tokens = join(distributed.everyones(own))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, total, settings)
            _draw_anew(seed, state.step)
            row = _step(embedder, asked, tokens, optimizer, settings, state, plan, run)
            row |= _of_sets(asked, row["loss"])
            state.step += 1
            state.seconds += (seconds := time.perf_counter() - begun)
            row |= {"step": state.step, "epoch": state.step / steps_per_epoch, "tokens_per_s": row["tokens"] / seconds}
            row |= {"memory_gb": memory_gb(embedder.device), "eta_s": state.seconds / state.step * (total - state.step)}
            row |= spikes.told(row, asked.batch)
            held = release_above(held, row["memory_gb"], state.step, embedder.device)
            due = bool(evaluate and every and (state.step % every == 0 or state.step == total))
            if due and evaluate:
                row["dev"] = _evaluate(embedder, evaluate, state, settings.keep_best)
            log.write(json.dumps(row) + "\n")
            log.flush()
            for track in trackers:
                track(row)
            # Asked once: a signal that comes while this is saved waits for the next step.
            stop = distributed.total(stopped()) > 0
            if due or state.step % settings.save_every == 0 or state.step == total or stop:
                save(embedder, optimizer, state)
            bar.advance(1, _note(row))
            if stop:
                raise KeyboardInterrupt
    if evaluate and state.best_step and state.best_step != state.step:
        restore_best(run, embedder, state)
    if whole is not embedder:
        distributed.gather(embedder, whole)
    return _summary(state, plan[0], shares)


def _need_dropout(embedder: Embedder, source: Mixture) -> None:
    noisy = [part.objective.name for part in source.sets if part.objective.noisy]
    if noisy and not has_dropout(embedder):
        raise RecipeError(
            f"{noisy[0]} needs dropout: it makes two embeddings of a text differ; set trainer.dropout=0.1"
        )


def _draw_anew(seed: int, step: int) -> None:
    """Of several processes each draws dropout masks of its own, which depend on nothing that happened before."""
    if distributed.world() > 1:
        torch.manual_seed(seed + 1_000_003 * (step * distributed.world() + distributed.rank() + 1))


def _summary(state: Progress, bytes_per_token: float, shares: dict[str, Any]) -> dict[str, Any]:
    return {
        "steps": state.step, "seconds": round(state.seconds, 2), "best_step": state.best_step or state.step,
        "best_score": state.best_score if state.best_step else None, "best": state.best,
        "chunk_tokens": state.chunk_tokens, "halvings": state.halvings, "bytes_per_token": round(bytes_per_token),
        **({"sets": shares} if shares else {}),
    }  # fmt: skip


def _announce(source: Mixture, total: int, settings: TrainerSettings) -> dict[str, Any]:
    """Say what each of several data sets has for a share, and what is odd in the schedule; the shares."""
    shares = source.plan(settings.batch_size, total) if len(source.sets) > 1 else {}
    for name, told in shares.items():
        say(f"{name}: {told['rows']:,} rows, {told['share']:.0%} of the training, {told['passes']:g} passes")
    _warn_of_schedule(total, settings)
    return shares


def _prepared(embedder: Embedder, settings: TrainerSettings) -> Embedder:
    """What is trained: the embedder made ready for it, or a copy whose weights are spread over the processes."""
    if embedder.precision == "int8":
        raise KinvecError(f"{embedder.name}: int8 is for encoding alone; open the model in bf16 or fp32 to train it")
    if settings.shard is None or distributed.world() == 1:
        prepare(embedder, settings)
        return embedder
    if embedder.language is not None:
        raise RecipeError("trainer.shard is for objectives over embeddings; leave it out to predict tokens")
    copied = deepcopy(embedder)
    for one in (embedder, copied):
        prepare(one, settings)
    distributed.spread(copied, layers(copied.backbone), settings.shard)
    return copied


def prepare(embedder: Embedder, settings: TrainerSettings) -> None:
    """Set dropout, join projections, recompute layers where asked for; in training mode."""
    if settings.dropout is not None:
        set_dropout(embedder, settings.dropout, settings.dropout_on)
    replace_dropout(embedder)
    fuse(embedder.backbone)
    if settings.gradient_checkpointing:
        recompute_layers(embedder.backbone)
    embedder.train()


def make_optimizer(embedder: Embedder, settings: TrainerSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over what is trainable; only matrices decay."""
    parameters = [parameter for _, parameter in trainable(embedder)]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, fused=True)


def warmup_steps(total: int, settings: TrainerSettings) -> int:
    """How many of the steps warm up."""
    return math.ceil(settings.warmup if settings.warmup >= 1 else settings.warmup * total)


def _warn_of_schedule(total: int, settings: TrainerSettings) -> None:
    warmup = warmup_steps(total, settings)
    if warmup >= total:
        say(
            f"warning: warm-up takes {warmup:,} of {total:,} steps, so the learning rate never reaches trainer.lr; "
            "lower trainer.warmup"
        )
    if settings.min_lr == 1 and settings.schedule != "constant":
        say("warning: trainer.min_lr is a share of the peak, and at 1 the learning rate does not fall")


def learning_rate(step: int, total: int, settings: TrainerSettings) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then the schedule down to `min_lr` of the peak."""
    warmup = warmup_steps(total, settings)
    if step < warmup:
        return settings.lr * step / max(warmup, 1)
    done = (step - warmup) / max(total - warmup, 1)
    share = SCHEDULES[settings.schedule](done)
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * share)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


def _steps(
    embedder: Embedder, source: Mixture, settings: TrainerSettings, numbers: Iterable[int]
) -> Generator[tuple[Step, Tokens], None, None]:
    """Steps by number, with the tokens of this process's share of their texts; on a GPU made while it computes."""

    def drawn(number: int) -> tuple[Step, Tokens]:
        asked = source.step(number, settings.batch_size)
        return asked, tokenized(embedder, asked, distributed.rank(), distributed.world())

    return ahead(drawn, numbers, embedder.device)


def tokenized(embedder: Embedder, asked: Step, part: int = 0, parts: int = 1) -> Tokens:
    """Tokens of a step's texts, queries first; or of a part of them, counted from 0."""
    texts = [*asked.queries, *asked.documents]
    own = shares(texts, parts)[part]
    return embedder.tokenize(texts[own], [*asked.query_prompts, *asked.document_prompts][own])


def _step(
    embedder: Embedder, asked: Step, tokens: Tokens, optimizer: torch.optim.Optimizer, settings: TrainerSettings,
    state: Progress, plan: tuple[float, int], run: Path,
) -> dict[str, Any]:  # fmt: skip
    """One optimiser step; out of memory, the chunks are halved and the step begins again with the same random state."""
    random_state, rate = torch.get_rng_state(), optimizer.param_groups[0]["lr"]
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            # Whichever graphs are kept, the bits are the same: the budget may follow the halvings.
            budget = plan[1] >> len(state.halvings)
            loss, measures = _gradients(embedder, asked, tokens, state.chunk_tokens, (plan[0], budget))
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            known_to_all = isinstance(error, distributed.OutOfMemory)
            if distributed.world() > 1 and not known_to_all:  # the others wait for what will not come
                raise KinvecError(
                    f"out of memory at step {state.step + 1} in process {distributed.rank()} of several; lower "
                    f"trainer.chunk_tokens (now {state.chunk_tokens}) or trainer.memory_budget, and start again"
                ) from error
            if state.chunk_tokens < SMALLEST_CHUNK:
                raise KinvecError(
                    f"out of memory at step {state.step + 1} even in chunks of {state.chunk_tokens} tokens; lower "
                    "data.max_length or trainer.batch_size, or close other programs"
                ) from error
        gc.collect()  # the frames that ended hold graphs
        release_pages()
        torch.set_rng_state(random_state)
        state.chunk_tokens //= 2
        state.halvings.append({"step": state.step + 1, "chunk_tokens": state.chunk_tokens})
        say(f"out of memory at step {state.step + 1}: going on with chunks of {state.chunk_tokens:,} tokens")
    weights = [parameter for _, parameter in trainable(embedder)]
    distributed.add_gradients(weights)
    norm = float(distributed.whole(torch.nn.utils.clip_grad_norm_(weights, settings.clip or math.inf)))
    refuse_fault(run, state.step + 1, asked.batch, {"loss": loss, "grad_norm": norm, "lr": rate})
    optimizer.step()
    count, padded = int(tokens.lengths.sum()), float(tokens.lengths.max()) * len(tokens)
    return {
        "loss": loss, "lr": rate, "grad_norm": norm, "tokens": count, "pairs": len(asked.batch.ids),
        "padding_share": 0.0 if embedder.backbone.packs else round(1 - count / padded, 4),
        **measures,
    }  # fmt: skip


def _gradients(
    embedder: Embedder, asked: Step, tokens: Tokens, chunk_tokens: int, plan: tuple[float, int]
) -> tuple[float, dict[str, float]]:
    """The loss, with its gradients left on the parameters, and what the objective measures."""
    objective, batch = asked.objective, asked.batch
    chunks, sizes = step_chunks(embedder, tokens, chunk_tokens)
    if objective.ask is not None:
        clozes = [objective.ask(embedder.tokenizer, chunk) for chunk in chunks]
        of_tokens = in_precision(embedder, embedder.backbone), in_precision(embedder, embedder.language)
        value, right = masking.backward(*of_tokens, clozes)
        return value, {"accuracy": right}
    keep = min(chunks_to_keep(own, *plan) for own in sizes)
    count = len(asked.queries)
    measures: dict[str, float] = {}

    def loss(vectors: Tensor) -> Tensor:
        queries, documents = vectors[:count], vectors[count:]
        with torch.no_grad():
            measures.update(objective.measures(queries, documents, batch))
        return objective.loss(queries, documents, batch)

    distributed.scatter_gradients(embedder, False)
    at_last = partial(distributed.scatter_gradients, embedder, True)
    within = nullcontext if distributed.is_spread(embedder) else distributed.within_memory  # spread, all wait for all
    return backward(_embed(embedder), chunks, loss, keep, at_last, within), measures


def step_chunks(embedder: Embedder, tokens: Tokens, chunk_tokens: int) -> tuple[list[Pack], list[list[int]]]:
    """This process's packs of a step, of about `chunk_tokens` each, and everyone's packs' sizes, in tokens."""
    dealt = deal(tokens.lengths, chunk_tokens, distributed.world())
    chunks = [pack(tokens, rows).to(embedder.device) for rows in dealt[distributed.rank()]]
    return chunks, [[int(tokens.lengths[rows].sum()) for rows in own] for own in dealt]


def _embed(embedder: Embedder) -> Callable[[Pack], Tensor]:
    return in_precision(embedder, embedder)


def in_precision(embedder: Embedder, module: Callable[[Any], Tensor] | None) -> Callable[[Any], Tensor]:
    """The module in the embedder's precision."""
    assert module is not None

    def call(given: Any) -> Tensor:
        mixed = embedder.precision == "bf16"
        with torch.autocast(embedder.device.type, torch.bfloat16) if mixed else nullcontext():
            return module(given)

    return call


def _of_sets(asked: Step, loss: float) -> dict[str, Any]:
    """Of several data sets, for the log: the rows of each in the step, and its loss where all rows are its own."""
    if "" in asked.rows:
        return {}
    return {"sets": dict(asked.rows)} | ({f"loss/{name}": loss for name in asked.rows} if len(asked.rows) == 1 else {})


def bytes_and_budget(embedder: Embedder, source: Mixture, settings: TrainerSettings) -> tuple[float, int]:
    """(bytes a token, budget): what decides how many chunks keep their graphs."""
    few = source.step(0, min(settings.batch_size, max(16, len(source.sets))))
    chunks, _ = step_chunks(embedder, tokenized(embedder, few), 2048)
    bytes_per_token = saved_bytes_per_token(embedder, _embed(embedder), chunks[-1])
    release_pages()  # what evaluation has left in pieces
    budget = memory_budget(settings.memory_budget, embedder.device)
    return bytes_per_token, int(distributed.least(budget / distributed.here()))


def _evaluate(embedder: Embedder, evaluate: Evaluate, state: Progress, keep: int) -> dict[str, float]:
    """Dev metrics, with the random state put back, so that evaluating more often trains the same model."""
    random_state = torch.get_rng_state()
    metrics = distributed.led(partial(evaluate, embedder), embedder)
    distributed.let_go(embedder)
    torch.set_rng_state(random_state)
    embedder.train()
    score = next(iter(metrics.values()))
    shown = [key for number, key in enumerate(metrics) if number == 0 or key.endswith("val_loss")]
    say(f"step {state.step:,}: dev " + ", ".join(f"{key} {metrics[key]:.4f}" for key in shown))
    better = score > state.best_score
    scored = [*state.best, {"step": state.step, "score": score}]
    state.best = sorted(scored, key=lambda one: (-one["score"], one["step"]))[:keep]
    state.stale = 0 if better else state.stale + 1
    if better:
        state.best_step, state.best_score = state.step, score
    return metrics


def memory_gb(device: torch.device) -> float:
    """GB in use now: of the process, or on CUDA the peak of the device."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return round(used / 1e9, 3)


def release_above(held: float, used: float, step: int, device: torch.device) -> float:
    """Release free pages once the process has grown by `GROWTH` since its first steps; returns that mark in GB.

    Each release costs one step's page faults, so it is done seldom.
    """
    if device.type != "cpu" or step <= 2 or not held:
        return max(held, used)
    if used > GROWTH * held:
        release_pages()
    return held


def _note(row: dict[str, Any]) -> str:
    speed = f"{row['tokens_per_s']:,.0f} tokens/s · padding {row['padding_share']:.0%}"
    return f"loss {row['loss']:.4f} · {speed} · {row['memory_gb']:.1f} GB"


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C end the run after the step under way, with a checkpoint."""
    asked: list[int] = []
    old = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            old[number] = signal.signal(number, lambda n, _: asked.append(n))
        except ValueError:  # not the main thread: whoever owns it handles signals
            break
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
